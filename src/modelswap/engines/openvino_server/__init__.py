"""The embedded engine: a small OpenAI-compatible server over OpenVINO GenAI, a process of its own.

``python -m modelswap.engines.openvino_server --model PATH --served-name NAME --port N``
"""

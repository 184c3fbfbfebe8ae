"""Compose files: the LLM services in them, as containers to adopt or to manage."""

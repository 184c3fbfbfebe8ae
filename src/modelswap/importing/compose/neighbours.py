"""The services of a compose file that are no model: what they have to do with the models all the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from modelswap.importing.result import Imported, Kind
from modelswap.importing.servers import Server, split_image
from modelswap.importing.service import Service

_SWAPS: Final = re.compile(
    r"litellm|llama-swap|llmsnap|vllm-router|production-stack|sgl.*router|portkey|bifrost|one-api|new-api|sablier|large-model-proxy"
)
_PROXIES: Final = re.compile(r"(?:^|/)(?:nginx|openresty|traefik|caddy|haproxy|envoy|kong|httpd|apisix)[^/]*$")
_OTHERS: Final = re.compile(
    r"localai|local-ai|text-generation-webui|koboldcpp|tabbyapi|lmdeploy|tritonserver|tensorrt|xinference|aphrodite"
    r"|text-embeddings-inference|infinity|llama-cpp-python|mlc-llm|whisper|speaches|kokoro|piper|comfyui"
    r"|stable-diffusion|sdnext|openedai|docling-serve-cu|(?:^|/)nim/"
)
_SWAP_NAMES: Final = re.compile(r"gateway|proxy|router|orchestrat|swap|balancer|switcher|llm-manager")
_SOCKET: Final = re.compile(r"docker\.sock|DOCKER_HOST|podman\.sock")
_HAS_GPU: Final = re.compile(r'"capabilities": \[[^]]*gpu|"gpus":|"runtime": "nvidia"')
_URL: Final = re.compile(r"https?://([A-Za-z0-9_.-]+)(?::(\d+))?")


def look(services: Mapping[str, dict[str, Any]], models: Mapping[str, str], imported: Imported, gateway: str) -> None:
    """Note what the services that aren't ``models`` (model services by host name) do with them.

    ``gateway`` is the address that clients are to use instead.
    """
    names = set(models.values())
    for name, service in services.items():
        if name in names:
            continue
        key = f"services.{name}"
        noted = _role(name, service, key, imported)
        noted |= _talks(service, models, key, imported, gateway)
        needs = service.get("depends_on")
        if isinstance(needs, dict) and (started := sorted(names & needs.keys())):
            text = f"take {', '.join(started)} out: `docker compose up` would start it behind modelswap's back"
            imported.note(Kind.ACTION, f"{key}.depends_on", text)
        if not noted:
            imported.ignored.append(name)


def pulled(services: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the Ollama models that some service pulls or runs."""
    text = json.dumps([[each.get("command"), each.get("entrypoint")] for each in services.values()])
    listed = re.sub(r'",\s*"', " ", text)
    found = re.findall(r"\b(?:ollama\s+)?(?:pull|run)\s+([a-z0-9][\w./-]*(?::[\w.-]+)?)", listed)
    for call in re.findall(r"/api/pull\b(.*?)(?:/api/|$)", listed):
        found += re.findall(r'\\"(?:name|model)\\"\s*:\s*\\"([\w./:-]+)', call)
    return list(dict.fromkeys(found))


def _role(name: str, service: dict[str, Any], key: str, imported: Imported) -> bool:
    roles = list(_roles(name, service))
    for kind, text in roles:
        imported.note(kind, key, text)
    return bool(roles)


def _roles(name: str, service: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    image, _ = split_image(str(service.get("image") or ""))
    if _SWAPS.search(image):
        yield (
            Kind.ACTION,
            "routes to models or swaps them, as modelswap does now: take it out, or point it at the gateway",
        )
    elif _SOCKET.search(json.dumps([service.get("volumes"), service.get("environment")])):
        yield Kind.ACTION, "drives Docker: see that it no longer starts or stops the models' containers"
    elif service.get("build") is not None and _SWAP_NAMES.search(f"{name} {image}"):
        yield Kind.ACTION, "looks like a gateway or a swapping script of your own; modelswap takes its place then"
    elif _PROXIES.search(image):
        yield Kind.CHANGED, "if it forwards to the models, point it at the gateway instead"
    elif _OTHERS.search(image):
        hint = f"engine: custom, compose_service: {name}, port: …, ready: …"
        yield Kind.LOST, f"serves models in a way that is unknown here; if it speaks OpenAI's API: {hint}"
    if _HAS_GPU.search(json.dumps(service)):
        yield Kind.CHANGED, "has the GPU, too: nobody swaps it, and what it holds there, models can't have"


def _talks(service: dict[str, Any], models: Mapping[str, str], key: str, imported: Imported, gateway: str) -> bool:
    found = False
    for part in ("environment", "command", "entrypoint"):
        value = service.get(part)
        items = value.items() if isinstance(value, dict) else [("", json.dumps(value))]
        for name, text in items:
            hosts = {models[host] for host, _ in _URL.findall(str(text)) if host in models}
            if hosts:
                where = f"{key}.{part}.{name}" if name else f"{key}.{part}"
                talks = f"talks to {', '.join(sorted(hosts))} itself; give it the gateway's address: {gateway}"
                imported.note(Kind.ACTION, where, talks)
                found = True
    return found


def is_helper(service: Service, server: Server) -> bool:
    """Return whether a service only calls a server's command-line tool (``ollama pull``, ``vllm bench``)."""
    words = service.words
    if server.kind != "ollama" or server.program or not words:
        return False
    return words[0] in ("pull", "run", "create") or bool(re.search(r"\b(?:pull|run|create)\b", " ".join(words)))

"""What services share (GPU, weights, network), as our config says it once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from modelswap.importing import containers, device
from modelswap.importing.compose.document import Document
from modelswap.importing.result import Imported, Kind
from modelswap.importing.sections import Section
from modelswap.importing.servers import Server
from modelswap.importing.service import Service
from modelswap.importing.words import Options

_HF_CACHE: Final = "/root/.cache/huggingface"

Services = Mapping[str, tuple[Service, Server, Section]]


def look(found: Services, document: Document, imported: Imported, *, manage: bool) -> None:
    """Move into the sections ``device`` and ``docker`` what all models have in common; note what they don't."""
    on_gpu = {
        name: service for name, (service, server, _) in found.items() if not containers.without_gpu(service, server)
    }
    gpus = {name: _said(service) for name, service in on_gpu.items()}
    if device.choose(gpus, "services", imported):
        # That is what `gpus: auto` means.
        for model in imported.config["models"].values():
            model.pop("gpus", None)
    _side_by_side(found, on_gpu, imported)
    if manage:
        models = imported.config["models"].values()
        _hf_cache(models, imported)
        _network(models, imported)


def _said(service: Service) -> list[str] | None:
    if isinstance(service.gpus, list):
        return service.gpus
    return service.chosen if service.gpus == "all" else None


def _side_by_side(found: Services, on_gpu: Mapping[str, Service], imported: Imported) -> None:
    shares: dict[str, float] = {}
    for name in on_gpu:
        server = found[name][1]
        option, _ = containers.SHARES.get(server.kind, (None, 1))
        share = Options(server.args).peek(option) if option else None
        try:
            shares[name] = float(share or 1)
        except ValueError:
            return
    if len(shares) > 1 and sum(shares.values()) <= 1:
        text = f"{', '.join(shares)} fit onto the GPU together; here one runs at a time, so each could have more of it"
        imported.note(Kind.CHANGED, "services", text)


def _hf_cache(models: Any, imported: Imported) -> None:
    users = [
        model for model in models if model["engine"] in ("vllm", "sglang") and not model["model"].startswith(("/", "."))
    ]
    mounts = [[v for v in model.get("volumes", []) if v.endswith(f":{_HF_CACHE}")] for model in users]
    sources = {tuple(each) for each in mounts}
    if (
        len(sources) != 1
        or len(only := sources.pop()) != 1
        or any("HF_HOME" in model.get("env", {}) for model in users)
    ):
        return
    imported.config.setdefault("docker", {})["hf_cache"] = only[0].rpartition(":")[0]
    imported.comment(("docker", "hf_cache"), f"Mounted at {_HF_CACHE} into every model that comes from Hugging Face.")
    for model in users:
        model["volumes"] = [each for each in model["volumes"] if each != only[0]]
        if not model["volumes"]:
            del model["volumes"]


def _network(models: Any, imported: Imported) -> None:
    networks = {model.get("network") for model in models}
    if len(networks) == 1 and (network := networks.pop()):
        imported.config.setdefault("docker", {})["network"] = network
        imported.comment(("docker", "network"), "Where gateway, orchestrator and engines meet: be on it, too.")
        for model in models:
            del model["network"]

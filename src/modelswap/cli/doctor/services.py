"""The services: do they run, are they of this version, can they listen where they are to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import modelswap
from modelswap.cli import addresses
from modelswap.cli.doctor.finding import Finding, fine, note, problem, warning
from modelswap.cli.doctor.scene import Scene, ToldElsewhere, in_thread
from modelswap.runtimes.ports import is_free, outside_ephemeral
from modelswap.spec.config import Config

_LOOKED_AT: Final = 64
_FEW: Final = 4

Status = Mapping[str, Any]


async def running(scene: Scene) -> list[Finding]:
    """Whether an orchestrator runs, and what it says of itself."""
    status = await scene.status()
    url = addresses.url(scene.config.orchestrator.host, scene.config.orchestrator.port)
    if status is None:
        return [note(f"no orchestrator answers at {url}", "start it with `modelswap up`, or the compose project")]
    return of_status(status, url)


def of_status(status: Status, url: str) -> list[Finding]:
    """Judge what a running orchestrator says."""
    version = str(status.get("version", "?"))
    current = status.get("current_model") or "none"
    findings = [fine(f"the orchestrator at {url} answers (version {version}, current model: {current})")]
    if version != modelswap.__version__:
        message = f"the orchestrator is version {version}, and this command {modelswap.__version__}"
        findings.append(warning(message, "restart the older one (running engines go on)"))
    findings += [problem(f"it says: {_text(trouble)}", "see its log") for trouble in status.get("problems") or ()]
    findings += [warning(f"it says: {_text(trouble)}", "see its log") for trouble in status.get("warnings") or ()]
    if not status.get("gateways"):
        findings.append(warning("no gateway is connected to it", "start one (modelswap gateway), and see its log"))
    return findings


async def can_listen(scene: Scene) -> list[Finding]:
    """Whether the addresses are free, or held by our own services."""
    status = await scene.status()
    config = scene.config
    findings = []
    for service, host, port in (
        ("gateway", config.gateway.host, config.gateway.port),
        ("orchestrator", config.orchestrator.host, config.orchestrator.port),
    ):
        found = await in_thread(lambda host=host, port=port: addresses.unusable(host, port)) if port else None  # type: ignore[misc]
        ours = status is not None and (service == "orchestrator" or bool(status.get("gateways")))
        findings.append(of_address(service, host, port, found, ours=ours))
    return findings


def of_address(service: str, host: str, port: int, found: addresses.Unusable | None, *, ours: bool) -> Finding:
    """Judge whether ``service`` can listen; ``ours``: it does already."""
    if port == 0:
        return problem(f"{service}.port is 0, which no client could find", f"name a port in {service}.port")
    if found is None:
        return fine(f"port {port} is free for the {service}")
    supervised = found.holder is not None and found.holder.supervisor is not None
    if found.in_use and (ours or supervised):
        return fine(f"port {port} is held by the running {service}")
    if found.in_use:
        return problem(f"{service}: {found.reason}", f"stop that, or give another {service}.port in the config file")
    return problem(f"{service}: {found.reason}", f"change {service}.host or {service}.port in the config file")


async def engine_ports(scene: Scene) -> list[Finding]:
    """Whether engines on this machine will find ports to listen at."""
    if not scene.models("process", "managed"):
        raise ToldElsewhere
    safe = await in_thread(outside_ephemeral)
    return await in_thread(lambda: of_ports(scene.config, safe, lambda port: is_free(port, lingering=True)))


def of_ports(config: Config, safe: Sequence[int], free: Callable[[int], bool]) -> list[Finding]:
    """Judge the range of engine ports; ``safe`` are the ports that no program is given by chance."""
    given = config.orchestrator.ports
    ports = safe if given is None else given
    findings = []
    for key, port in (("gateway.port", config.gateway.port), ("orchestrator.port", config.orchestrator.port)):
        if port in ports and given is not None:
            message = f"orchestrator.engine_ports holds {port}, which is {key}"
            findings.append(warning(message, f"leave {port} out of orchestrator.engine_ports"))
    if given is not None and not set(given) <= set(range(1024, 32_768)) and not set(given) <= set(safe):
        message = "some of orchestrator.engine_ports are given to outgoing connections by the kernel"
        findings.append(warning(message, "choose a range below net.ipv4.ip_local_port_range (sysctl shows it)"))
    if len(ports) < _FEW * max(1, len(config.models)):
        message = f"there are {len(ports)} ports for {len(config.models)} models: addresses come back at once"
        findings.append(note(message, "give orchestrator.engine_ports some hundred"))
    looked = ports[:_LOOKED_AT]
    if not any(free(port) for port in looked):
        message = f"none of the engine ports {looked[0]} to {looked[-1]} is free"
        findings.append(
            problem(message, "see what listens there (ss -ltnp), or name others: orchestrator.engine_ports")
        )
    return findings or [fine(f"engine ports {ports[0]} to {ports[-1]} can be used")]


def _text(trouble: object) -> str:
    if isinstance(trouble, Mapping):
        return str(trouble.get("message") or trouble.get("reason") or dict(trouble))
    return str(trouble)

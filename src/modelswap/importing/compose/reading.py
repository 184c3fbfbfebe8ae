"""One service, read key by key: what a container is made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from modelswap.importing.result import CannotImport
from modelswap.importing.sections import Section
from modelswap.importing.service import Port, Service, Volume, size
from modelswap.importing.words import split
from modelswap.spec.containers import ULIMITS


def read_service(name: str, section: Section, env_file: Callable[[str], Mapping[str, str] | None]) -> Service:
    """Read everything that we know to carry over; what stays unread in ``section`` is for the caller to name."""
    service = Service(name, image=section.text("image") or "", built=section.take("build") is not None)
    service.entrypoint = words(section, "entrypoint") if section.take("entrypoint") is not None else None
    service.command = words(section, "command") or []
    _read_env(service, section, env_file)
    service.ports = [port for each in _entries(section, "ports") for port in _port(each)]
    service.exposed = [int(each) for text in section.texts("expose") if (each := text.partition("/")[0]).isdigit()]
    _read_gpus(service, section)
    _read_volumes(service, section)
    _read_devices(service, section)
    service.shm_size = size(section.text("shm_size"))
    service.ipc = section.text("ipc")
    if service.ipc is not None and service.ipc.startswith("service:"):
        service.lost.append(("ipc", "it shares another service's; name that container: ipc: container:NAME"))
        service.ipc = None
    service.ulimits = _ulimits(service, section.section("ulimits"))
    service.extra_hosts = section.texts("extra_hosts")
    service.pull = _pull(service, section.text("pull_policy"))
    service.folder = section.text("working_dir")
    service.grace = duration(section.text("stop_grace_period"))
    return service


def words(section: Section, key: str) -> list[str] | None:
    """Return a command, given as a text or as a list; None if there is none."""
    value = section.take(key)
    return split(value, section.key(key)) if isinstance(value, str) else section.texts(key) if value else None


def duration(text: str | None) -> float | None:
    """Return a duration such as ``1m30s`` in seconds; None if it is none."""
    if text and re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(h|ms|m|s|us)", text or "")
    if not parts:
        return None
    return sum(float(count) * {"h": 3600, "m": 60, "s": 1, "ms": 1e-3, "us": 1e-6}[unit] for count, unit in parts)


def _entries(section: Section, key: str) -> list[Any]:
    value = section.take(key)
    if value is not None and not isinstance(value, list):
        raise CannotImport(f"{section.key(key)}: wants a list", "mend it, then import")
    return value or []


def _read_env(service: Service, section: Section, env_file: Callable[[str], Mapping[str, str] | None]) -> None:
    for entry in _entries(section, "env_file"):
        path = entry.get("path") if isinstance(entry, dict) else None
        values = env_file(path) if isinstance(path, str) else None
        if values is not None:
            service.env.update(values)
        elif not isinstance(entry, dict) or entry.get("required") != "false":
            service.lost.append(("env_file", f"there is no {path}"))
    for name, value in section.section("environment").value.items():
        service.env[name] = None if value is None else str(value)
    section.section("environment").finish()


def _port(entry: Any) -> list[Port]:
    if not isinstance(entry, dict) or not str(entry.get("target", "")).isdigit():
        return []
    published, address = entry.get("published"), entry.get("host_ip")
    return [Port(int(entry["target"]), str(published or ""), str(address or ""))]


def _read_gpus(service: Service, section: Section) -> None:
    requests = list(_entries(section.section("deploy").section("resources").section("reservations"), "devices"))
    gpus = section.take("gpus")
    requests += [{"count": gpus}] if isinstance(gpus, str) else gpus if isinstance(gpus, list) else []
    for request in requests:
        if not isinstance(request, dict):
            continue
        capabilities = request.get("capabilities")
        if isinstance(capabilities, list) and not {"gpu", "nvidia", "compute"}.intersection(capabilities):
            service.lost.append(("deploy.resources.reservations.devices", "asks for something that is no GPU"))
            continue
        ids, count = request.get("device_ids"), str(request.get("count") or "all")
        service.gpus = (
            [str(each) for each in ids] if isinstance(ids, list) else int(count) if count.isdigit() else "all"
        )
    runtime = section.text("runtime")
    visible = service.env.get("NVIDIA_VISIBLE_DEVICES")
    # Without `runtime: nvidia` the variable does what it says where that is Docker's default.
    if service.gpus is None and (runtime == "nvidia" or (visible and runtime is None)):
        visible = visible or "all"
        if visible not in ("none", "void"):
            service.gpus = "all" if visible == "all" else [each.strip() for each in visible.split(",")]
    elif runtime not in (None, "nvidia"):
        service.lost.append(("runtime", f"containers of ours can't have the runtime {runtime}"))


def _read_devices(service: Service, section: Section) -> None:
    for entry in _entries(section, "devices"):
        if isinstance(entry, dict) and "source" in entry:
            parts = [entry.get(key) for key in ("source", "target", "permissions")]
            entry = ":".join(str(part) for part in parts if part)
        if not isinstance(entry, str):
            raise CannotImport(f"{section.key('devices')}: wants a list of texts", "mend it, then import")
        device = entry
        kind, equals, name = device.partition("=")
        if device.startswith(("/", "${")):
            service.devices.append(device)
        elif kind == "nvidia.com/gpu" and equals:
            known = service.gpus if isinstance(service.gpus, list) else []
            service.gpus = "all" if name == "all" or service.gpus == "all" else [*known, name]
        else:
            service.lost.append(("devices", f"{device} is no device file"))


def _read_volumes(service: Service, section: Section) -> None:
    for entry in _entries(section, "volumes"):
        if not isinstance(entry, dict):
            continue
        kind, source, target = entry.get("type"), entry.get("source"), entry.get("target")
        if kind not in ("bind", "volume") or not target:
            service.lost.append(("volumes", f"a mount of type {kind} at {target}"))
        elif not target.startswith(("/", "$")):
            service.lost.append(("volumes", f"{target} is no folder of a container's"))
        elif not source:
            service.lost.append(("volumes", f"the nameless volume at {target}; name it to keep what is in it"))
        else:
            service.volumes.append(Volume(source, target, entry.get("read_only") == "true", kind == "volume"))


def _ulimits(service: Service, section: Section) -> dict[str, int]:
    result: dict[str, int] = {}
    for name, value in list(section.value.items()):
        if isinstance(value, dict):
            limits = section.section(name)
            soft, hard = limits.whole("soft"), limits.whole("hard")
            limit = hard if hard is not None else soft
            if soft != hard and None not in (soft, hard):
                service.lost.append((f"ulimits.{name}", f"soft and hard limit are one here: {limit}"))
        else:
            limit = section.whole(name)
        if name not in ULIMITS:
            service.lost.append((f"ulimits.{name}", "there is no such limit"))
        elif limit is not None:
            result[name] = limit
    return result


def _pull(service: Service, policy: str | None) -> Literal["missing", "always", "never"] | None:
    match policy:
        case None | "missing" | "if_not_present":
            return None
        case "always":
            return "always"
        case "never" | "build":
            return "never"
    service.lost.append(("pull_policy", f"'{policy}' is unknown here: the image is pulled when it is missing"))
    return None

"""Services in one spelling, and one service over another, by Compose's rules.

https://docs.docker.com/reference/compose-file/merge/
"""

from __future__ import annotations

import os.path
import re
from pathlib import PurePath
from typing import Any, Final

from modelswap.importing.yamltext import Override

_MAPPINGS: Final = ("environment", "labels", "sysctls", "annotations")
_MOST_PORTS: Final = 1000
_REPLACED: Final = frozenset({"command", "entrypoint"})


def normalised(service: dict[str, Any], base: PurePath, home: str) -> dict[str, Any]:
    """Return ``service`` with its short forms spelt out, and its paths seen from ``base``."""
    result = {key: value for key, value in service.items() if value is not None or key in _REPLACED}
    for key, value in result.items():
        result[key] = Override(_spelt(key, value.value, base, home), value.gone) if isinstance(value, Override) else (
            _spelt(key, value, base, home)
        )  # fmt: skip
    return result


def _spelt(key: str, value: Any, base: PurePath, home: str) -> Any:
    if key in _MAPPINGS and isinstance(value, list):
        return dict(_pair(each) for each in value if isinstance(each, str))
    if key == "extra_hosts":
        return _hosts(value)
    if key == "volumes" and isinstance(value, list):
        return [_volume(each, base, home) for each in value]
    if key == "ports" and isinstance(value, list):
        return [port for each in value for port in _ports(each)]
    if key == "env_file":
        entries = value if isinstance(value, list) else [value]
        return [_env_file(each, base, home) for each in entries]
    if key in ("depends_on", "networks") and isinstance(value, list):
        return {each: None for each in value if isinstance(each, str)}
    return value


def _pair(text: str) -> tuple[str, str | None]:
    name, equals, value = text.partition("=")
    return name, value if equals else None


def _hosts(value: Any) -> Any:
    if isinstance(value, dict):
        return [f"{host}:{address}" for host, address in value.items() if isinstance(address, str)]
    if isinstance(value, list):
        return [each.replace("=", ":", 1) if isinstance(each, str) else each for each in value]
    return value


def _env_file(value: Any, base: PurePath, home: str) -> Any:
    entry = dict(value) if isinstance(value, dict) else {"path": value}
    if isinstance(entry.get("path"), str):
        entry["path"] = absolute(entry["path"], base, home)
    return entry


def _volume(value: Any, base: PurePath, home: str) -> Any:
    if isinstance(value, dict):
        entry = dict(value)
        if entry.get("type") == "bind" and isinstance(entry.get("source"), str):
            entry["source"] = absolute(entry["source"], base, home)
        return entry
    if not isinstance(value, str):
        return value
    parts = re.split(r":(?![\\/]{2})", value)
    if len(parts) == 1:
        return {"type": "volume", "target": parts[0]}
    source, target, *modes = parts
    folder = source.startswith((".", "/", "~"))
    entry = {
        # A variable that isn't set yet holds a path, if anything.
        "type": "bind" if folder or source.startswith("${") else "volume",
        "source": absolute(source, base, home) if folder else source,
        "target": target,
    }
    if modes and "ro" in modes[0].split(","):
        entry["read_only"] = "true"
    return entry


def absolute(path: str, base: PurePath, home: str) -> str:
    """Return ``path`` seen from ``base``, without ``.`` and ``..``."""
    if path == "~" or path.startswith("~/"):
        path = home + path[1:]
    return os.path.normpath(base / path)


def _ports(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [{key: str(each) if isinstance(each, int) else each for key, each in value.items()}]
    if not isinstance(value, str):
        return [value]
    text, _, protocol = value.partition("/")
    host, _, text = text.rpartition(":") if text.count(":") == 1 else ("", "", text)
    address = ""
    if not host and ":" in text:
        front, _, text = text.rpartition(":")
        address, _, host = front.rpartition(":")
    entries: list[Any] = []
    for index, target in enumerate(_range(text)):
        entry = {"target": target}
        if host:
            # A range is published on a range of the same length, or on one port of several.
            entry["published"] = hosts[index] if len(hosts := _range(host)) > index else host
        if address:
            entry["host_ip"] = address.strip("[]")
        if protocol:
            entry["protocol"] = protocol
        entries.append(entry)
    return entries


def _range(text: str) -> list[str]:
    match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", text)
    if match is None:
        return [text]
    first, last = int(match[1]), int(match[2])
    return [str(port) for port in range(first, min(last, first + _MOST_PORTS) + 1)]


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``under`` with ``over`` laid over it; see `bare`."""
    result = dict(under)
    for key, value in over.items():
        if isinstance(value, Override) and key in result:
            del result[key]
            if not value.gone:
                result[key] = value.value
        elif key in _REPLACED or key not in result:
            # A tag that has nothing to act on yet may have in the next file.
            result[key] = value
        else:
            result[key] = _merge(key, bare(result[key]), value)
    return result


def _merge(key: str, under: Any, over: Any) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        return merged(under, over)
    if isinstance(under, list) and isinstance(over, list):
        if key in ("volumes", "ports"):
            return list({_identity(key, each): each for each in [*under, *over]}.values())
        return [*under, *(each for each in over if each not in under)]
    return over


def _identity(key: str, entry: Any) -> str:
    if not isinstance(entry, dict):
        return repr(entry)
    names = ("target",) if key == "volumes" else ("host_ip", "target", "published", "protocol")
    return repr([entry.get(name) for name in names])


def bare(value: Any) -> Any:
    """Return ``value`` without tags that had nothing to act on, once all is merged."""
    if isinstance(value, Override):
        return None if value.gone else bare(value.value)
    if isinstance(value, dict):
        return {key: bare(each) for key, each in value.items() if not (isinstance(each, Override) and each.gone)}
    return [bare(each) for each in value] if isinstance(value, list) else value

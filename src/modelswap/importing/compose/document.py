"""One or several compose files, with what they include and extend, as one set of services."""

from __future__ import annotations

import os.path
import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from modelswap.importing.compose.interpolate import Interpolation, dotenv
from modelswap.importing.compose.merge import absolute, bare, merged, normalised
from modelswap.importing.result import CannotImport
from modelswap.importing.yamltext import parse

Read = Callable[[str], str | None]
"""Returns a file's text by its path; None if there is no such file."""

_TOP = ("volumes", "networks", "secrets", "configs", "models")


@dataclass(slots=True)
class Document:
    """All services after interpolation, ``extends``, ``include`` and merging, each key in one spelling.

    ``project`` is the compose project's name, ``named`` whether somebody said so (else it is the folder's).
    ``extended`` names the services that others extend. ``problems`` are keys with what could not be followed from
    there.
    """

    services: dict[str, dict[str, Any]] = field(default_factory=dict)
    top: dict[str, dict[str, Any]] = field(default_factory=dict)
    project: str = ""
    named: bool = False
    files: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    extended: set[str] = field(default_factory=set)
    problems: list[tuple[str, str]] = field(default_factory=list)
    filled: set[str] = field(default_factory=set)
    unset: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    env: Mapping[str, str] = field(default_factory=dict)


def load(files: Sequence[str], read: Read, env: Mapping[str, str]) -> Document:
    """Return what ``files`` (absolute paths, the later over the earlier) say together; raises `CannotImport`."""
    folder = PurePath(files[0]).parent
    values = ChainMap(dict(env), dotenv(read(str(folder / ".env")) or "", env))
    document = Document(env=values)
    _Loader(read, document).load(files, folder, values, ())
    said = values.get("COMPOSE_PROJECT_NAME") or document.project
    document.named = bool(said)
    document.services = bare(document.services)
    document.top = bare(document.top)
    document.project = said or re.sub(r"[^a-z0-9_-]", "", folder.name.lower()).lstrip("_-")
    if not document.services:
        remedy = "is it a compose file? Name the one that `docker compose` reads"
        if document.other:
            remedy += f", or put {', '.join(document.other)} under 'services:', as it wants it today"
        raise CannotImport(f"{files[0]}: has no services", remedy)
    return document


class _Loader:
    def __init__(self, read: Read, document: Document) -> None:
        self._read = read
        self._document = document

    def load(self, files: Sequence[str], base: PurePath, env: Mapping[str, str], within: tuple[str, ...]) -> None:
        for file in files:
            if file in within:
                raise CannotImport(f"{file}: includes itself", "mend its 'include', then import")
            self._file(file, base, env, (*within, file))

    def _file(self, file: str, base: PurePath, env: Mapping[str, str], within: tuple[str, ...]) -> None:
        document = self._document
        value, interpolation = self._parsed(file, env)
        document.files.append(file)
        for entry in self._includes(value.pop("include", None), base):
            self._include(entry, base, env, within)
        for name, service in self._services(value, file).items():
            whole = self._extended(name, service, file, base, interpolation, ())
            document.services[name] = merged(document.services.get(name, {}), whole)
        for key in _TOP:
            section = value.get(key)
            if isinstance(section, dict):
                document.top[key] = merged(document.top.get(key, {}), section)
        if isinstance(said := value.get("name"), str):
            document.project = said
        known = ("services", "name", "version", *_TOP)
        document.other += [key for key in value if key not in known and not key.startswith("x-")]
        document.filled |= interpolation.filled
        document.unset |= interpolation.unset
        document.hidden |= interpolation.hidden

    def _parsed(self, file: str, env: Mapping[str, str]) -> tuple[dict[str, Any], Interpolation]:
        text = self._read(file)
        if text is None:
            raise CannotImport(f"{file}: no such file", "name an existing compose file")
        value = parse(text, file)
        _is_compose(value, file)
        interpolation = Interpolation(env)
        # Extension fields are only there to be merged from, and were by now.
        plain = {key: each for key, each in value.items() if not key.startswith("x-")}
        return interpolation.value(plain), interpolation

    def _services(self, value: dict[str, Any], file: str) -> dict[str, dict[str, Any]]:
        services = value.get("services") or {}
        if not isinstance(services, dict):
            raise CannotImport(f"{file}: services: wants a mapping of names to services", "mend it, then import")
        for name, service in services.items():
            if not isinstance(service, dict):
                raise CannotImport(f"{file}: services.{name}: wants a mapping (key: value)", "mend it, then import")
        return services

    def _extended(
        self,
        name: str,
        service: dict[str, Any],
        file: str,
        base: PurePath,
        interpolation: Interpolation,
        within: tuple[tuple[str, str], ...],
    ) -> dict[str, Any]:
        if (file, name) in within:
            raise CannotImport(f"{file}: services.{name}.extends: leads back to itself", "mend it, then import")
        own = normalised(
            {key: value for key, value in service.items() if key != "extends"},
            base,
            interpolation.env.get("HOME", "/root"),
        )
        rule = service.get("extends")
        if rule is None:
            return merged({}, own)
        rule = {"service": rule} if isinstance(rule, str) else rule
        other_name = rule.get("service") if isinstance(rule, dict) else None
        if not isinstance(rule, dict) or not isinstance(other_name, str):
            raise CannotImport(f"{file}: services.{name}.extends: names no service", "mend it, then import")
        other_file, folder, other_services = file, base, None
        if isinstance(rule.get("file"), str):
            other_file = absolute(rule["file"], base, "")
            folder = PurePath(other_file).parent
        if self._read(other_file) is None:
            self._document.problems.append((f"services.{name}.extends", f"there is no {other_file}"))
            return merged({}, own)
        parsed, _ = self._parsed(other_file, interpolation.env)
        other_services = self._services(parsed, other_file)
        if other_name not in other_services:
            self._document.problems.append((f"services.{name}.extends", f"{other_file} has no service {other_name}"))
            return merged({}, own)
        if other_file == file:
            self._document.extended.add(other_name)
        under = self._extended(
            other_name, other_services[other_name], other_file, folder, interpolation, (*within, (file, name))
        )
        return merged(under, own)

    def _includes(self, value: Any, base: PurePath) -> list[dict[str, Any]]:
        entries = value if isinstance(value, list) else [] if value is None else [value]
        result: list[dict[str, Any]] = []
        for entry in entries:
            rule = entry if isinstance(entry, dict) else {"path": entry}
            paths = rule.get("path")
            paths = [each for each in (paths if isinstance(paths, list) else [paths]) if isinstance(each, str)]
            if any("://" in each or each.startswith("git@") for each in paths) or not paths:
                self._document.problems.append(("include", f"{', '.join(paths) or 'an entry'} is not a local file"))
                continue
            files = [absolute(each, base, "") for each in paths]
            if missing := [each for each in files if self._read(each) is None]:
                self._document.problems.append(("include", f"there is no {', '.join(missing)}"))
                continue
            result.append({**rule, "path": files})
        return result

    def _include(self, rule: dict[str, Any], base: PurePath, env: Mapping[str, str], within: tuple[str, ...]) -> None:
        folder = PurePath(rule["path"][0]).parent
        if isinstance(rule.get("project_directory"), str):
            folder = PurePath(absolute(rule["project_directory"], base, ""))
        env_files = rule.get("env_file") or [".env"]
        env_files = env_files if isinstance(env_files, list) else [env_files]
        values = dict(env)
        for each in env_files:
            root = base if "env_file" in rule else folder
            values = {**dotenv(self._read(os.path.normpath(root / str(each))) or "", env), **values}
        name = self._document.project
        self.load(rule["path"], folder, values, within)
        # An included file's name isn't the project's.
        self._document.project = name


def _is_compose(value: dict[str, Any], file: str) -> None:
    models = value.get("models")
    if "services" in value or not isinstance(models, dict):
        return
    inner = [each for each in models.values() if isinstance(each, dict)]
    if any("cmd" in each for each in inner):
        raise CannotImport(f"{file}: this is llama-swap's config", f"modelswap import llama-swap {file}")
    if any(not {"engine", "container", "compose_service", "image", "command"}.isdisjoint(each) for each in inner):
        raise CannotImport(f"{file}: this is a config of modelswap's already", f"modelswap check -c {file}")

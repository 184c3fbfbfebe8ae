"""Compose files to a config of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

from modelswap.importing import containers, secrets, servers
from modelswap.importing.compose import neighbours, sharing
from modelswap.importing.compose.document import Document, Read, load
from modelswap.importing.compose.interpolate import dotenv
from modelswap.importing.compose.reading import read_service
from modelswap.importing.compose.reasons import why_lost
from modelswap.importing.containers import Context
from modelswap.importing.names import Names
from modelswap.importing.result import CannotImport, Found, Imported, Kind
from modelswap.importing.sections import Section
from modelswap.importing.servers import Server
from modelswap.importing.service import Service

USUAL: Final = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")
"""The names by which Compose finds its file."""
_OURS: Final = {"8080": "the gateway", "8888": "the orchestrator"}
_GATEWAY: Final = "http://HOST:8080/v1"


def convert(files: Sequence[str], read: Read, env: Mapping[str, str], *, manage: bool = False) -> Imported:
    """Return a config for the LLM services in ``files`` (absolute paths); raises `CannotImport`.

    The containers are adopted as compose makes them, or with ``manage`` made by modelswap. ``read`` returns files'
    texts; ``env`` is the environment that Compose would see.
    """
    document = load(files, read, env)
    imported = Imported()
    context = Context(imported)
    found = _recognised(document, read, files[0])
    names = Names(imported)
    called = _called(found, names)
    for name, (service, server, section) in found.items():
        context.key = f"services.{name}"
        model = containers.managed(service, server, context) if manage else containers.adopted(service, server, context)
        if manage:
            _leave_behind(service, section, document, model, imported)
        else:
            model["compose_service"] = name
            section.finish()
            _warn(name, document.services[name], context)
        aliases = names.aliases(called[name], _others(service, server), f"services.{name}")
        if aliases:
            model["aliases"] = aliases
        if server.many:
            _many(model, called[name], document, context)
        model["adapters"] = names.aliases(called[name], model.get("adapters", []), f"services.{name}")
        _add(imported, called[name], model, service, server)
    _compose_wide(document, imported, manage=manage)
    sharing.look(found, document, imported, manage=manage)
    if manage:
        gone = " ".join(found)
        text = (
            f"take {', '.join(found)} out (`docker compose rm -sf {gone}`): modelswap makes its own containers of them"
        )
        imported.note(Kind.ACTION, "services", text)
    else:
        _profiles(document, list(found), imported)
        if document.named:
            imported.config["docker"] = {"project": document.project}
    _look_around(document, found, imported)
    _variables(document, context)
    imported.steps.append(_step(document, files, list(found), manage=manage))
    return imported


def _step(document: Document, files: Sequence[str], found: list[str], *, manage: bool) -> tuple[str, str]:
    if manage:
        return "modelswap pull", "downloads images and weights"
    usual = len(files) == 1 and PurePath(files[0]).name in USUAL
    chosen = "" if usual else "".join(f" -f {PurePath(file).name}" for file in files)
    return f"docker compose{chosen} create {' '.join(found)}", "makes the containers, and starts none"


def _recognised(document: Document, read: Read, file: str) -> dict[str, tuple[Service, Server, Section]]:
    found: dict[str, tuple[Service, Server, Section]] = {}

    def env_file(path: str) -> Mapping[str, str] | None:
        text = read(path)
        return None if text is None else {k: secrets.escaped(v) for k, v in dotenv(text, document.env).items()}

    for name, value in document.services.items():
        image = str(value.get("image") or "")
        section = Section(value, ("services", name))
        service = read_service(name, section, env_file)
        env = {key: each for key, each in service.env.items() if each}
        server = servers.recognise(image, service.entrypoint or [], service.command, env)
        # What is there for others to be made of needn't be a server itself.
        template = server is not None and server.model is None and not server.many and name in document.extended
        if server is not None and not template and not neighbours.is_helper(service, server):
            found[name] = service, server, section
    if not found:
        raise CannotImport(
            f"{file}: none of its services ({', '.join(document.services)}) is an LLM server that is known here",
            "known are vLLM, llama.cpp, SGLang, TGI and Ollama, by image or command; declare others by hand: "
            "models: {NAME: {engine: custom, compose_service: SERVICE, port: PORT}}",
        )
    return found


def _called(found: Mapping[str, tuple[Service, Server, Section]], names: Names) -> dict[str, str]:
    """Return the models' names by service: what requests name today, where somebody chose that, else the service's."""
    return {name: names.model([*server.names[:1], name], f"services.{name}") for name, (_, server, _) in found.items()}


def _others(service: Service, server: Server) -> list[str]:
    if server.names:
        return list(server.names[1:])
    if server.model and server.kind != "tgi" and not server.model.startswith(("/", ".")):
        return [server.model]
    return []


def _add(imported: Imported, name: str, model: dict[str, Any], service: Service, server: Server) -> None:
    loads = server.model or (", ".join(model.get("adapters", [])) if server.many else "")
    host = f"image {service.image}" if "image" in model else f"compose service {service.name}"
    imported.add(Found(name, server.facts.title, loads, host), model)
    source = service.image or "built by compose"
    imported.comment(("models", name), f"{server.facts.title}, from the service {service.name} ({source}).")


def _many(model: dict[str, Any], name: str, document: Document, context: Context) -> None:
    pulled = neighbours.pulled(document.services) if model.get("ready") == "/api/version" else []
    model["adapters"] = [each for each in pulled if each != name]
    text = "it serves several models and swaps them itself: to modelswap it is one model"
    context.note(Kind.CHANGED, text)
    listed = "see that they are all" if pulled else "none is known, so none would be routed there"
    context.note(Kind.ACTION, f"list its models' names under adapters; {listed}")
    comment = "Names of the models in it: routed here, and passed on as they are."
    context.imported.comment(("models", name, "adapters"), comment)


def _leave_behind(
    service: Service, section: Section, document: Document, model: dict[str, Any], imported: Imported
) -> None:
    key = f"services.{service.name}"
    for part, why in service.lost:
        imported.note(Kind.LOST, f"{key}.{part}", why)
    if service.built:
        service_image = service.image or f"{document.project}-{service.name}"
        model |= {"image": service_image, "pull": "never"}
        text = f"modelswap builds no images: `docker compose build {service.name}` makes {service_image}"
        imported.note(Kind.ACTION, f"{key}.build", text)
    _networks(section, document, model, imported)
    model["volumes"] = [
        f"{_volume_name(each.source, document) if each.named else each.source}:{each.target}{':ro' * each.read_only}"
        for each in service.volumes
    ]
    if any(":" in volume and volume.startswith(f"{document.project}_") for volume in model["volumes"]):
        _whose_volumes(document, imported)
    if not model["volumes"]:
        del model["volumes"]
    if any(port.published for port in service.ports):
        imported.note(Kind.CHANGED, f"{key}.ports", "the engine is not published any more: clients use the gateway")
    if section.value.get("restart") == "no":
        section.take("restart")
    for path, _ in section.unread():
        imported.note(Kind.LOST, path, why_lost(path.removeprefix(f"{key}.")))


def _whose_volumes(document: Document, imported: Imported) -> None:
    if not document.named:
        text = f"those of the project '{document.project}', the folder's name; mend volumes if it has another"
        imported.note(Kind.CHANGED, "volumes", text)


def _volume_name(name: str, document: Document) -> str:
    return _real_name("volumes", name, document)


def _real_name(kind: str, name: str, document: Document) -> str:
    rule = document.top.get(kind, {}).get(name)
    rule = rule if isinstance(rule, dict) else {}
    if isinstance(rule.get("name"), str):
        return str(rule["name"])
    external = rule.get("external")
    if isinstance(external, dict) and isinstance(external.get("name"), str):
        return str(external["name"])
    return name if external == "true" else f"{document.project}_{name}"


def _networks(section: Section, document: Document, model: dict[str, Any], imported: Imported) -> None:
    mode = section.text("network_mode")
    if mode not in (None, "bridge", "default"):
        why = "an engine is reached through a network of its own, never through the host's"
        imported.note(Kind.LOST, section.key("network_mode"), why)
    networks = section.take("networks")
    names = [each for each in networks if each != "default"] if isinstance(networks, dict) else []
    if names:
        model["network"] = _real_name("networks", names[0], document)
        for other in names[1:]:
            imported.note(Kind.LOST, section.key("networks", other), "a container of ours joins one network")
        if isinstance(networks, dict) and any(isinstance(each, dict) and each for each in networks.values()):
            imported.note(Kind.LOST, section.key("networks", names[0]), "its aliases and addresses in that network")


def _warn(name: str, service: dict[str, Any], context: Context) -> None:
    """Note what of an adopted service works against modelswap."""
    policy = service.get("restart")
    deploy = service.get("deploy") if isinstance(service.get("deploy"), dict) else {}
    if policy not in (None, "no", "false") or (policy is None and "restart_policy" in (deploy or {})):
        part = ("restart",) if policy is not None else ("deploy", "restart_policy")
        text = 'modelswap sets it to "no" in Docker, which would start engines by itself; say "no" here, too'
        context.note(Kind.CHANGED, text, *part)
    replicas = str(service.get("scale") or (deploy or {}).get("replicas") or "1")
    where = ("scale",) if service.get("scale") else ("deploy", "replicas")
    if replicas == "0":
        text = "compose makes no container of it; make it 1, and keep it from starting with profiles: [models]"
        context.note(Kind.ACTION, text, *where)
    elif replicas != "1":
        context.note(Kind.ACTION, f"{replicas} replicas: a model has one container; make it 1", *where)
    if service.get("network_mode") == "host":
        text = "opens the engine to whoever reaches the machine, past the gateway; give it a network of compose's"
        context.note(Kind.ACTION, text, "network_mode")
    for port in service.get("ports") or []:
        published = str(port.get("published") or "") if isinstance(port, dict) else ""
        if published in _OURS:
            context.note(Kind.ACTION, f"{published} is {_OURS[published]}'s port: publish another, or none", "ports")
        elif published and port.get("host_ip") not in ("127.0.0.1", "::1"):
            context.note(Kind.CHANGED, f"port {published} leads past the gateway; modelswap doesn't need it", "ports")


def _compose_wide(document: Document, imported: Imported, *, manage: bool) -> None:
    for key, text in document.problems:
        imported.note(Kind.LOST, key, text)
    for key in dict.fromkeys(document.other):
        imported.note(Kind.LOST, key, "not a key that is known here")
    if "models" in document.top:
        imported.note(Kind.LOST, "models", "Docker's own model runner is not an engine that modelswap drives")
    if manage:
        for key in ("secrets", "configs"):
            if key in document.top:
                imported.note(Kind.LOST, key, "mount such files with volumes, or say values in env")


def _profiles(document: Document, found: list[str], imported: Imported) -> None:
    bare = [name for name in found if not document.services[name].get("profiles")]
    if bare:
        text = f"add `profiles: [models]` to {', '.join(bare)}, so that `docker compose up` doesn't start them"
        imported.note(Kind.ACTION, "services", text)


def _look_around(document: Document, found: Mapping[str, tuple[Service, Server, Section]], imported: Imported) -> None:
    hosts: dict[str, str] = {}
    for name in found:
        hosts[name] = name
        service = document.services[name]
        for other in (service.get("container_name"), service.get("hostname")):
            if isinstance(other, str):
                hosts[other] = name
    neighbours.look(document.services, hosts, imported, _GATEWAY)


def _variables(document: Document, context: Context) -> None:
    """Note which values were filled in, and from where; collect what must be set."""
    imported = context.imported
    text = repr(imported.config)
    if document.filled:
        names = ", ".join(sorted(document.filled))
        imported.note(Kind.CHANGED, "", f"filled in from .env or the environment, as they are now: {names}")
    for name in sorted(document.hidden):
        if re.search(rf"\$\{{{name}\b", text):
            where = f"the default of {name} is not copied, because it looks like a secret: set the variable"
            imported.note(Kind.ACTION, "", where)
    imported.variables = {name for name, needed in secrets.references(text) if needed}
    for name in sorted(imported.variables & document.unset):
        imported.note(
            Kind.ACTION, "", f"{name} is not set here, so it stays ${{{name}}}: set it, or put its value there"
        )

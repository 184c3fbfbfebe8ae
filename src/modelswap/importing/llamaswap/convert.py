"""llama-swap's config to one of ours.

Its keys as its ``config-schema.json`` and ``internal/config`` have them (2026); older spellings are read, too.
"""

from __future__ import annotations

from typing import Any, Final

from modelswap.importing import secrets
from modelswap.importing.containers import Context
from modelswap.importing.llamaswap import models as one
from modelswap.importing.llamaswap.macros import Macros
from modelswap.importing.llamaswap.reasons import FILE, MODEL, why_lost
from modelswap.importing.llamaswap.together import look, preload
from modelswap.importing.names import Names
from modelswap.importing.result import CannotImport, Found, Imported, Kind
from modelswap.importing.sections import Section
from modelswap.importing.yamltext import parse

_SHORTEST: Final = 15


def convert(text: str, file: str) -> Imported:
    """Return a config for the models in ``text``; ``file`` names it in errors. Raises `CannotImport`."""
    root = Section(parse(text, file))
    _is_llama_swap(root, file)
    imported = Imported()
    context = Context(imported, command_key="cmd", env_key="cmd")
    try:
        _whole(root, _models(root, context), imported)
    except CannotImport as error:
        raise CannotImport(f"{file}: {error}", error.remedy) from None
    if not imported.config["models"]:
        raise CannotImport(f"{file}: none of its models can be carried over: {imported.notes[0].text}")
    if any("image" in model for model in imported.config["models"].values()):
        imported.steps.append(("modelswap pull", "downloads images and weights"))
    imported.variables = {name for name, needed in secrets.references(repr(imported.config)) if needed}
    return imported


def _is_llama_swap(root: Section, file: str) -> None:
    if "services" in root:
        raise CannotImport(f"{file}: this is a compose file", f"modelswap import compose {file}")
    models = root.value.get("models")
    if not isinstance(models, dict) or not models:
        raise CannotImport(f"{file}: has no models", "is it llama-swap's config? Its models: names each with a cmd:")
    inner = [each for each in models.values() if isinstance(each, dict)]
    ours = {"engine", "container", "compose_service", "image", "command", "model"}
    if not any("cmd" in each for each in inner) and any(not ours.isdisjoint(each) for each in inner):
        raise CannotImport(f"{file}: this is a config of modelswap's already", f"modelswap check -c {file}")


def _models(root: Section, context: Context) -> dict[str, str]:
    """Add every model; return what each is called here."""
    imported = context.imported
    names = Names(imported)
    sections = dict(root.section("models").sections())
    called = {name: names.model([name], f"models.{name}") for name in sections}
    common = root.section("macros")
    used: set[str] = set()
    for name, section in sections.items():
        context.key = section.key()
        own = section.section("macros")
        macros = Macros(name, common.value, own.value, used)
        taken = one.take(name, section, macros, context)
        if taken is None:
            section.finish()
            continue
        model = taken.model
        model["aliases"] = names.aliases(called[name], _aliases(section, macros, context), section.key("aliases"))
        model["adapters"] = names.aliases(called[name], model.get("adapters", []), section.key("cmd"))
        _settings(model, section, root, macros, context)
        _account(section, own, macros, context)
        imported.add(Found(called[name], taken.title, taken.loads, taken.host), model)
        _describe(called[name], section, macros, imported)
    for name in common.value:
        if name in used:
            common.take(name)
    for key, _ in common.unread():
        imported.note(Kind.LOST, key, "no model's command uses it")
    common.finish()
    return {name: ours for name, ours in called.items() if ours in imported.config["models"]}


def _aliases(section: Section, macros: Macros, context: Context) -> list[str]:
    value = section.take("aliases")
    result = []
    for index, alias in enumerate(value if isinstance(value, list) else []):
        entry = alias if isinstance(alias, dict) else {"id": alias}
        if isinstance(entry.get("id"), str):
            result.append(macros.text(entry["id"]))
        if more := [key for key in entry if key != "id"]:
            text = f"an alias is a name and nothing else: no {', '.join(more)}"
            context.imported.note(Kind.LOST, section.key("aliases", index), text)
    return result


def _settings(model: dict[str, Any], section: Section, root: Section, macros: Macros, context: Context) -> None:
    if name := section.text("useModelName"):
        if model["engine"] == "custom":
            model["model"] = macros.text(name)
        else:
            context.note(Kind.CHANGED, "the engine is started with our names, so requests keep theirs", "useModelName")
    limit = section.whole("concurrencyLimit")
    if limit:
        model["concurrency"] = limit
        context.note(Kind.CHANGED, "requests beyond it wait, instead of getting 429", "concurrencyLimit")
    timeout = root.whole("healthCheckTimeout")
    if timeout is not None:
        model["start_timeout"] = max(timeout, _SHORTEST)
    grace = section.whole("unloadTimeout") or root.whole("unloadTimeout")
    if grace:
        model["stop_grace"] = grace
    _ttl(model, section, root)
    one.stop(model, macros.command(section.text("cmdStop") or ""), context)


def _ttl(model: dict[str, Any], section: Section, root: Section) -> None:
    """Say after how many idle seconds it is put out: -1 is the file's ``globalTTL``, 0 is never."""
    own, common = section.whole("ttl"), root.whole("globalTTL")
    for key, value, least in (("ttl", own, -1), ("globalTTL", common, 0)):
        where = section if key == "ttl" else root
        if value is not None and value < least:
            raise CannotImport(f"{where.key(key)}: wants {least} or more, found {value}", "mend it, then import")
    seconds = common if own in (None, -1) else own
    if seconds:
        model["ttl"] = seconds


def _account(section: Section, own: Section, macros: Macros, context: Context) -> None:
    """Note every key of a model that has not been read, and why."""
    imported = context.imported
    for name in macros.own_used:
        own.take(name)
    for key, _ in own.unread():
        imported.note(Kind.LOST, key, "its command doesn't use it")
    for name in macros.unknown:
        imported.note(Kind.ACTION, section.key(), f"there is no macro ${{{name}}}")
    by_id = section.section("filters").take("setParamsByID")
    if isinstance(by_id, dict):
        others = ", ".join(macros.text(each) for each in by_id)
        text = f"requests are passed on as they are, so these names of it are gone: {others}"
        imported.note(Kind.LOST, section.key("filters", "setParamsByID"), text)
    section.take("name")
    section.take("description")
    prefix = f"{section.key()}."
    for key, _ in section.unread():
        imported.note(Kind.LOST, key, why_lost(MODEL, key.removeprefix(prefix)))
    section.finish()


def _describe(name: str, section: Section, macros: Macros, imported: Imported) -> None:
    """Keep what people wrote about a model as comments."""
    lines = [macros.text(section.text(key) or "").strip() for key in ("name", "description")]
    said = ": ".join(line for line in lines if line)
    for line in said.replace("$${", "${").splitlines():
        imported.comment(("models", name), line.strip())


def _whole(root: Section, called: dict[str, str], imported: Imported) -> None:
    root.whole("healthCheckTimeout")
    root.whole("unloadTimeout")
    root.whole("globalTTL")
    if root.texts("apiKeys"):
        text = "the gateway asks for no key: leave gateway.host at 127.0.0.1, or put a proxy that asks before it"
        imported.note(Kind.ACTION, "apiKeys", text)
    look(root, called, imported)
    preload(root, called, imported)
    for key, _ in root.unread():
        imported.note(Kind.LOST, key, why_lost(FILE, key))

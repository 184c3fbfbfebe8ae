"""What may run together in llama-swap (groups, matrix), and in which order: here one model has the device at a time."""

from __future__ import annotations

from collections.abc import Mapping

from modelswap.importing import device
from modelswap.importing.result import Imported, Kind
from modelswap.importing.sections import Section

_PRIORITIES = range(-100, 101)


def look(root: Section, called: Mapping[str, str], imported: Imported) -> None:
    """Carry priorities over; note what runs together there and takes turns here.

    ``called`` has the models' names here by their names there.
    """
    routing = root.section("routing")
    router, scheduler = routing.section("router"), routing.section("scheduler")
    settings = router.section("settings")
    _groups(root.section("groups"), called, imported)
    _groups(settings.section("groups"), called, imported)
    for section in (root, settings):
        if section.take("matrix") is not None:
            text = "models that may run together take turns here; those without a GPU (device: none) run beside"
            imported.note(Kind.CHANGED, section.key("matrix"), text)
    router.take("use")
    if scheduler.take("use") is not None:
        text = "requests wait by modelswap's own rules (scheduling in the config)"
        imported.note(Kind.CHANGED, scheduler.key("use"), text)
    _priorities(scheduler.section("settings").section("fifo").section("priority"), called, imported)
    _devices(imported)


def preload(root: Section, called: Mapping[str, str], imported: Imported) -> None:
    """Have models brought in at start; note which one of those that take turns."""
    models = imported.config["models"]
    listed = root.section("hooks").section("on_startup")
    wanted: set[str] = set()
    for name in listed.texts("preload"):
        if (model := _named(name.strip(), called, imported)) is None:
            imported.note(Kind.LOST, listed.key("preload"), f"there is no model {name}")
        else:
            models[model]["preload"] = True
            wanted.add(model)
    on_gpu = [name for name in models if name in wanted and models[name].get("device") != "none"]
    if len(on_gpu) > 1:
        text = (
            f"of {', '.join(on_gpu)} the first comes in, since one model has the device; take preload from the others"
        )
        imported.note(Kind.CHANGED, listed.key("preload"), text)


def _named(name: str, called: Mapping[str, str], imported: Imported) -> str | None:
    """Return what the model that requests call ``name`` there is called here; None if there is none."""
    models = imported.config["models"]
    aliases = {alias: model for model, said in models.items() for alias in said.get("aliases", [])}
    found = called.get(name, aliases.get(name, ""))
    return found if found in models else None


def _groups(groups: Section, called: Mapping[str, str], imported: Imported) -> None:
    models = imported.config["models"]
    for _, group in groups.sections():
        members = group.texts("members")
        swaps, exclusive, persistent = group.flag("swap"), group.flag("exclusive"), group.flag("persistent")
        on_gpu = [called[name] for name in members if name in called and models[called[name]].get("device") != "none"]
        if missing := [name for name in members if name not in called]:
            imported.note(Kind.LOST, group.key("members"), f"there is no model {', '.join(missing)}")
        listed = ", ".join(on_gpu)
        beside = "if one needs no GPU, say device: none, and it runs beside the others"
        if swaps is False and len(on_gpu) > 1:
            imported.note(Kind.CHANGED, group.key("swap"), f"{listed} ran together, and take turns here; {beside}")
        if exclusive is False and on_gpu:
            text = f"{listed} ran beside others, and take turns with them here; {beside}"
            imported.note(Kind.CHANGED, group.key("exclusive"), text)
        if persistent and on_gpu:
            text = f"{listed} could not be put out by others, and can be here; {beside} (pin: true would refuse those)"
            imported.note(Kind.CHANGED, group.key("persistent"), text)


def _priorities(section: Section, called: Mapping[str, str], imported: Imported) -> None:
    for name in section.value:
        priority = section.whole(name) or 0
        found = _named(name, called, imported)
        if found is None:
            imported.note(Kind.LOST, section.key(name), "there is no such model")
            continue
        model = imported.config["models"][found]
        model["priority"] = min(max(priority, _PRIORITIES[0]), _PRIORITIES[-1])
        if priority not in _PRIORITIES:
            imported.note(Kind.CHANGED, section.key(name), f"the limit is {model['priority']}")


def _devices(imported: Imported) -> None:
    gpus: dict[str, list[str] | None] = {}
    for name, model in imported.config["models"].items():
        if model.get("device") != "none":
            given = model.get("gpus", model.get("env", {}).get("CUDA_VISIBLE_DEVICES"))
            given = given.split(",") if isinstance(given, str) else given
            gpus[name] = None if given == ["all"] else given
    device.choose(gpus, "models", imported)

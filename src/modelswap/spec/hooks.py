"""What the section ``hooks`` of a model must keep to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from modelswap.spec.errors import Path
from modelswap.spec.tree import Tree

WITHOUT_ENGINE: Final = ("before_load", "after_unload")
"""When there is no engine to speak to."""
NEVER_FAIL: Final = ("before_unload", "after_unload")
"""When it is too late to go back: another model waits for the device."""
_MOMENTS: Final = ("before_load", "after_load", "before_unload", "after_unload")
_HTTP_ONLY: Final = ("method", "body")


def check(tree: Tree, path: Path, model: dict[str, Any]) -> None:
    """Add a problem to ``tree`` for every hook of the model at ``path`` that makes no sense."""
    for place, moment, hook in _each(path, model):
        url, command = hook.get("url"), hook.get("command")
        if (url is None) == (command is None):
            message = "has both a 'url' and a 'command'" if command is not None else "has neither 'url' nor 'command'"
            tree.add(place, message, "give one of them")
            continue
        if isinstance(command, list):
            if (not command or command[0] == "") and (*place, "command", 0) not in tree.unreadable:
                tree.add((*place, "command"), "names no program", "e.g. command: [/usr/local/bin/tell, loaded]")
            for key in (key for key in _HTTP_ONLY if hook.get(key) is not None):
                tree.add((*place, key), "only with 'url'", "leave it out", at_key=True)
        if isinstance(url, str) and (*place, "url") not in tree.unreadable:
            _url(tree, (*place, "url"), url, moment)
        if hook.get("on_failure") == "fail" and moment in NEVER_FAIL:
            hint = "leave it out: another model waits for the device"
            tree.add((*place, "on_failure"), f"'fail' is not for {moment}, which can't be called off", hint)


def _url(tree: Tree, place: Path, url: str, moment: str) -> None:
    if url.startswith("/"):
        if moment in WITHOUT_ENGINE:
            tree.add(place, "a path of the engine, which doesn't run then", "give a whole URL")
        return
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or any(character.isspace() or not character.isprintable() for character in url):
        # Never shown: it may hold a token.
        tree.add(place, "not a URL that can be called", "e.g. http://127.0.0.1:9000/loaded, or /path of the engine")


def _each(path: Path, model: dict[str, Any]) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    hooks = model.get("hooks")
    for moment in _MOMENTS:
        listed = hooks.get(moment) if isinstance(hooks, dict) else None
        for index, hook in enumerate(listed if isinstance(listed, list) else ()):
            if isinstance(hook, dict):
                yield (*path, "hooks", moment, index), moment, hook

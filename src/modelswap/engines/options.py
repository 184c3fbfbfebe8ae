"""Reading an engine's own command line options back out of ``args``."""

from __future__ import annotations

from collections.abc import Sequence


def value(args: Sequence[str], *names: str) -> str | None:
    """Return the last value given to one of ``names``, as ``--name v`` or ``--name=v``; None if there is none.

    Dashes and underscores within a name are the same, as they are to vLLM.
    """
    wanted = {_same(name) for name in names}
    found = None
    for index, argument in enumerate(args):
        name, equals, given = argument.partition("=")
        if _same(name) not in wanted:
            continue
        if equals:
            found = given
        elif index + 1 < len(args):
            found = args[index + 1]
    return found


def given(args: Sequence[str], *names: str) -> bool:
    """Return whether one of ``names`` is among ``args``."""
    wanted = {_same(name) for name in names}
    return any(_same(argument.partition("=")[0]) in wanted for argument in args)


def parallelism(args: Sequence[str]) -> int:
    """Return into how many GPUs vLLM or SGLang is told to split a model."""
    return whole(value(args, "--tensor-parallel-size", "-tp", "--tp-size", "--tp")) or 1


def whole(text: str | None) -> int | None:
    """Return ``text`` as a positive whole number; None if it isn't one."""
    try:
        number = int(text or "")
    except ValueError:
        return None
    return number if number > 0 else None


def share(text: str | None) -> float | None:
    """Return ``text`` as a number in 0…1, above 0; None if it isn't one."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 < number <= 1 else None


def _same(name: str) -> str:
    return name[:2] + name[2:].replace("_", "-") if name.startswith("--") else name

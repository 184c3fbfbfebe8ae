"""``modelswap import``: a config file from another program's, and what could not be carried over."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from modelswap.cli.failure import ExitCode, Failure
from modelswap.importing import report
from modelswap.importing.compose.convert import USUAL
from modelswap.importing.compose.convert import convert as from_compose
from modelswap.importing.llamaswap.convert import convert as from_llama_swap
from modelswap.importing.result import CannotImport, Imported, Kind
from modelswap.spec.errors import ConfigError

STDOUT = Path("-")
_TITLES = {
    Kind.ACTION: ("To do", "yellow"),
    Kind.CHANGED: ("Works differently now", "cyan"),
    Kind.LOST: ("Not carried over", "magenta"),
}
_MOST_KEYS = 3


def compose(files: Sequence[Path], output: Path, *, managed: bool, force: bool) -> None:
    """Write a config for the LLM services in compose files; raises `Failure`."""
    _free(output, force=force)
    chosen = [path.absolute() for path in files or [_usual()]]
    chosen += _override(chosen)
    imported = _converted(lambda: from_compose([str(path) for path in chosen], _read, os.environ, manage=managed))
    shown = [*(["--managed"] if managed else []), *(_shown(path) for path in chosen)]
    written = _finished(imported, f"modelswap import compose {shlex.join(shown)}", output)
    _write(written, output, force=force)
    _summary(imported, ", ".join(map(_shown, chosen)), output)


def llama_swap(file: Path, output: Path, *, force: bool) -> None:
    """Write a config for the models in llama-swap's; raises `Failure`."""
    _free(output, force=force)
    imported = _converted(lambda: from_llama_swap(_there(file), str(file)))
    written = _finished(imported, f"modelswap import llama-swap {shlex.quote(_shown(file))}", output)
    _write(written, output, force=force)
    _summary(imported, _shown(file), output)


def _free(output: Path, *, force: bool) -> None:
    if output != STDOUT and output.exists() and not force:
        raise Failure(f"{output} exists already", "write another with -o, or replace it with --force", ExitCode.USAGE)


def _usual() -> Path:
    for name in USUAL:
        if Path(name).is_file():
            return Path(name)
    raise Failure("there is no compose file here", "name it: modelswap import compose FILE", ExitCode.USAGE)


def _override(chosen: list[Path]) -> list[Path]:
    """Return the override file that Compose would read, too: only next to a single file with the usual name."""
    if len(chosen) != 1 or chosen[0].name not in USUAL:
        return []
    stem = chosen[0].stem
    others = (chosen[0].with_name(f"{stem}.override{suffix}") for suffix in (".yaml", ".yml"))
    return [path for path in others if path.is_file()][:1]


def _read(path: str) -> str | None:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise CannotImport(f"{path}: not UTF-8 (byte {error.start})", "save it as UTF-8 text") from None
    except OSError as error:
        raise CannotImport(f"{path}: can't be read: {error.strerror or error}") from None


def _there(file: Path) -> str:
    text = _read(str(file))
    if text is None:
        raise CannotImport(f"{file}: no such file", "name llama-swap's config.yaml")
    return text


def _converted(convert: Callable[[], Imported]) -> Imported:
    try:
        return convert()
    except CannotImport as error:
        here = f"{Path.cwd()}/"
        remedy = error.remedy.replace(here, "") if error.remedy else None
        raise Failure(str(error).replace(here, ""), remedy, ExitCode.USAGE) from None


def _finished(imported: Imported, command: str, output: Path) -> str:
    written = report.text(imported, command)
    try:
        report.verify(written, imported, os.environ, str(output))
    except ConfigError as error:
        problems = "".join(f"\n  {problem}" for problem in error.problems)
        message = f"what came out of it is not a valid config, and was not written{problems}"
        raise Failure(message, "mend that in the file it comes from, then import", ExitCode.USAGE) from error
    return written


def _write(text: str, output: Path, *, force: bool) -> None:
    if output == STDOUT:
        sys.stdout.write(text)
        return
    try:
        with output.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise Failure(f"{output} can't be written: {error.strerror or error}", "write another with -o") from None


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _summary(imported: Imported, source: str, output: Path) -> None:
    console = Console(stderr=True, highlight=False)
    count = len(imported.found)
    found = f"{count} model{'s' * (count != 1)} in "
    target = () if output == STDOUT else (" → ", (str(output), "bold"))
    console.print(Text.assemble(found, (source, "bold"), *target), soft_wrap=True)
    console.print(_table(imported))
    for kind, notes in report.by_kind(imported).items():
        title, style = _TITLES[kind]
        console.print(Text(title, f"bold {style}"))
        for text, keys in notes:
            _bullet(console, _keys(keys), text)
        console.print()
    if imported.ignored:
        console.print(Text("Left alone", "bold"), Text(", ".join(imported.ignored)), sep="  ")
        console.print()
    console.print(Text("Next", "bold green"))
    config = "" if output in (STDOUT, Path("modelswap.yaml")) else f" -c {shlex.quote(str(output))}"
    if unset := sorted(name for name in imported.variables if not os.environ.get(name)):
        _bullet(console, f"set {', '.join(unset)}", "in the environment that modelswap starts in")
    _bullet(console, f"modelswap check{config}", "")
    for command, why in imported.steps:
        _bullet(console, command + (config if command.startswith("modelswap") else ""), why)
    _bullet(console, f"modelswap up{config}", "")


def _table(imported: Imported) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "engine", "loads", "runs in"):
        table.add_column(name, overflow="fold")
    for found in imported.found:
        table.add_row(Text(found.name, "bold"), found.engine, Text(found.loads or "-"), Text(found.host))
    return table


def _keys(keys: Sequence[str]) -> str:
    more = len(keys) - _MOST_KEYS
    if more <= 1:
        return ", ".join(keys)
    return f"{', '.join(keys[:_MOST_KEYS])} and {more} more"


def _bullet(console: Console, head: str, text: str) -> None:
    gap = "  " if head and text else ""
    line = Text.assemble((head, "bold" if not gap else "cyan"), gap, text)
    grid = Table.grid(padding=0)
    grid.add_column(width=2)
    grid.add_column(overflow="fold")
    grid.add_row("•", line)
    console.print(Padding(grid, (0, 0, 0, 2), expand=False))

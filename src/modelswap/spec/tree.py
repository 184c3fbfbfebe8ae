"""YAML text to plain values, each with its place in the file; ``${NAME}`` is replaced on the way."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from modelswap.spec import shape
from modelswap.spec.errors import Path, Problem, dotted

_MOST_VALUES: Final = 100_000
_STANDARD: Final = "tag:yaml.org,2002:"
_REFERENCE: Final = re.compile(r"\$\$\{|\$\{(?P<inside>[^}]*)(?P<end>\}?)")
_INSIDE: Final = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<fallback>:-.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """Line and column, from 1."""

    line: int
    column: int


@dataclass(slots=True)
class Tree:
    """What a file says.

    ``keys`` and ``values`` tell where each path's key and value stand. ``unreadable`` paths have a problem already, so
    their value (a stand-in) is not worth another. ``replaced`` paths hold something from the environment, never shown.
    """

    file: str
    value: Any = None
    empty: bool = False
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)
    unreadable: set[Path] = field(default_factory=set)
    replaced: set[Path] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def add(self, path: Path, message: str, hint: str | None = None, *, at_key: bool = False) -> None:
        """Note a problem with the value (or the key) at ``path``, placed at the nearest thing the file does have."""
        place = self.keys.get(path) if at_key else self.values.get(path, self.keys.get(path))
        nearest = path
        while place is None and nearest:
            nearest = nearest[:-1]
            place = self.keys.get(nearest, self.values.get(nearest))
        line, column = (place.line, place.column) if place else (None, None)
        self.problems.append(Problem(self.file, line, column, dotted(path), message, hint))


def read(text: str, env: Mapping[str, str], file: str) -> Tree:
    """Read ``text``; whatever is wrong with it is in the tree's ``problems``."""
    tree = Tree(file)
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                tree.empty = True
            else:
                _Walk(tree, env, loader).visit(node, ())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        tree.problems.append(_syntax(error, text, file))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        tree.problems.append(Problem(file, line, None, "", f"not YAML: {error.reason}"))
    except (ValueError, OverflowError) as error:  # PyYAML's own, for an escape beyond Unicode, say
        tree.problems.append(Problem(file, None, None, "", f"not YAML: {error}"))
    except RecursionError:
        tree.problems.append(Problem(file, None, None, "", "nested too deeply"))
    return tree


def _syntax(error: yaml.MarkedYAMLError, text: str, file: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Problem(file, None, None, "", f"not YAML: {error.problem or error.context}")
    line = text.splitlines()[mark.line : mark.line + 1]
    hint = None
    if "\\t" in str(error.problem):
        hint = "indent with spaces, not tabs"
    elif line and "${" in line[0]:
        hint = 'put "${…}" in quotes where it stands in {} or []'
    return Problem(file, mark.line + 1, mark.column + 1, "", f"not YAML: {error.problem or error.context}", hint)


class _Stop(yaml.MarkedYAMLError):
    """Ends a walk that can't go on."""


class _Walk:
    def __init__(self, tree: Tree, env: Mapping[str, str], loader: yaml.SafeLoader) -> None:
        self._tree = tree
        self._env = env
        self._loader = loader
        self._open: set[int] = set()
        self._visited = 0

    def visit(self, node: yaml.Node, path: Path) -> None:
        self._tree.value = self._value(node, path)

    def _value(self, node: yaml.Node, path: Path) -> Any:
        self._visited += 1
        if self._visited > _MOST_VALUES:
            raise _Stop(problem="too many values", problem_mark=node.start_mark)
        self._tree.values[path] = _place(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if node.tag not in (_STANDARD + "seq", _STANDARD + "map"):
            self._unknown_tag(node.tag, path)
        if isinstance(node, yaml.SequenceNode):
            with self._inside(node):
                return [self._value(child, (*path, index)) for index, child in enumerate(node.value)]
        result: dict[str, Any] = {}
        self._fill(result, node, path)
        return result

    @contextlib.contextmanager
    def _inside(self, node: yaml.Node) -> Iterator[None]:
        if id(node) in self._open:
            raise _Stop(problem="an alias (*) stands inside its own anchor (&)", problem_mark=node.start_mark)
        self._open.add(id(node))
        yield
        self._open.discard(id(node))

    def _fill(self, result: dict[str, Any], node: yaml.Node, path: Path) -> None:
        """Add what ``node`` says to ``result``; what stands there already (``node`` is merged into it) goes first."""
        seen: dict[str, int] = {}
        merged: list[yaml.Node] = []
        with self._inside(node):
            for key_node, value_node in node.value:
                if key_node.tag == _STANDARD + "merge":
                    merged.extend(value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node])
                    continue
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _STANDARD + "null":
                    self._note(key_node, path, "a key must be a text")
                    continue
                key = key_node.value
                inner = (*path, key)
                if key in seen:
                    hint = "keep one of them"
                    self._note(key_node, inner, f"duplicate key, first given on line {seen[key]}", hint)
                    continue
                seen[key] = _place(key_node).line
                if key not in result:
                    self._tree.keys[inner] = _place(key_node)
                    result[key] = self._value(value_node, inner)
            for source in merged:
                if isinstance(source, yaml.MappingNode):
                    self._fill(result, source, path)
                else:
                    self._note(source, path, "'<<' wants a mapping, such as *an_anchor")

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text = self._replace(node, path)
        if text is None:
            return ""
        if "\0" in text or not _is_utf8(text):
            self._tree.add(path, "holds characters that no program can be given")
            self._tree.unreadable.add(path)
            return ""
        plain = node.style is None
        tag = node.tag
        if path in self._tree.replaced and plain and not shape.takes_text(path):
            tag = self._loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        if not tag.startswith(_STANDARD):
            self._unknown_tag(tag, path)
            return ""
        if tag != _STANDARD + "null" and plain and shape.takes_scalars_as_written(path):
            return text
        if plain and text in shape.choices(path):
            return text  # YAML 1.1 takes on and off for true and false
        match tag.removeprefix(_STANDARD):
            case "null":
                return None
            case "int" | "float" | "bool" as kind:
                try:
                    return getattr(self._loader, f"construct_yaml_{kind}")(yaml.ScalarNode(tag, text))
                except (ValueError, KeyError, IndexError, OverflowError):
                    return text
            case _:
                return text

    def _replace(self, node: yaml.ScalarNode, path: Path) -> str | None:
        if "${" not in node.value:
            return str(node.value)
        failed = False

        def one(match: re.Match[str]) -> str:
            nonlocal failed
            if match["inside"] is None:
                return "${"
            inside = _INSIDE.fullmatch(match["inside"]) if match["end"] else None
            if inside is None:
                failed = True
                self._tree.add(
                    path, "has a '${' that begins no variable", "write ${NAME}, ${NAME:-default}, or $${ for a plain ${"
                )
                return ""
            self._tree.replaced.add(path)
            name, fallback = inside["name"], inside["fallback"]
            value = self._env.get(name)
            if fallback is not None:
                return value or str(fallback[2:])
            if value is None:
                failed = True
                self._tree.add(
                    path,
                    f"the environment variable {name} is not set",
                    f"set it before starting (export {name}=…) or give a default: ${{{name}:-…}}",
                )
                return ""
            return value

        text = _REFERENCE.sub(one, node.value)
        if failed:
            self._tree.unreadable.add(path)
            return None
        return text

    def _unknown_tag(self, tag: str, path: Path) -> None:
        self._tree.add(path, f"has a tag that means nothing here: {tag}", "leave it out")
        self._tree.unreadable.add(path)

    def _note(self, node: yaml.Node, path: Path, message: str, hint: str | None = None) -> None:
        place = _place(node)
        self._tree.problems.append(Problem(self._tree.file, place.line, place.column, dotted(path), message, hint))


def _place(node: yaml.Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

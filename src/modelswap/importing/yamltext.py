"""YAML as other programs write it: every scalar as its text, so that ``0.90`` and ``on`` stay what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import yaml

from modelswap.importing.result import CannotImport

_MOST_VALUES: Final = 100_000
_STANDARD: Final = "tag:yaml.org,2002:"
_NULL: Final = _STANDARD + "null"
_MERGE: Final = _STANDARD + "merge"


@dataclass(frozen=True, slots=True)
class Override:
    """Compose's ``!override``: replaces instead of being merged; ``!reset`` (``gone``) removes."""

    value: Any
    gone: bool = False


class _Loader(yaml.SafeLoader):
    """Tells ``null`` and ``<<`` from texts, and nothing else."""


_Loader.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [each for each in resolvers if each[0] in (_NULL, _MERGE)])
}


def parse(text: str, file: str) -> dict[str, Any]:
    """Return the mapping that ``text`` says, of texts, lists, mappings and None; raises `CannotImport`."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else _Walk(file).value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else file
        raise CannotImport(
            f"{place}: not YAML: {error.problem or error.context}", "mend the line, then import"
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise CannotImport(f"{file}: not YAML: {error}", "is it the right file?") from None
    except RecursionError:
        raise CannotImport(f"{file}: nested too deeply", "is it the right file?") from None
    finally:
        if loader is not None:
            loader.dispose()
    if value is None:
        raise CannotImport(f"{file}: empty", "is it the right file?")
    if not isinstance(value, dict):
        raise CannotImport(f"{file}: wants a mapping (key: value) at its top", "is it the right file?")
    return value


class _Walk:
    def __init__(self, file: str) -> None:
        self._file = file
        self._visited = 0
        self._open: set[int] = set()

    def value(self, node: yaml.Node) -> Any:
        self._visited += 1
        if self._visited > _MOST_VALUES or id(node) in self._open:
            reason = "refers to itself" if id(node) in self._open else "too many values"
            raise yaml.MarkedYAMLError(problem=reason, problem_mark=node.start_mark)
        if node.tag == "!reset":
            return Override(None, gone=True)
        if node.tag == "!override":
            return Override(self._plain(node))
        return self._plain(node)

    def _plain(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode):
            empty = node.tag == _NULL or (node.tag.startswith("!") and node.style is None and not node.value)
            return None if empty else node.value
        self._open.add(id(node))
        result: Any
        if isinstance(node, yaml.SequenceNode):
            result = [self.value(child) for child in node.value]
        else:
            result = {}
            self._fill(result, node)
        self._open.discard(id(node))
        return result

    def _fill(self, result: dict[str, Any], node: yaml.Node) -> None:
        seen: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                merged.extend(value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node])
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a text", problem_mark=key_node.start_mark)
            key = key_node.value
            if key in seen:
                reason = f"the key '{key}' was given on line {seen[key]} already"
                raise yaml.MarkedYAMLError(problem=reason, problem_mark=key_node.start_mark)
            seen[key] = key_node.start_mark.line + 1
            if key not in result:
                result[key] = self.value(value_node)
        for source in merged:
            if not isinstance(source, yaml.MappingNode):
                raise yaml.MarkedYAMLError(problem="'<<' wants a mapping", problem_mark=source.start_mark)
            if id(source) in self._open:
                raise yaml.MarkedYAMLError(problem="refers to itself", problem_mark=source.start_mark)
            self._open.add(id(source))
            self._fill(result, source)
            self._open.discard(id(source))

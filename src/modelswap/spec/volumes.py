"""The items of ``volumes``: ``SOURCE:TARGET[:OPTIONS]``, as compose's short form has them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
"""What Docker takes as the name of a container, a volume or a network."""
_OPTIONS: Final = frozenset({"ro", "rw", "z", "Z", "nocopy"})
_PROPAGATION: Final = frozenset({"shared", "rshared", "slave", "rslave", "private", "rprivate"})


@dataclass(frozen=True, slots=True)
class Volume:
    """One mount. ``source``: an absolute folder of Docker's machine, or a volume's name; ``options`` may be empty."""

    source: str
    target: str
    options: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder (or file) of Docker's machine, not a volume."""
        return self.source.startswith("/")

    @property
    def read_only(self) -> bool:
        """Whether the container may only read it."""
        return "ro" in self.options

    def __str__(self) -> str:
        return ":".join(part for part in (self.source, self.target, ",".join(self.options)) if part)


def parse(text: str) -> Volume:
    """Read one item of ``volumes``; raises `ValueError` with what is wrong and how to write it."""
    source, colon, rest = text.partition(":")
    target, _, options = rest.partition(":")
    if not colon or not target:
        raise ValueError("wants SOURCE:TARGET, e.g. /srv/models:/models:ro")
    if not target.startswith("/"):
        raise ValueError("its target must be absolute: a path in the container, e.g. /srv/models:/models")
    if source.startswith(("~", ".")):
        raise ValueError("its source must be absolute (Docker knows neither your home nor this file's folder)")
    if not source.startswith("/") and not NAME.fullmatch(source):
        raise ValueError("its source is neither an absolute folder nor a name for a volume")
    given = tuple(options.split(",")) if options else ()
    unknown = [option for option in given if option not in _OPTIONS | _PROPAGATION]
    if unknown or (not options and rest.endswith(":")) or {"ro", "rw"} <= set(given):
        raise ValueError("after its target only ro or rw (and z, Z) may stand")
    return Volume(source, target, given)

"""Our starts, written down: a container is used again and again, and only this tells which start is which instance.

A record is written before its start, and completed after it. If we die in between, the next one of us finds from it
whether the container was started: its ``StartedAt`` is another one then.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from modelswap.engines.base import Address
from modelswap.runtimes.base import Running, StartFailed
from modelswap.runtimes.logfiles import safe_name

_log = structlog.get_logger(__name__)

LOG_MARGIN: Final = 0.1
"""What an engine logs may be stamped a little earlier than its start (Engine 20.10 stamps starts late), in seconds."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One start of a container by us. Times are Docker's, in Unix seconds.

    ``previous`` is when the container had been started before (0: never) and ``before`` when that had ended. ``born``
    is 0 until the start is known to have been done, and ``ended`` until its end is known. ``written`` is by our clock.
    """

    instance: str
    model: str
    definition: str
    container: str
    port: int
    previous: float = 0.0
    before: float = 0.0
    born: float = 0.0
    host: str = ""
    host_port: int = 0
    ended: float = 0.0
    written: float = 0.0
    mechanism: Literal["cold", "standby"] = "cold"

    def running(self) -> Running:
        """Return it as an instance; it must be complete."""
        return Running(
            instance=self.instance,
            model=self.model,
            definition=self.definition,
            address=Address(self.host, self.host_port),
            born=self.born,
            container=self.container,
            mechanism=self.mechanism,
        )

    def completed(self, born: float, address: Address) -> Start:
        """Return it as done, reached at ``address``."""
        return msgspec.structs.replace(self, born=born, host=address.host, host_port=address.port)

    def finished(self, ended: float) -> Start:
        """Return it as over."""
        return msgspec.structs.replace(self, ended=ended)

    @property
    def log_since(self) -> float:
        """From when on its container's log is its own."""
        return max(self.before, self.born - LOG_MARGIN)


class Starts:
    """The records, one small file each; all of them in memory, too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts: dict[str, Start] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                start = msgspec.json.decode(path.read_bytes(), type=Start)
            except (OSError, msgspec.DecodeError) as error:
                _log.warning("a record of a start can't be read", path=str(path), error=str(error))
                continue
            self._starts[start.instance] = start

    def write(self, start: Start) -> None:
        """Write one down; raises `StartFailed` if that can't be done."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self._path(start.instance)
            temporary = path.with_suffix(".new")
            temporary.write_bytes(msgspec.json.encode(start))
            temporary.replace(path)
        except OSError as error:
            raise StartFailed(f"the record of a start can't be written to {self._folder}: {error.strerror}") from error
        self._starts[start.instance] = start

    def note(self, start: Start) -> None:
        """Write down what is known better now; if that fails, it is at least known until we end."""
        self._starts[start.instance] = start
        try:
            self.write(start)
        except StartFailed as error:
            _log.warning("a start is not recorded in full", instance=start.instance, reason=str(error))

    def forget(self, instance: str) -> None:
        """Delete one."""
        self._starts.pop(instance, None)
        with contextlib.suppress(OSError):
            self._path(instance).unlink(missing_ok=True)

    def close(self, living: Collection[str], spared: Collection[str]) -> None:
        """Delete those of starts that were never done, and take those of instances that don't live for over.

        Those of ``spared`` containers, which are being started, stay as they are.
        """
        for start in [start for start in self.all() if start.container not in spared]:
            if not start.born:
                self.forget(start.instance)
            elif not start.ended and start.instance not in living:
                self.note(start.finished(start.born))  # an end that nobody saw is later than any start

    def all(self) -> list[Start]:
        """Return all."""
        return list(self._starts.values())

    def get(self, instance: str) -> Start | None:
        """Return an instance's."""
        return self._starts.get(instance)

    def of_container(self, container: str) -> list[Start]:
        """Return those of one container."""
        return [start for start in self._starts.values() if start.container == container]

    def prune(self, models: Collection[str], spared: Collection[str]) -> None:
        """Delete those of starts that have ended, but the last one of each of ``models``, and ``spared`` instances'."""
        newest = {start.model: start for start in sorted(self.all(), key=lambda start: start.born) if start.born}
        for start in self.all():
            last = start.model in models and newest.get(start.model) is start
            if start.ended and start.instance not in spared and not last:
                self.forget(start.instance)

    def _path(self, instance: str) -> Path:
        return self._folder / f"{safe_name(instance)}.json"


def owner_id(folder: Path) -> str:
    """Return the id that our containers and volumes are labelled with, the same as long as ``folder`` is kept."""
    path = folder / "id"
    with contextlib.suppress(OSError):
        if known := path.read_text().strip():
            return known
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = uuid.uuid4().hex
    temporary = folder / "id.new"
    temporary.write_text(f"{made}\n")
    temporary.replace(path)
    return made

"""Downloading what is missing, in a process of its own: it can be killed, and nothing of it blocks an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from modelswap.runtimes.base import Report
from modelswap.spec.config import Model
from modelswap.weights import cache, local, places, plan, wire
from modelswap.weights.errors import Interrupted, WeightsUnavailable
from modelswap.weights.explain import explain, redacted
from modelswap.weights.plan import Wanted
from modelswap.weights.repo import Repo

STAGE: Final = "downloading weights"
"""What `Report` is told while bytes come."""
ASKING: Final = "asking for weights"
"""…and before it is known how many."""

_FETCHER: Final = "modelswap.weights.fetcher"
_LINE_LIMIT: Final = 1 << 20
_LAST_WORDS: Final = 20
# Nothing but lines of the protocol is to be said, and nothing to be asked of anybody but the hub.
_QUIET: Final = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
}
_PROTOCOL: Final = b"{"
_SAID: Final[msgspec.json.Decoder[wire.Said]] = msgspec.json.Decoder(wire.Said)

Told = Callable[[wire.Progress], None]


class Fetched(msgspec.Struct, frozen=True):
    """What is there now: the folder of the model's own repository, the bytes of all, and those that came just now."""

    path: Path
    total: int
    came: int


class HubWeights:
    """The weights that models load from the Hugging Face hub, as `orchestrator.preparing.Weights`.

    ``cache`` is the folder, as we see it, that is mounted as ``HF_HOME`` into containers (`places.shared_home`); None:
    our own ``HF_HOME``. ``seen`` tells where we see other folders and volumes that containers mount (`places.Seen`).
    ``mounted`` says of a container that somebody else made whether it shares that cache; by default none does.
    """

    def __init__(
        self,
        env: Mapping[str, str] = os.environ,
        cache: places.Cache = None,
        *,
        seen: places.Seen = places.as_on_host,
        mounted: Callable[[Model], bool] = lambda _: False,
    ) -> None:
        self._env = env
        self._cache = cache
        self._seen = seen
        self._mounted = mounted

    def wanted(self, spec: Model) -> bool:
        """Return whether a model's weights are for us to download ahead of its start, be they here already or not."""
        return self._task("", spec) is not None

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        """Download what is missing; see `download`. Does nothing if nothing is wanted."""
        task = self._task(name, spec)
        if task is not None:
            await download(*task, report)

    async def fetch_all(self, name: str, spec: Model, told: Told, *, newer: bool = False) -> Fetched | None:
        """Download what is missing, and return what is there then; None if nothing is wanted. See `fetch_weights`."""
        task = self._task(name, spec)
        return None if task is None else await fetch_weights(*task, told, newer=newer)

    async def present(self, name: str, spec: Model) -> Fetched | None:
        """Return what is there if nothing is missing; None if something is, or nothing is wanted. Asks nobody."""
        task = self._task(name, spec)
        return None if task is None else await asyncio.to_thread(_present, *task)

    async def size(self, name: str, spec: Model) -> int | None:
        """Return how many bytes are there if nothing is missing; None if something is, or nothing is wanted."""
        found = await self.present(name, spec)
        return None if found is None else found.total

    async def folder(self, name: str, spec: Model) -> Path | None:
        """Return the folder that a model is loaded from, as we see it; None if it isn't here, or can't be seen.

        Of processes only what comes from the hub: they see a folder as we do.
        """
        return await asyncio.to_thread(self._folder, name, spec)

    def _folder(self, name: str, spec: Model) -> Path | None:
        if spec.runtime == "managed" and (spec.model or "").startswith("/"):
            return places.behind(spec, spec.model or "", self._seen)
        task = self._task(name, spec)
        # A model that is a folder may have a tokenizer of the hub.
        if task is None or (first := task[0].repos[0]).repo != spec.model:
            return None
        hub = Path(first.folder) if first.folder else places.hub_cache(task[1])
        found = cache.complete(first, hub) or cache.usable(first, hub)
        return None if found is None else found.path

    async def files(self, name: str, spec: Model) -> list[Path]:
        """Return the files that a start of a model loads and that we see, in the order in which they are read."""
        return await asyncio.to_thread(self._files, name, spec)

    def _files(self, name: str, spec: Model) -> list[Path]:
        found = local.files(spec, self._env, seen=self._seen)
        task = self._task(name, spec)
        if task is not None:
            wanted, env = task
            for snapshot in _each(wanted, places.hub_cache(env), _complete_or_usable):
                found += snapshot.files
        return found

    def _task(self, name: str, spec: Model) -> tuple[Wanted, dict[str, str]] | None:
        found = plan.wanted(name, spec, mounted=self._mounted(spec))
        if found is None:
            return None
        env = places.environment(spec, self._env, self._cache, seen=self._seen)
        return None if env is None else (found, env)


async def prepare_weights(
    name: str, spec: Model, report: Report, *, env: Mapping[str, str] = os.environ, cache: places.Cache = None
) -> None:
    """Have a model's weights in the shared cache before its start; does nothing if none are for us to download.

    For whoever prepares models: quick and without network if they are there. ``env`` is our own environment, ``cache``
    the folder that is mounted as ``HF_HOME`` into containers (None: our own ``HF_HOME``); `HubWeights` has more to
    choose. Raises `weights.errors.WeightsUnavailable`, of which `DiskFull` is one; ``code`` tells whether trying again
    may help. Cancelling it kills the download and keeps what came.
    """
    await HubWeights(env, cache).fetch(name, spec, report)


async def download(wanted: Wanted, env: Mapping[str, str], report: Report) -> Path:
    """Have everything that is wanted in the cache, and return the folder of the model's own repository.

    ``env`` is the whole environment of the download (`places.environment`). ``report`` is told `STAGE` and which part
    of the bytes is here. Raises and can be cancelled as `fetch_weights`.
    """

    def told(progress: wire.Progress) -> None:
        report(STAGE, progress.done / progress.total if progress.total else None)

    if (found := await asyncio.to_thread(_present, wanted, env)) is not None:
        return found.path
    report(ASKING, None)
    return (await _fetch(wanted, env, told)).path


async def fetch_weights(wanted: Wanted, env: Mapping[str, str], told: Told, *, newer: bool = False) -> Fetched:
    """Download what is missing of ``wanted``; ``told`` hears how many bytes are here, several times a second.

    What is there wholly is used without asking the hub, unless ``newer``: then a branch that has moved is followed.
    What looks usable is also used when the hub can't be reached. Raises `WeightsUnavailable`. When cancelled the
    download's process is killed; what came is kept, and the next one goes on there.
    """
    if not newer and (found := await asyncio.to_thread(_present, wanted, env)) is not None:
        return found
    return await _fetch(wanted, env, told)


async def _fetch(wanted: Wanted, env: Mapping[str, str], told: Told) -> Fetched:
    ended = await _run(wanted, env, told)
    if isinstance(ended, wire.Done):
        return Fetched(Path(ended.path), ended.total, ended.came)
    if ended.kind in ("unreachable", "offline"):
        # Its cached listing may name files that no engine needs.
        found = await asyncio.to_thread(_gather, wanted, env, cache.usable)
        if found is not None:
            return found
    raise explain(ended, env)


async def _run(wanted: Wanted, env: Mapping[str, str], told: Told) -> wire.Done | wire.Failed:
    job = wire.Job(list(wanted.repos), str(places.hub_cache(env).absolute()))
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            # Modules are not looked for in whatever folder we were started in.
            "-P",
            "-m",
            _FETCHER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**env, **_QUIET},
            limit=_LINE_LIMIT,
            # The terminal's Ctrl-C is ours; it is told by us.
            start_new_session=True,
        )
    except OSError as error:
        raise WeightsUnavailable(f"no process can be started to download weights: {error}") from error
    try:
        return await _converse(process, wanted, job, env, told)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    finally:
        # The end of its input ends it, if nothing else has.
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()


async def _converse(
    process: asyncio.subprocess.Process, wanted: Wanted, job: wire.Job, env: Mapping[str, str], told: Told
) -> wire.Done | wire.Failed:
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("its pipes were asked for")
    last: deque[str] = deque(maxlen=_LAST_WORDS)
    listening = asyncio.create_task(_listen(process.stderr, last))
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            await process.stdin.drain()
        async for line in process.stdout:
            if not line.startswith(_PROTOCOL):
                # It has not come to take its output for itself: a library that can't be imported, say.
                last.append(line.decode(errors="replace").strip())
                continue
            said = _SAID.decode(line)
            if not isinstance(said, wire.Progress):
                return said
            told(said)
        status = await process.wait()
        await listening
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    if status < 0:
        raise Interrupted(
            f"the download of {wanted.repos[0].repo} was ended by signal {-status}; what came is kept, and the next"
            " try goes on there"
        )
    words = redacted(last[-1] if last else f"status {status}", env)
    raise WeightsUnavailable(f"the process that downloads {wanted.repos[0].repo} ended unexpectedly: {words}")


async def _listen(stderr: asyncio.StreamReader, last: deque[str]) -> None:
    while chunk := await stderr.read(_LINE_LIMIT):
        last.extend(line for line in chunk.decode(errors="replace").splitlines() if line.strip())


def _present(wanted: Wanted, env: Mapping[str, str]) -> Fetched | None:
    return _gather(wanted, env, cache.complete)


def _gather(wanted: Wanted, env: Mapping[str, str], look: Callable[[Repo, Path], cache.Found | None]) -> Fetched | None:
    hub = places.hub_cache(env)
    found = list(_each(wanted, hub, look))
    if len(found) < len(wanted.repos):
        return None
    return Fetched(found[0].path, sum(each.size for each in found), 0)


def _each(wanted: Wanted, hub: Path, look: Callable[[Repo, Path], cache.Found | None]) -> Iterator[cache.Found]:
    for repo in wanted.repos:
        found = look(repo, Path(repo.folder) if repo.folder else hub)
        if found is None:
            return
        yield found


def _complete_or_usable(repo: Repo, hub: Path) -> cache.Found | None:
    return cache.complete(repo, hub) or cache.usable(repo, hub)

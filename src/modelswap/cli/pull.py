"""``modelswap pull``: images and weights on demand, ahead of any start."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from modelswap.cli.failure import ExitCode, Failure
from modelswap.cli.pull_screen import Item, Screen, State, summary
from modelswap.cli.settings import load_config
from modelswap.cli.words import size
from modelswap.engines import programs
from modelswap.protocol.errors import ModelswapError
from modelswap.spec.config import Config, Model
from modelswap.weights import plan, wire
from modelswap.weights.download import HubWeights
from modelswap.weights.places import shared_home


def pull(path: Path, names: Sequence[str], *, newer: bool = False) -> ExitCode:
    """Have the images and weights of ``names`` (default: of all models) here, and say what came.

    ``newer`` also asks registries and the hub whether what is here is still the newest. Raises `Failure` for a model
    that isn't configured.
    """
    config = load_config(path)
    models = chosen(config, names)
    told = Console(stderr=True, highlight=False)
    items: list[Item] = []
    interrupted = False
    with Screen(told) as screen:
        try:
            asyncio.run(_pull(config, models, items, screen, newer=newer))
        except (KeyboardInterrupt, asyncio.CancelledError):
            interrupted = True
    Console(highlight=False).print(summary(items))
    failed = [item for item in items if item.state is State.FAILED]
    for item in failed:
        told.print(Text.assemble(("error: ", "bold red"), f"{item.title}: {item.problem}"), soft_wrap=True)
    if interrupted:
        told.print("interrupted; what came is kept, and the same command goes on there", soft_wrap=True)
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED if failed else ExitCode.OK


def chosen(config: Config, names: Sequence[str]) -> list[str]:
    """Return the configured models that ``names`` and aliases mean, all of them for none; raises `Failure`."""
    called = {alias: name for name, model in config.models.items() for alias in (name, *model.aliases, *model.adapters)}
    for name in names:
        if name not in called:
            raise Failure(f"no model is called {name}", f"there are: {', '.join(config.models)}", ExitCode.USAGE)
    return list(dict.fromkeys(called[name] for name in names)) if names else list(config.models)


async def _pull(config: Config, models: Sequence[str], items: list[Item], screen: Screen, *, newer: bool) -> None:
    """Pull one model after the other; the failure of one item doesn't keep the others from coming."""
    with _cancelled_by_sigterm():
        for name in models:
            spec = config.models[name]
            before = len(items)
            if spec.image is not None:
                with _item(items, screen, Item(name, "image", spec.image)) as item:
                    await _image(config, spec, spec.image, item, screen, newer=newer)
            if plan.wanted(name, spec, mounted=True) is not None:
                with _item(items, screen, Item(name, "weights", spec.model or "")) as item:
                    await _weights(config, spec, item, screen, newer=newer)
            elif _fetches_itself(spec):
                with _item(items, screen, Item(name, "weights", spec.model or "")) as item:
                    item.end(State.ELSEWHERE)
            if len(items) == before:
                with _item(items, screen, Item(name, "", "")) as item:
                    item.end(State.NOTHING)


def _fetches_itself(spec: Model) -> bool:
    """Return whether llama.cpp will download the weights when it starts (``-hf``), to a cache of its own."""
    text = spec.model or ""
    if spec.engine != "llamacpp" or not text or text.startswith(("/", "~", ".")) or text.endswith(".gguf"):
        return False
    return spec.runtime == "managed" or (spec.runtime == "process" and programs.local(text, spec) is None)


async def _image(config: Config, spec: Model, ref: str, item: Item, screen: Screen, *, newer: bool) -> None:
    from modelswap.cli.pull_images import have_image

    def report(stage: str, fraction: float | None) -> None:
        screen.update(item, fraction)

    pulled = await have_image(config.docker, ref, spec.pull, report, newer=newer)
    item.end(pulled.state, total=pulled.size)


async def _weights(config: Config, spec: Model, item: Item, screen: Screen, *, newer: bool) -> None:
    ours = True
    if spec.runtime == "adopted":
        from modelswap.cli.pull_images import loads_from_our_cache

        ours = await loads_from_our_cache(config.docker, item.model, spec)

    def told(progress: wire.Progress) -> None:
        fraction = progress.done / progress.total if progress.total else None
        screen.update(item, fraction, f"{size(progress.done)} of {size(progress.total)}")

    weights = HubWeights(cache=shared_home(config.docker), mounted=lambda _: ours)
    fetched = await weights.fetch_all(item.model, spec, told, newer=newer)
    if fetched is None:
        item.end(State.ELSEWHERE)
    else:
        item.end(State.CAME if fetched.came else State.HERE, total=fetched.total, came=fetched.came)


@contextlib.contextmanager
def _item(items: list[Item], screen: Screen, item: Item) -> Iterator[Item]:
    items.append(item)
    screen.begin(item)
    try:
        yield item
    except ModelswapError as error:
        item.end(State.FAILED, problem=str(error))
    except BaseException:
        item.end(State.WORKING)
        raise
    finally:
        screen.end(item)


@contextlib.contextmanager
def _cancelled_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end us as Ctrl-C does, so that nothing is left behind."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - we run in one
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)

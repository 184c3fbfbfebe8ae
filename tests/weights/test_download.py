# ruff: noqa: ASYNC220, ASYNC240 - nothing else runs on these event loops
"""Downloads from a hub of our own: what lands where, what is asked, and how a download ends early."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop
from filelock import FileLock
from huggingface_hub import snapshot_download

from modelswap.spec.config import Model
from modelswap.testing.waiting import until
from modelswap.weights import errors, places
from modelswap.weights.download import STAGE, HubWeights, prepare_weights
from tests.weights.hub import Hub, Repository, serving

LARGE = 9 << 20
NAME = "org/tiny"
SECRET = "hf_this_is_secret"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Serve a small model: two large files and a few small ones."""
    with serving() as hub:
        hub.repositories[NAME] = Repository(
            {
                "README.md": b"# tiny",
                "config.json": b'{"architectures": ["Tiny"]}',
                "model-00001-of-00002.safetensors": os.urandom(LARGE),
                "model-00002-of-00002.safetensors": os.urandom(LARGE),
                "tokenizer.json": b"[]" * 2000,
                "pytorch_model.bin": os.urandom(2000),
            }
        )
        yield hub


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Return an environment whose hub and cache are the test's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}


class Heard(list[tuple[str, float | None]]):
    """A `Report` that keeps what it is told."""

    def __call__(self, stage: str, fraction: float | None) -> None:
        """Take it in."""
        self.append((stage, fraction))

    @property
    def fractions(self) -> list[float]:
        """What was told of the bytes."""
        return [fraction for stage, fraction in self if stage == STAGE and fraction is not None]


def spec(**fields: Any) -> Model:
    """Return a model that loads the repository."""
    return Model(**{"model": NAME, **fields})


def fetchers() -> list[psutil.Process]:
    """Return the downloads that run as our children."""
    found = []
    for child in psutil.Process().children():
        try:
            if "modelswap.weights.fetcher" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


async def prepare(env: dict[str, str], model: Model | None = None, report: Heard | None = None) -> None:
    """Prepare the model."""
    await prepare_weights("m", model or spec(), Heard() if report is None else report, env=env)


async def failure(env: dict[str, str], model: Model | None = None) -> errors.WeightsUnavailable:
    """Return how preparing fails."""
    with pytest.raises(errors.WeightsUnavailable) as raised:
        await prepare(env, model)
    return raised.value


async def begun(env: dict[str, str]) -> Path:
    """Return the folder of blobs once the beginning of a file is there."""
    blobs = Path(env["HF_HOME"], "hub", "models--org--tiny", "blobs")
    await until(lambda: any(part.stat().st_size for part in blobs.glob("*.incomplete")))
    return blobs


async def test_a_download_lands_where_the_library_looks(hub: Hub, env: dict[str, str]) -> None:
    """huggingface_hub finds the snapshot without network, with the right bytes, and progress has risen to 1."""
    heard = Heard()
    await prepare(env, report=heard)
    folder = snapshot_download(
        NAME,
        cache_dir=Path(env["HF_HOME"], "hub"),
        local_files_only=True,
        allow_patterns=["*.safetensors", "*.json"],
    )
    files = hub.repositories[NAME].files
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == {
        name: files[name] for name in files if name not in ("README.md", "pytorch_model.bin")
    }
    assert heard.fractions == sorted(heard.fractions)
    assert heard.fractions[-1] == 1.0


async def test_what_is_there_is_used_without_asking(hub: Hub, env: dict[str, str]) -> None:
    """The second time makes no request and starts no process, and tells what is there."""
    await prepare(env)
    asked, heard = len(hub.asked), Heard()
    await prepare(env, report=heard)
    assert len(hub.asked) == asked
    assert heard == []
    found = await HubWeights(env).present("m", spec())
    assert found is not None
    assert (found.total, found.came) == (sum(len(f) for f in hub.repositories[NAME].files.values()) - 2006, 0)


async def test_an_older_programs_snapshot_is_used_if_it_looks_whole(hub: Hub, env: dict[str, str]) -> None:
    """Without a listing a missing shard is noticed by its name, and fetched alone."""
    await prepare(env)
    folder = Path(env["HF_HOME"], "hub", "models--org--tiny")
    commit = hub.repositories[NAME].commit
    (folder / "trees" / f"{commit}.json").unlink()
    assert await HubWeights(env).present("m", spec()) is not None
    shard = folder / "snapshots" / commit / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()
    assert await HubWeights(env).present("m", spec()) is None
    hub.asked.clear()
    await prepare(env)
    assert [Path(path).name for path in hub.gets()] == [shard.name]


async def test_cancelling_kills_the_download_and_the_next_one_goes_on_there(hub: Hub, env: dict[str, str]) -> None:
    """What came is not fetched again, and the result is right."""
    hub.stall_after = LARGE // 2
    heard = Heard()
    task = asyncio.create_task(prepare(env, report=heard))
    await until(lambda: heard.fractions and heard.fractions[-1] > 0.4)
    (process,) = fetchers()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not process.is_running()
    hub.stall_after = None
    hub.go_on.set()
    hub.sent = 0
    await prepare(env)
    assert 0 < hub.sent < 1.2 * LARGE
    assert len(hub.ranges) == 2
    await test_what_is_there_is_right(hub, env)


async def test_what_is_there_is_right(hub: Hub, env: dict[str, str]) -> None:
    """Every file of the snapshot has the hub's bytes."""
    await prepare(env)
    found = await HubWeights(env).present("m", spec())
    assert found is not None
    for path in found.path.iterdir():
        assert path.read_bytes() == hub.repositories[NAME].files[path.name]


async def test_a_killed_download_is_told_and_can_be_taken_up(hub: Hub, env: dict[str, str]) -> None:
    """Killed by somebody else (out of memory, say): an error that says so, and trying again may help."""
    hub.stall_after = LARGE // 2
    task = asyncio.create_task(failure(env))
    await begun(env)
    fetchers()[0].kill()
    error = await task
    assert isinstance(error, errors.Interrupted)
    assert error.outcome.should_retry is not False
    assert "signal 9" in str(error)
    hub.stall_after = None
    hub.go_on.set()
    await test_what_is_there_is_right(hub, env)
    assert hub.ranges


async def test_a_download_ends_with_whoever_started_it(hub: Hub, env: dict[str, str]) -> None:
    """Nobody is left to download for nobody when the orchestrator is killed."""
    hub.stall_after = 1
    script = (
        "import asyncio\nfrom modelswap.spec.config import Model\n"
        "from modelswap.weights.download import prepare_weights\n"
        f"asyncio.run(prepare_weights('m', Model(model={NAME!r}), lambda *_: None))"
    )
    with subprocess.Popen([sys.executable, "-c", script], env=env) as starter:
        await asyncio.to_thread(hub.stalled.wait)
        (process,) = psutil.Process(starter.pid).children()
        starter.kill()
        await until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


async def test_a_cut_connection_is_taken_up_in_the_middle(hub: Hub, env: dict[str, str]) -> None:
    """A reset in the middle of a file costs nothing that has come."""
    hub.cut_after = LARGE // 2
    await test_what_is_there_is_right(hub, env)
    assert len(hub.ranges) == 1
    assert hub.sent < 2.4 * LARGE


@pytest.mark.parametrize("wrong_by", [-1000, 1000])
async def test_a_file_of_the_wrong_length_is_no_file(hub: Hub, env: dict[str, str], wrong_by: int) -> None:
    """It is told, nothing of it is taken for weights, and the next try mends it."""
    hub.wrong_by = wrong_by
    error = await failure(env)
    assert isinstance(error, errors.Unreachable)
    assert error.outcome.should_retry is not False
    assert "is not what it has" in str(error)
    assert await HubWeights(env).present("m", spec()) is None
    hub.wrong_by = 0
    await test_what_is_there_is_right(hub, env)


async def test_a_damaged_beginning_is_thrown_away(hub: Hub, env: dict[str, str]) -> None:
    """What an earlier download left is checked against the hub's checksum once it is complete."""
    hub.stall_after = LARGE // 2
    task = asyncio.create_task(failure(env))
    blobs = await begun(env)
    fetchers()[0].kill()
    await task
    hub.stall_after = None
    hub.go_on.set()
    damaged = next(part for part in blobs.glob("*.incomplete") if part.stat().st_size)
    damaged.write_bytes(b"?" * damaged.stat().st_size)
    assert "checksum" in str(await failure(env))
    await prepare(env)
    await test_what_is_there_is_right(hub, env)


async def test_the_token_goes_to_the_hub_alone(hub: Hub, env: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """Every request has it; no command line, log, message or file has."""
    hub.repositories[NAME].token = SECRET
    hub.stall_after = 1
    heard = Heard()
    task = asyncio.create_task(prepare(env, spec(env={"HF_TOKEN": SECRET}), heard))
    await asyncio.to_thread(hub.stalled.wait)
    lines = [argument for process in fetchers() for argument in process.cmdline()]
    hub.go_on.set()
    await task
    assert lines
    assert not any(SECRET in text for text in [*lines, caplog.text, str(heard)])
    assert hub.tokens == {SECRET}
    small = [path for path in Path(env["HF_HOME"]).rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
    assert not [path for path in small if SECRET.encode() in path.read_bytes()]


async def test_a_models_own_token_goes_first(hub: Hub, env: dict[str, str]) -> None:
    """Also one in its arguments; the message about a wrong one doesn't tell it."""
    hub.repositories[NAME].refused = (403, "Forbidden")
    error = await failure(env | {"HF_TOKEN": "hf_ours"}, spec(args=["--hf-token", SECRET]))
    assert hub.tokens == {SECRET}
    assert isinstance(error, errors.Unauthorized)
    assert SECRET not in str(error)


@pytest.mark.parametrize("where", ["refused", "refused_files"])
async def test_a_gated_model_is_told_with_its_remedy(hub: Hub, env: dict[str, str], where: str) -> None:
    """Be it that the listing is closed or only the files are."""
    setattr(hub.repositories[NAME], where, (403, "GatedRepo"))
    error = await failure(env)
    assert isinstance(error, errors.Gated)
    assert error.outcome.should_retry is False
    assert f"the licence of {NAME} must be accepted first" in str(error)
    assert "HF_TOKEN" in str(error)


@pytest.mark.parametrize(
    ("model", "kind", "told"),
    [
        (Model(model="org/none"), errors.NotFound, "has no model org/none; mend 'model', or it is private"),
        (Model(model="org/none", env={"HF_TOKEN": SECRET}), errors.NotFound, "the token that was sent may not see it"),
        (spec(args=["--revision", "v9"]), errors.NotFound, "org/tiny has no revision 'v9'"),
        (
            spec(args=["--load-format", "pt"]),
            errors.NotFound,
            "no weights of the kind that its engine loads (it has .bin, ",
        ),
        (spec(env={"HF_HUB_OFFLINE": "1"}), errors.Offline, "HF_HUB_OFFLINE forbids"),
        (spec(env={"HF_ENDPOINT": "http://127.0.0.1:9"}), errors.Unreachable, "127.0.0.1:9 can't be reached"),
    ],
)
async def test_failures_say_what_is_wrong(
    hub: Hub, env: dict[str, str], model: Model, kind: type[errors.WeightsUnavailable], told: str
) -> None:
    """Each with its own error and remedy; only an unreachable hub is worth another try."""
    error = await failure(env, model)
    assert type(error) is kind
    assert told in str(error)
    assert SECRET not in str(error)
    assert (error.outcome.should_retry is False) == (kind is not errors.Unreachable)


async def test_a_password_in_the_hubs_address_is_not_told(hub: Hub, env: dict[str, str]) -> None:
    """Nor the address as the library repeats it."""
    hub.repositories[NAME].refused = (418, "a teapot")
    error = await failure(env | {"HF_ENDPOINT": hub.url.replace("://", "://me:s3cret-word@")})
    assert "refuses to give" in str(error) and "s3cret-word" not in str(error)


async def test_an_address_that_is_none_is_told(env: dict[str, str]) -> None:
    """The library itself can't be imported with it."""
    error = await failure(env | {"HF_ENDPOINT": "http://[::1"})
    assert "Invalid IPv6 URL" in str(error)


@pytest.mark.parametrize(("status", "kind"), [(401, errors.Unauthorized), (503, errors.Unreachable)])
async def test_a_wrong_token_and_a_hub_that_is_down(
    hub: Hub, env: dict[str, str], status: int, kind: type[errors.WeightsUnavailable]
) -> None:
    """The hub answers, and can't or won't help."""
    hub.repositories[NAME].refused = (status, "Invalid credentials in Authorization header")
    assert type(await failure(env, spec(env={"HF_TOKEN": SECRET}))) is kind


async def test_being_offline_doesnt_matter_if_an_engine_could_start(hub: Hub, env: dict[str, str]) -> None:
    """A snapshot with weights and configuration is used, though the listing names a small file more."""
    await prepare(env)
    found = await HubWeights(env).present("m", spec())
    assert found is not None
    (found.path / "tokenizer.json").unlink()
    assert await HubWeights(env).present("m", spec()) is None
    await prepare(env, spec(env={"HF_HUB_OFFLINE": "1"}))


async def test_a_branch_that_has_moved_is_followed_when_asked_to(hub: Hub, env: dict[str, str]) -> None:
    """Only what changed is fetched; without being asked nothing is."""
    await prepare(env)
    repository = hub.repositories[NAME]
    repository.commit = "d00d" + "0" * 36
    repository.files["config.json"] = b'{"architectures": ["Tinier"]}'
    hub.asked.clear()
    await prepare(env)
    assert not hub.asked
    fetched = await HubWeights(env).fetch_all("m", spec(), lambda _: None, newer=True)
    assert fetched is not None
    assert fetched.came == len(repository.files["config.json"])
    assert [Path(path).name for path in hub.gets()] == ["config.json"]
    await test_what_is_there_is_right(hub, env)


async def test_nothing_wanted_is_nothing_done(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    """Other engines and local folders are left alone."""
    for model in (Model(model=str(tmp_path)), Model(engine="llamacpp", model="org/x"), spec(container="x")):
        heard = Heard()
        await prepare(env, model, heard)
        assert not HubWeights(env).wanted(model)
        assert not heard
    assert not hub.asked


async def test_a_shared_cache_takes_the_place_of_ours(hub: Hub, env: dict[str, str], tmp_path: Path) -> None:
    """For containers: the folder that is mounted there."""
    shared = tmp_path / "shared"
    await prepare_weights("m", spec(image="vllm"), Heard(), env=env, cache=shared)
    assert (shared / "hub" / "models--org--tiny" / "snapshots").is_dir()
    assert not Path(env["HF_HOME"]).exists()


def test_it_is_the_same_on_the_services_event_loop(hub: Hub, env: dict[str, str]) -> None:
    """uvloop has its own way with processes: cancelling kills there, too, and a download comes to its end."""

    async def go() -> None:
        hub.stall_after = LARGE // 2
        task = asyncio.create_task(prepare(env))
        await begun(env)
        (process,) = fetchers()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not process.is_running()
        hub.stall_after = None
        hub.go_on.set()
        await prepare(env)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(go())
    assert len(hub.ranges) >= 1


def leftover(env: dict[str, str], name: str, *, age: float) -> Path:
    """Make what a killed download by the library leaves behind."""
    path = Path(env["HF_HOME"], "hub", "models--org--tiny", "blobs", f"{name}.0123abcd.incomplete")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


async def test_what_can_never_be_taken_up_is_cleared_away(hub: Hub, env: dict[str, str]) -> None:
    """The library's own unfinished files, once they are old and nobody holds their lock."""
    old, young = leftover(env, "old", age=120), leftover(env, "young", age=1)
    held = leftover(env, "held", age=120)
    lock = Path(env["HF_HOME"], "hub", ".locks", "models--org--tiny", "held.lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        await prepare(env)
    assert [path.exists() for path in (old, young, held)] == [False, True, True]


async def test_the_files_of_a_download_are_told_where_the_engine_looks(hub: Hub, env: dict[str, str]) -> None:
    """Those that are loaded, as paths that lead to them; of what isn't all here yet, none."""
    assert await HubWeights(env).files("m", spec()) == []
    await prepare(env)
    files = await HubWeights(env).files("m", spec())
    assert [file.name for file in files] == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
    ]
    assert all(file.is_file() for file in files)
    assert await HubWeights(env, places.Unseen.CACHE).files("m", spec(image="vllm")) == []


async def test_files_that_an_older_program_downloaded_are_told(hub: Hub, env: dict[str, str]) -> None:
    """It has left no listing of what belongs to them."""
    await prepare(env)
    for listing in Path(env["HF_HOME"], "hub", "models--org--tiny", "trees").iterdir():
        listing.unlink()
    assert len(await HubWeights(env).files("m", spec())) == 4

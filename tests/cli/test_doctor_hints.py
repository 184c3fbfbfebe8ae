"""The doctor on what would make starts quicker: said once for all models that it holds for, never of what is chosen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelswap.cli.doctor import hints, reading
from modelswap.cli.doctor.finding import Finding, Level
from modelswap.cli.doctor.mechanisms import SAY_SLEEP, Verdict, Way
from modelswap.cli.doctor.subjects import Kept, Subject, Subjects
from modelswap.spec.config import Model
from tests.cli.doctoring import GIB

USED, NO = Way(Verdict.USED, levels=(1,)), Way(Verdict.SETTLED, "it has none")
WILLING = Way(Verdict.MISSED, "it is started without it", SAY_SLEEP, common=True)
DISKS = [("/", "ext4"), ("/net", "cifs"), ("/nfs", "nfs4"), ("/s3", "fuse.s3fs"), ("/win", "fuseblk")]


def subject(
    *args: str,
    name: str = "a",
    weights: tuple[Kept, ...] = (),
    sleep: Way = NO,
    cold: float | None = 1.0,
    cpu: bool = False,
    **model: object,
) -> Subject:
    """Return a vLLM model in an image, if nothing else is said, with these arguments."""
    spec = Model.model_validate({"model": "org/m", "image": "i", "args": list(args), **model})
    rows = [{"mechanism": "cold", "steady_seconds": cold, "first_seconds": None}]
    return Subject(
        name=name,
        model=spec,
        standby=NO,
        sleep=sleep,
        args=spec.args,
        env=spec.env,
        rows=rows,
        weights=weights,
        cpu=cpu,
    )


def together(*models: Subject, room: int = 64, total: int = 64, readable: bool = True) -> Subjects:
    """Return subjects on a host with so many GiB."""
    return Subjects(models=models, room=room * GIB, total=total * GIB, readable=readable)


def kept(size: float, place: str | None = None) -> tuple[Kept, ...]:
    """Return weights of so many GiB."""
    return (Kept(int(size * GIB), Path(place) if place else None),)


def only(found: object) -> Finding:
    """Return the one finding, which is a note with a remedy."""
    (finding,) = list(found)  # type: ignore[call-overload]
    assert isinstance(finding, Finding)
    assert finding.level is Level.NOTE and finding.remedy
    return finding


@pytest.mark.parametrize(
    "chosen",
    [
        "--enforce-eager",
        "--enforce_eager",
        "-cc.cudagraph_mode=NONE",
        "--compilation-config={}",
        "--cudagraph-capture-sizes",
        "--max-cudagraph-capture-size=8",
        "-O1",
        "--optimization-level",
    ],
)
def test_cuda_graphs_are_left_to_who_has_chosen(chosen: str) -> None:
    """Nobody is told again what they have said; the others are told together."""
    assert only(hints.graphs([subject(), subject(name="b"), subject(chosen, name="c")])).message.endswith(": a, b")
    assert list(hints.graphs([subject(chosen), subject(engine="custom")])) == []


@pytest.mark.parametrize("chosen", ["--disable-cuda-graph", "--cuda-graph-max-bs", "--cuda-graph-max-bs-decode"])
def test_sglang_has_options_of_its_own_for_graphs(chosen: str) -> None:
    """They are named for it alone."""
    assert "--disable-cuda-graph" in str(only(hints.graphs([subject(engine="sglang")])).remedy)
    assert list(hints.graphs([subject(chosen, engine="sglang")])) == []


def test_the_size_of_the_kv_cache_is_measured_unless_it_is_given() -> None:
    """By an argument, or by the variable that has it remembered."""
    told = only(hints.cache_size([subject(), subject(engine="sglang", name="s")]))
    assert told.message.endswith(": a") and "VLLM_ENABLE_STARTUP_PLAN=1" in str(told.remedy)
    assert list(hints.cache_size([subject("--kv-cache-memory-bytes=9"), subject("--kv_cache_memory", "9")])) == []
    assert list(hints.cache_size([subject(env={"VLLM_ENABLE_STARTUP_PLAN": "0"})])) == []


def test_large_weights_may_be_read_by_several_threads() -> None:
    """Not small or unknown ones, not GGUF, not what is loaded in a format that somebody has chosen."""
    told = only(hints.load_format([subject(weights=kept(14))]))
    assert told.message.endswith("a (14.0 GiB)") and "vllm[runai]" in str(told.remedy)
    others = [
        subject(weights=kept(1)),
        subject(),
        subject(weights=kept(14), model="org/m/q4.gguf"),
        subject("--load-format", "auto", weights=kept(14)),
        subject(weights=kept(14), engine="sglang"),
    ]
    assert list(hints.load_format(others)) == []


def test_weights_on_a_network_disk_may_be_read_ahead() -> None:
    """Except where vLLM does it by itself, and where somebody has chosen."""
    slow = [subject(weights=kept(1, "/net/m")), subject(name="b", weights=kept(1, "/s3/m"))]
    told = only(hints.prefetch(slow, DISKS))
    assert told.message.endswith("a (cifs), b (fuse.s3fs)")
    assert "--safetensors-load-strategy prefetch" in str(told.remedy)
    sglang = only(hints.prefetch([subject(engine="sglang", weights=kept(1, "/net/m"))], DISKS))
    assert "--weight-loader-prefetch-checkpoints" in str(sglang.remedy)
    others = [
        subject(weights=kept(1, "/nfs/m")),
        subject(weights=kept(1, "/win/m")),
        subject(weights=kept(1, "/home/m")),
        subject(weights=kept(1)),
        subject("--safetensors-load-strategy", "lazy", weights=kept(1, "/net/m")),
    ]
    assert list(hints.prefetch(others, DISKS)) == []


def test_time_to_finish_must_be_within_the_time_until_the_kill() -> None:
    """With a margin for the workers to end; without the option nothing is waited for."""
    told = only(hints.short_grace([subject("--shutdown-timeout", "60")]))
    assert "60 s to finish requests (--shutdown-timeout), and is killed after 15 s" in told.message
    assert told.remedy == "say models.a.stop_grace: 65"
    others = [subject(), subject("--shutdown-timeout", "0"), subject("--shutdown-timeout=60", stop_grace=65.0)]
    assert list(hints.short_grace(others)) == []


def test_who_could_sleep_and_what_that_takes() -> None:
    """With its weights' size, if that is known; at level 2 where host memory is short; not where nothing fits."""
    models = [
        subject(name="a", sleep=WILLING, weights=kept(14)),
        subject(name="b", sleep=WILLING),
        subject(name="c", sleep=WILLING, weights=kept(60)),
        subject("--enable-lora", name="d", sleep=WILLING, weights=kept(60)),
        subject(name="e"),
        subject(name="f", sleep=USED),
    ]
    told = only(hints.could_sleep(together(*models)))
    assert told.message.endswith(": a (23.0 GiB), b, c (level 2: its weights are read again)")
    assert str(told.remedy).startswith("say sleep: on;") and "of 64.0 GiB that may be spent" in str(told.remedy)
    assert list(hints.could_sleep(together(*models[3:]))) == []


def test_weights_that_dont_stay_in_host_memory_cost_a_read_at_each_swap() -> None:
    """Those that models share count once; the time is the disk's as measured, else of usual ones."""
    alike = [subject(name=name, weights=kept(40, "/w/m")) for name in "ab"]
    assert not hints.overflows(together(*alike))
    assert not hints.overflows(together(subject(weights=kept(90))))
    both = together(*alike, subject(name="c", weights=kept(30, "/w/n")))
    assert hints.overflows(both)
    told = hints.page_cache(both, 2.0 * GIB)
    assert told.message.startswith("the weights here (70.0 GiB) don't fit in host memory (64.0 GiB)")
    assert told.message.endswith("up to 40.0 GiB, 20.0 s at 2.0 GiB/s as measured now")
    assert "(85.9 s at 500 MB/s, 8.59 s at 5 GB/s)" in hints.page_cache(both, None).message


async def test_hints_about_starts_are_for_who_starts() -> None:
    """Not for models that are woken, or that run on a CPU, or where there is no GPU to be seen."""
    starts = subject(weights=kept(14))
    assert len(await hints.of(together(starts))) == 3
    assert await hints.of(together(starts, readable=False)) == []
    assert await hints.of(together(subject(weights=kept(14), cpu=True))) == []
    woken = subject(weights=kept(14), sleep=USED)
    (told,) = await hints.of(together(woken))
    assert told.message.startswith("not measured yet: a")


async def test_the_disk_is_measured_where_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then is anything read."""
    read: list[Path] = []

    def speed(place: Path) -> float:
        read.append(place)
        return 1.0 * GIB

    monkeypatch.setattr(reading, "speed", speed)
    await hints.of(together(subject("-O0", weights=kept(10, str(tmp_path)))))
    assert read == []
    told = await hints.of(together(subject("--enforce-eager", weights=kept(90, str(tmp_path)))))
    assert read == [tmp_path] and any("90.0 s at 1.0 GiB/s" in each.message for each in told)


def test_a_disks_speed_is_that_of_its_largest_file(tmp_path: Path) -> None:
    """Something is read, or nothing is known: no file, a small one, a file system without such reads."""
    assert reading.speed(tmp_path) is None
    (tmp_path / "small").write_bytes(b"x")
    assert reading.speed(tmp_path) is None
    (tmp_path / "large").write_bytes(os.urandom(9 << 20))
    for place in (tmp_path, tmp_path / "large"):
        rate = reading.speed(place)
        assert rate is None or rate > 1 << 20


def test_a_disk_without_such_reads_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while opening or reading is no news."""
    (tmp_path / "large").write_bytes(bytes(9 << 20))

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    assert reading.speed(tmp_path) is None
    monkeypatch.setattr(os, "open", refuse)
    assert reading.speed(tmp_path) is None

"""What the end of an instance means, of a process and of a container."""

from __future__ import annotations

import pytest

from modelswap.engines.base import Address, Diagnosis
from modelswap.orchestrator.endings import death, exit_code, failed_start
from modelswap.orchestrator.hosting import Hosted
from modelswap.runtimes.base import Exit, Running
from tests.orchestrator.fakes import FakeEngine, config

OVER = "its container reached its memory limit and was killed; give it more memory"


def hosted(container: str = "") -> Hosted:
    """Return an instance that ran."""
    running = Running(instance="a.1", model="a", definition="d", address=Address("127.0.0.1", 1), container=container)
    return Hosted(
        instance="a.1", model="a", definition="d", spec=config().models["a"], engine=FakeEngine(), running=running
    )


@pytest.mark.parametrize(
    ("container", "exit_", "code", "outside"),
    [
        ("", Exit(-9), -9, True),
        ("", Exit(-15), -15, False),
        ("", Exit(137), 137, False),
        ("", Exit(None), None, False),
        ("c0ffee", Exit(137), -9, True),
        ("c0ffee", Exit(143), -15, True),
        ("c0ffee", Exit(139), -11, False),
        ("c0ffee", Exit(-9), -9, True),
        ("c0ffee", Exit(-15), -15, True),
        ("c0ffee", Exit(137, oom=True), -9, False),
        ("", Exit(0), 0, False),
        ("c0ffee", Exit(0), 0, True),
        ("c0ffee", Exit(128), 128, False),
        ("c0ffee", Exit(255), 255, False),
        ("c0ffee", Exit(None), None, False),
    ],
)
def test_a_containers_status_tells_the_signal(container: str, exit_: Exit, code: int | None, outside: bool) -> None:
    """128 + n is signal n; SIGKILL and `docker stop` come from outside, the memory limit's SIGKILL doesn't.

    Engines that end in order when `docker stop` asks them to, have the status 0.
    """
    assert exit_code(hosted(container), exit_) == code
    assert failed_start(hosted(container), exit_, Diagnosis("it ended", False)).blameless is outside


@pytest.mark.parametrize(
    ("container", "exit_", "said"),
    [
        ("", Exit(3), "a died: its engine exited with status 3"),
        ("", Exit(-9), "a died: its engine killed by signal 9"),
        ("c0ffee", Exit(0), "a was stopped from outside (exit status 0), as by `docker stop`"),
        ("c0ffee", Exit(143), "a was stopped from outside (exit status 143), as by `docker stop`"),
        (
            "c0ffee",
            Exit(137),
            "a was killed from outside (exit status 137), as by `docker kill` or for want of host memory",
        ),
        (
            "c0ffee",
            Exit(137, oom=True),
            "a died: its engine was killed: its container reached its memory limit (exit status 137)",
        ),
        ("c0ffee", Exit(-15), "a was stopped from outside (exit status 143), as by `docker stop`"),
        ("c0ffee", Exit(139), "a died: its engine killed by signal 11 (exit status 139)"),
        ("c0ffee", Exit(1), "a died: its engine exited with status 1"),
        ("c0ffee", Exit(None), "a died: its engine ended"),
    ],
)
def test_a_death_is_told_with_who_brought_it_about(container: str, exit_: Exit, said: str) -> None:
    """A manual stop is no crash, and a memory limit has a remedy of its own."""
    assert death(hosted(container), exit_) == said


@pytest.mark.parametrize(
    ("container", "exit_", "found", "said", "permanent"),
    [
        ("", Exit(3), Diagnosis("no such file", True), "a failed to start: no such file", True),
        ("c0ffee", Exit(3), Diagnosis("no such file", True), "a failed to start: no such file (exit status 3)", True),
        ("c0ffee", Exit(3), Diagnosis("it exited with status 3", False), "a failed to start: it exited with status 3",
         False),
        (
            "c0ffee",
            Exit(137, oom=True),
            Diagnosis("it was killed", True),
            f"a failed to start: {OVER} (it was killed) (exit status 137)",
            False,
        ),
        ("c0ffee", Exit(None), Diagnosis("it ended", False), "a failed to start: it ended", False),
        ("c0ffee", Exit(-11), Diagnosis("it broke", False), "a failed to start: it broke (exit status 139)", False),
    ],
)  # fmt: skip
def test_a_failed_start_is_told_with_its_containers_status(
    container: str, exit_: Exit, found: Diagnosis, said: str, permanent: bool
) -> None:
    """What the log shows comes first; the status and the memory limit are never left out."""
    assert failed_start(hosted(container), exit_, found) == Diagnosis(said, permanent)

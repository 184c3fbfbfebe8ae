"""``modelswap doctor``: how checks run and findings are told; what is wrong with files, ports and the config."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import modelswap
from modelswap.cli import addresses
from modelswap.cli.doctor import command as doctor_command
from modelswap.cli.doctor import configured, files, printing, services
from modelswap.cli.doctor.finding import Finding, Level, fine, note, problem, warning
from modelswap.cli.doctor.run import Check, Report, examine
from modelswap.cli.doctor.scene import Scene, ToldElsewhere, in_thread
from modelswap.spec.config import Config
from modelswap.spec.load import load
from tests.cli.doctoring import config, levels, one, scene
from tests.ports import free_port

Run = Callable[..., Any]
OK, NOTE, WARNING, PROBLEM = Level.OK, Level.NOTE, Level.WARNING, Level.PROBLEM


def giving(*findings: Finding) -> Callable[[Scene], Any]:
    """Return a check that finds these."""

    async def look(_: Scene) -> list[Finding]:
        return list(findings)

    return look


async def test_checks_run_side_by_side_and_report_in_order() -> None:
    """Each waits for the other to have begun: one after another, they would wait for ever."""
    begun = [asyncio.Event(), asyncio.Event()]

    def meeting(mine: int) -> Callable[[Scene], Any]:
        async def look(_: Scene) -> list[Finding]:
            begun[mine].set()
            await begun[1 - mine].wait()
            return [fine(f"check {mine}")]

        return look

    report = await examine(
        scene(), [Check("A", "one", meeting(0)), Check("B", "x", giving(note("n"))), Check("A", "two", meeting(1))]
    )
    assert {group: [found.message for found in findings] for group, findings in report.groups.items()} == {
        "A": ["check 0", "check 1"],
        "B": ["n"],
    }
    assert not report.hung


async def test_a_check_that_breaks_or_hangs_hurts_no_other() -> None:
    """Its own failure becomes a finding; what another check tells is left out; a hang is reported as one."""

    async def breaks(_: Scene) -> list[Finding]:
        raise ZeroDivisionError("oops")

    async def hangs(_: Scene) -> list[Finding]:
        await asyncio.Event().wait()
        return []

    async def told(_: Scene) -> list[Finding]:
        raise ToldElsewhere

    report = await examine(
        scene(),
        [
            Check("A", "the moon", breaks),
            Check("A", "the sun", hangs, limit=0.01),
            Check("B", "stars", told),
            Check("C", "fine", giving(fine("good"))),
        ],
    )
    assert list(report.groups) == ["A", "C"] and report.hung
    broken, hung = report.groups["A"]
    assert (broken.level, broken.message) == (WARNING, "the moon could not be looked at: ZeroDivisionError: oops")
    assert (hung.level, hung.message) == (WARNING, "the sun: no answer within 0.01 s")


async def test_everything_is_looked_up_once_and_one_limit_doesnt_end_it_for_others() -> None:
    """A check that gives up leaves the look-up to the next one that waits for it."""
    looked: list[int] = []
    seen, go = scene(), asyncio.Event()

    async def look() -> str:
        looked.append(1)
        await go.wait()
        return "found"

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(seen.once("x", look), 0.01)
    go.set()
    assert await seen.once("x", look) == await seen.once("x", look) == "found"
    assert looked == [1]
    await seen.aclose()


async def test_what_blocks_for_ever_keeps_nobody() -> None:
    """A thread that hangs in the kernel is left behind; errors come through."""
    stuck = threading.Event()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(in_thread(stuck.wait), 0.01)
    stuck.set()
    with pytest.raises(FileNotFoundError):
        await in_thread(Path("/no/such").read_text)
    assert await in_thread(lambda: 3) == 3


REPORT = Report(
    {
        "Docker": [fine("it answers"), problem("no GPU\nat all", "buy one")],
        "Room": [warning("little", "more\nof it"), note("so it is")],
    }
)


def test_findings_are_printed_in_groups_with_their_remedies() -> None:
    """Symbols and arrows where the terminal can show them, no colour where it isn't one."""
    out = io.StringIO()
    printing.show(REPORT, Console(file=out, highlight=False, width=40))
    assert out.getvalue() == (
        "Docker\n  ✓ it answers\n  ✗ no GPU\n    at all\n    → buy one\n\n"
        "Room\n  ! little\n    → more\n      of it\n  · so it is\n\n"
        "1 problem, 1 warning, 1 note, 1 fine\n"
    )


def test_a_plain_terminal_gets_plain_symbols() -> None:
    """Where the encoding has no arrows there are none."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    printing.show(REPORT, Console(file=out, highlight=False))
    out.flush()
    assert b"  x no GPU" in raw.getvalue() and b"    -> buy one" in raw.getvalue()


def test_a_terminal_gets_colours() -> None:
    """Problems are red there."""
    out = io.StringIO()
    printing.show(REPORT, Console(file=out, highlight=False, force_terminal=True, color_system="standard"))
    assert "\x1b[1;31m✗" in out.getvalue()


def test_findings_as_json() -> None:
    """Programs get every field, the counts, and whether all is well."""
    told = json.loads(printing.as_json(REPORT))
    assert told["ok"] is False and told["counts"] == {"ok": 1, "note": 1, "warning": 1, "problem": 1}
    assert told["findings"][1] == {
        "group": "Docker",
        "level": "problem",
        "message": "no GPU\nat all",
        "remedy": "buy one",
    }


# The command


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a config file whose models need neither Docker nor a GPU, with its own folders and ports."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "m.yaml"
    ports = free_port(), free_port()
    path.write_text(
        f"models: {{a: {{engine: custom, command: [{sys.executable}, '{{port}}'], device: none}}}}\n"
        f"gateway: {{port: {ports[0]}}}\norchestrator: {{port: {ports[1]}}}\ndevice: {{kind: slot}}\n"
    )
    return path


def test_the_command_finds_a_right_machine_right(command: Run, file: Path) -> None:
    """Every check runs for real; nothing is a problem, and the end is 0."""
    ran = command("doctor", "-c", str(file))
    assert ran.code == 0, ran.out
    assert f"✓ {file} is valid: 1 model" in ran.out and "· not looked at: no model needs it" in ran.out
    assert ran.out.splitlines()[-1].endswith(" fine") and "\x1b" not in ran.out


def test_the_command_tells_programs(command: Run, file: Path) -> None:
    """``--json`` is all of it, and nothing else."""
    told = json.loads(command("doctor", "-c", str(file), "--json").out)
    assert told["ok"] is True
    assert {"Config", "Services", "GPU", "Docker", "Room"} <= {found["group"] for found in told["findings"]}


def test_a_problem_ends_the_command_with_1(command: Run, file: Path) -> None:
    """A config file that can't be used is a finding among the others."""
    file.write_text("models:\n  a: {engin: vllm}\n")
    ran = command("doctor", "-c", str(file))
    assert ran.code == 1
    assert f"✗ {file}:2: models.a" in ran.out and "did you mean 'engine'" in ran.out and "host memory" in ran.out


def test_without_a_config_file_the_machine_is_looked_at(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first config file the doctor can be asked already."""
    monkeypatch.chdir(tmp_path)
    ran = command("doctor")
    assert "· there is no modelswap.yaml" in ran.out and "host memory" in ran.out


@pytest.mark.parametrize("name", ["none.yaml", "n" * 300])
def test_a_config_file_that_was_named_must_be_there(command: Run, tmp_path: Path, name: str) -> None:
    """A mistyped name is a problem, not a machine without models."""
    ran = command("doctor", "-c", str(tmp_path / name))
    assert ran.code == 1 and f"✗ {tmp_path / name}: " in ran.out and "host memory" in ran.out


def test_a_hang_ends_the_process(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Python would wait for ever for a thread that hangs in a driver, so the process is left."""
    left: list[int] = []

    async def hangs(_: Scene) -> list[Finding]:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(doctor_command, "CHECKS", (Check("A", "the driver", hangs, limit=0.01),))
    doctor_command.doctor(file, default=file, as_json=True, deep=False, leave=left.append)
    assert left == [0] and "the driver: no answer" in capsys.readouterr().out


# Config


async def test_the_configs_warnings_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `modelswap check` warns of is told with its remedy."""
    monkeypatch.setattr("modelswap.cli.check._IN_A_CONTAINER", tmp_path / "none")
    findings = await configured.usable(scene("a: {engine: custom, command: [/no/such, '{port}']}"))
    assert levels(findings) == [OK, WARNING]
    assert (findings[1].message, findings[1].remedy) == (
        "models.a: there is no program /no/such",
        "mend its path, or install it",
    )


async def test_a_config_that_is_wrong_or_missing() -> None:
    """The one is a problem, the other a note with the way to begin."""
    (found,) = await configured.usable(scene(config_error="m.yaml:1: wrong"))
    assert (found.level, found.message) == (PROBLEM, "m.yaml:1: wrong")
    (found,) = await configured.usable(scene(config=Config(models={})))
    assert found.level is NOTE and found.remedy == "python -m modelswap.spec.example > m.yaml"


SECRET = "a: {engine: custom, command: [x], api_key: s3cret-s3cret, env: {HF_TOKEN: hf_12345678, DEBUG: hf_12345678}}"


@pytest.mark.parametrize(
    ("mode", "text", "level"),
    [(0o600, SECRET, OK), (0o644, SECRET, WARNING), (0o640, SECRET, WARNING), (0o644, "a: {api_key: ${K}}", OK)],
)
def test_secrets_in_a_file_that_others_read(tmp_path: Path, mode: int, text: str, level: Level) -> None:
    """Keys and tokens that stand in the file need its owner's eyes only; those from the environment don't."""
    path = tmp_path / "m.yaml"
    path.write_text(text)
    path.chmod(mode)
    (found,) = files.of_config_file(path, config(SECRET))
    assert found.level is level and "s3cret" not in found.message
    if level is WARNING:
        assert "(models.a.api_key, models.a.env.HF_TOKEN)" in found.message
        assert found.remedy is not None and found.remedy.startswith(f"chmod 600 {path}")


async def test_a_config_that_cant_be_read_is_told_once(tmp_path: Path) -> None:
    """Its permissions are no second finding."""
    with pytest.raises(ToldElsewhere):
        await files.config_file(scene(config_error="wrong", path=tmp_path))


def test_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, right, open to others, with an open token, of another user, no folder: each is told."""
    folder = tmp_path / "a" / "state"
    assert "will be made" in one(files.of_state(folder), "state folder").message
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    token = folder / "token"
    token.write_text("t")
    token.chmod(0o600)
    assert levels(files.of_state(folder)) == [OK]
    token.chmod(0o640)
    (found,) = files.of_state(folder)
    assert found.level is WARNING and found.remedy is not None and f"chmod 600 {token}" in found.remedy
    token.chmod(0o600)
    folder.chmod(0o750)
    (found,) = files.of_state(folder)
    assert (found.level, found.remedy) == (WARNING, f"chmod 700 {folder}")
    assert levels(files.of_state(folder, inside=True)) == [OK]
    folder.chmod(0o700)
    monkeypatch.setattr("os.geteuid", lambda: 4242)
    assert levels(files.of_state(folder, inside=True)) == [OK]
    (found,) = files.of_state(folder)
    assert found.level is PROBLEM and "we are uid 4242" in found.message
    monkeypatch.setattr("os.access", lambda *_: False)
    assert levels(files.of_state(tmp_path / "none")) == [PROBLEM]
    assert levels(files.of_state(token)) == [PROBLEM]


# Services

STATUS = {"version": modelswap.__version__, "current_model": "a", "gateways": [{"id": "g"}], "problems": []}


async def test_no_orchestrator_is_worth_a_note() -> None:
    """The doctor is asked before the first start, too."""
    assert levels(await services.running(scene())) == [NOTE]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [OK]),
        ({"version": "0.0.1"}, [OK, WARNING]),
        ({"gateways": []}, [OK, WARNING]),
        ({"problems": ["disk full"], "warnings": [{"message": "old"}]}, [OK, PROBLEM, WARNING]),
    ],
)
async def test_what_a_running_orchestrator_says(change: dict[str, Any], expected: list[Level]) -> None:
    """Another version, no gateway, and its own problems and warnings are findings."""
    assert levels(await services.running(scene(status={**STATUS, **change}))) == expected


def test_addresses_are_free_ours_or_taken() -> None:
    """A port held by our own services is as it should be; anybody else's is a problem that names them."""
    nginx = addresses.Unusable("port 8080 is taken by nginx (pid 5)", in_use=True, holder=addresses.Holder(5, "nginx"))
    up = addresses.Unusable("taken", in_use=True, holder=addresses.Holder(5, "python", supervisor=4))
    elsewhere = addresses.Unusable("10.9.9.9 is not an address of this machine")

    def judged(found: addresses.Unusable | None, *, ours: bool = False, port: int = 8080) -> Finding:
        return services.of_address("gateway", "127.0.0.1", port, found, ours=ours)

    assert judged(None).level is OK and judged(nginx, ours=True).level is OK and judged(up).level is OK
    assert judged(None, port=0).level is PROBLEM
    taken, wrong = judged(nginx), judged(elsewhere)
    assert taken.level is PROBLEM and "nginx (pid 5)" in taken.message and "gateway.port" in str(taken.remedy)
    assert wrong.level is PROBLEM and "gateway.host" in str(wrong.remedy)


async def test_ports_of_this_machine_are_tried(file: Path) -> None:
    """A port that somebody listens at is found taken, and by whom; the orchestrator's own isn't."""
    loaded = load(file)
    with socket.create_server(("127.0.0.1", loaded.gateway.port)):
        found = await services.can_listen(scene(config=loaded))
        assert levels(found) == [PROBLEM, OK] and "pid" in found[0].message
        assert levels(await services.can_listen(scene(config=loaded, status=STATUS))) == [OK, OK]


@pytest.mark.parametrize(
    ("given", "free", "expected"),
    [
        (None, True, [OK]),
        ("20000-20999", True, [OK]),
        ("8000-8999", True, [WARNING, WARNING]),
        ("40000-40999", True, [WARNING]),
        ("20000-20001", True, [NOTE]),
        ("20000-20999", False, [PROBLEM]),
    ],
)
def test_engine_ports(given: str | None, free: bool, expected: list[Level]) -> None:
    """Ranges that hold our own ports, that the kernel gives away, that are too small or taken are told."""
    plain = config("a: {engine: custom, command: [x]}")
    settings = plain.orchestrator.model_copy(update={"engine_ports": given})
    changed = plain.model_copy(update={"orchestrator": settings})
    assert levels(services.of_ports(changed, range(20_000, 30_000), lambda _: free)) == expected


async def test_engine_ports_matter_only_where_engines_listen_on_this_machine() -> None:
    """Somebody else's containers have ports already."""
    with pytest.raises(ToldElsewhere):
        await services.engine_ports(scene("a: {container: c1}"))
    assert levels(await services.engine_ports(scene())) == [OK]


async def test_paths_that_cant_be_looked_at_are_judged_all_the_same(tmp_path: Path) -> None:
    """Python raises for a name that is too long, and for folders that only others may enter."""
    far = tmp_path / ("n" * 300)
    models = (
        f"a: {{model: org/m, program: [{sys.executable}]}}, b: {{model: {'m' * 300}, program: [{sys.executable}]}},"
        f" c: {{image: i, model: org/m, volumes: ['{far}:/x']}}, d: {{engine: openvino, model: {'m' * 300}}}"
    )
    path = tmp_path / "m.yaml"
    path.write_text("")
    env = {"HF_HOME": str(far), "XDG_CACHE_HOME": str(far), "XDG_STATE_HOME": str(far)}
    report = await examine(scene(models, path=path, env=env), doctor_command.CHECKS)
    assert [found.message for found in report.findings if "could not be looked at" in found.message] == []
    assert report.hung is False
    one(report.findings, f"there is no {far} to mount")


async def test_all_checks_survive_a_machine_that_breaks_everywhere(tmp_path: Path) -> None:
    """With Docker, GPU and orchestrator all failing in odd ways, every check still ends in findings."""
    broken = scene(
        "p: {engine: vllm, model: org/m-7b}, i: {image: i, model: org/m}, c: {container: c1}",
        docker=RuntimeError("odd"),
        status={"gateways": None, "problems": None},
    )

    async def no_gpu() -> Any:
        raise OSError("gone")

    broken.read_gpu = no_gpu
    broken.env = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "XDG_STATE_HOME": str(tmp_path)}
    began = time.monotonic()
    report = await examine(broken, doctor_command.CHECKS)
    assert report.groups.keys() >= {"Config", "Services", "GPU", "Docker", "Weights", "Room"}
    assert not report.hung and time.monotonic() - began < 10

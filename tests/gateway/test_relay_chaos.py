"""Everything at once: clients that leave, engines that die, leases that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from modelswap.protocol.messages import Drained, Epoch, Fault, Hello, Want
from modelswap.testing.waiting import until
from tests.gateway.rig import PATIENCE, SSE_HEAD, Engine, Request, Rig, ask, chunk, post, response

CLIENTS = 12
CALLS = 25


async def stays_open(request: Request) -> bool:
    """Return whether a request's connection outlives it: one that was given up may be read late, and goes nowhere."""
    with contextlib.suppress(AssertionError):
        await until(request.connection.transport.is_closing, patience=1.0)
        return False
    return True


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_lost_or_leaked(rig: Rig, seed: int) -> None:
    """Through deaths, departures and swaps every request ends as it may, in its own model's words; no slot is lost.

    And no engine hears of a request outside its lease: not before it is open, not after it was said to be drained.
    """
    dice = random.Random(seed)
    await rig.start(progress_after=0.02)
    leased: set[int] = set()
    trespasses: list[str] = []

    def script(model: str) -> Engine:
        async def run(request: Request) -> None:
            if id(engine) not in leased and await stays_open(request):
                trespasses.append(f"{model}: {request.body!r}")
            kind = dice.random()
            if kind < 0.05:
                request.connection.transport.abort()
                return
            for _ in range(dice.randrange(4)):
                await asyncio.sleep(0)
            if b'"stream":true' not in request.body:
                request.connection.write(response(model.encode()))
                return
            request.connection.write(SSE_HEAD)
            for _ in range(dice.randrange(5)):
                request.connection.write(chunk(b"data: %b\n\n" % model.encode()))
                await asyncio.sleep(dice.choice([0, 0.001]))
            if kind < 0.15:
                request.connection.transport.abort()
            elif not request.connection.transport.is_closing():
                request.connection.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

        engine = Engine(run)
        return engine

    engines = {model: script(model) for model in ("mistral", "coder")}
    for engine in engines.values():
        rig.engines.append(await engine.start())
    finished = asyncio.Event()

    async def orchestrate() -> None:
        """Give the device to whoever waits, turn by turn, and look into faults."""
        orchestrator = rig.orchestrator
        n = 0
        while not finished.is_set():
            for model, engine in engines.items():
                n += 1
                leased.add(id(engine))
                await orchestrator.open(engine, model=model, n=n, slots=dice.randrange(1, 6))
                seen = 0
                for _ in range(dice.randrange(20)):
                    await asyncio.sleep(0.002)
                    faults = [f.n for f in orchestrator.heard(Fault) if f.epoch == Epoch(1, n)]
                    if len(faults) > seen:
                        seen = len(faults)
                        await orchestrator.open(engine, model=model, n=n, slots=3, faults=max(faults), revision=seen)
                await orchestrator.close(model=model, n=n)
                if dice.random() < 0.2:
                    await orchestrator.close(model=model, n=n, abort=True)
                await until(lambda n=n: any(d.epoch.n == n for d in orchestrator.heard(Drained)), patience=PATIENCE)  # type: ignore[misc]
                leased.discard(id(engine))
                assert all(lease.epoch.n != n for lease in rig.worker.admission.leases)

    outcomes: dict[str, int] = {}

    async def client() -> None:
        for _ in range(CALLS):
            model = dice.choice(["mistral", "coder"])
            stream = dice.random() < 0.5
            wire = await rig.wire()
            await wire.send(post(ask(model, stream=stream)))
            if dice.random() < 0.2:
                await asyncio.sleep(dice.random() * 0.02)
                await wire.close()
                outcome = "left"
            else:
                outcome = _judge(await wire.rest_after_answer(), model)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            await wire.close()
            rig.wires.remove(wire)

    orchestrating = asyncio.create_task(orchestrate())
    async with asyncio.timeout(120):
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        finished.set()
        await orchestrating
    await until(lambda: rig.in_flight() == 0 and not rig.worker.waiting and not rig.worker.clients, patience=PATIENCE)
    assert not trespasses
    assert rig.worker.admission.waiting == 0
    assert outcomes.get("good", 0) > CLIENTS * CALLS / 2
    assert set(outcomes) <= {"good", "left", "died", "aborted", "cut"}, outcomes
    assert len(rig.orchestrator.heard(Hello)) == 1
    assert rig.orchestrator.heard(Want)


def _judge(answer: bytes, model: str) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    other = b"coder" if model == "mistral" else b"mistral"
    assert other not in body.replace(b"the engine of", b""), "an answer of another model"
    if b"engine_died" in body:
        return "died"
    if b"drain_aborted" in body:
        return "aborted"
    if head.startswith(b"HTTP/1.1 200") and (body == model.encode() or body.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")):
        return "good"
    return "cut" if not body.endswith(b"0\r\n\r\n") else f"strange: {answer!r}"

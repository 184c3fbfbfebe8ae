"""Leases: what is done when engines die, leases close, and addresses change."""

from __future__ import annotations

import asyncio

import pytest

from modelswap.protocol.messages import Drained, Fault, Usage, Want
from modelswap.testing.waiting import until
from tests.gateway.rig import SSE_HEAD, Engine, Request, Rig, ask, chunk, post, replies, response


async def die(request: Request) -> None:
    """Die before the first byte."""
    request.connection.transport.abort()


async def part_of_head(request: Request) -> None:
    """Die within the head."""
    request.connection.write(b"HTTP/1.1 200 OK\r\ncontent-")
    request.connection.transport.close()


async def nonsense(request: Request) -> None:
    """Answer in another protocol."""
    request.connection.write(b"SSH-2.0-OpenSSH\r\n\r\n")


async def endless_head(request: Request) -> None:
    """Never come to the point."""
    request.connection.write(b"HTTP/1.1 200 OK\r\nx: " + b"x" * 300_000)


async def switch(request: Request) -> None:
    """Switch protocols unasked."""
    request.connection.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")


@pytest.mark.parametrize("script", [die, part_of_head, nonsense, endless_head, switch])
async def test_death_before_the_first_byte_costs_nothing(rig: Rig, script: object) -> None:
    """The orchestrator hears of the fault, the request waits at its old age, and its next engine answers it."""
    await rig.start()
    first = await rig.engine(script)  # type: ignore[arg-type]
    wire = await rig.wire()
    await wire.send(post(ask()))
    fault = await rig.orchestrator.hears(Fault)
    assert (fault.model, fault.n) == ("mistral", 1)
    assert (await rig.orchestrator.hears(Want)).model == "mistral"
    second = await rig.engine(n=2)
    assert (await wire.response()).status == 200
    assert (len(first.requests), len(second.requests)) == (1, 1)
    assert first.requests[0].body == second.requests[0].body
    await until(lambda: rig.in_flight() == 0)


async def test_second_death_is_the_requests_end(rig: Rig) -> None:
    """A request that two engines died of is answered 502."""
    await rig.start()
    await rig.engine(die)
    wire = await rig.wire()
    await wire.send(post(ask()))
    await rig.orchestrator.hears(Fault)
    await rig.engine(die, n=2)
    got = await wire.response()
    assert (got.status, got.code) == (502, "engine_died")
    assert (await rig.orchestrator.hears(Fault, 2)).n == 1
    assert rig.in_flight() == 0


async def test_refused_connection_is_a_fault(rig: Rig) -> None:
    """An engine that no longer listens is one that has died."""
    await rig.start()
    engine = await rig.engine()
    engine.refuse()
    await asyncio.sleep(0)
    wire = await rig.wire()
    await wire.send(post(ask()))
    assert "refused" in (await rig.orchestrator.hears(Fault)).reason.lower()
    await rig.engine(n=2)
    assert (await wire.response()).status == 200


async def test_lease_goes_on_when_its_fault_was_looked_into(rig: Rig) -> None:
    """After a fault nothing is admitted until the orchestrator confirms the lease."""
    await rig.start()
    scripts = [die, replies(b"{}"), replies(b"{}")]

    async def script(request: Request) -> None:
        await scripts.pop(0)(request)

    engine = await rig.engine(script)
    wire, other = await rig.wire(), await rig.wire()
    await wire.send(post(ask(n=1)))
    await rig.orchestrator.hears(Fault)
    await other.send(post(ask(n=2)))
    await rig.orchestrator.hears(Want, 2)
    assert len(engine.requests) == 1
    await rig.orchestrator.open(engine, faults=1)
    assert (await wire.response()).status == 200
    assert (await other.response()).status == 200


async def test_drained_is_said_after_the_last_answer(rig: Rig) -> None:
    """A closed lease admits no more, lets the running ones finish, and is then drained, its connections closed."""
    await rig.start()
    go = asyncio.Event()

    async def script(request: Request) -> None:
        if b"slow" in request.body:
            await go.wait()
        request.connection.write(response(b"{}"))

    engine = await rig.engine(script)
    slow, idle, late = await rig.wire(), await rig.wire(), await rig.wire()
    await slow.send(post(ask(slow=True)))
    await engine.request()
    await idle.send(post(ask()))
    await idle.response()
    running, unused = engine.connections
    await rig.orchestrator.close()
    await asyncio.wait_for(unused.closed.wait(), 30)
    assert not running.closed.is_set()
    assert not rig.orchestrator.heard(Drained)
    await late.send(post(ask(late=True)))
    await rig.orchestrator.hears(Want)
    assert len(engine.requests) == 2
    go.set()
    assert (await slow.response()).status == 200
    await rig.orchestrator.hears(Drained)
    await asyncio.wait_for(running.closed.wait(), 30)
    second = await rig.engine(n=2)
    assert (await late.response()).status == 200
    assert [request.body for request in second.requests] == [ask(late=True)]


async def test_idle_connections_are_closed_before_drained_is_said(rig: Rig) -> None:
    """By the time the orchestrator hears of it, the engine has seen every idle connection end."""
    await rig.start()
    engine = await rig.engine()
    for n in range(1, 6):
        if n > 1:
            await rig.lease(engine, n=n)
        wires = [await rig.wire() for _ in range(8)]
        for wire in wires:
            await wire.send(post(ask()))
        for wire in wires:
            await wire.response()
        sockets = [c.transport.get_extra_info("socket").fileno() for c in engine.connections if not c.closed.is_set()]
        assert sockets
        heard = len(rig.orchestrator.heard(Drained))
        await rig.orchestrator.close(n=n)
        await rig.orchestrator.hears(Drained, heard + 1)
        for connection in engine.connections:
            await asyncio.wait_for(connection.closed.wait(), 30)


async def test_newer_lease_has_connections_of_its_own(rig: Rig) -> None:
    """An address that is used again is connected to anew: the old connections led to another engine."""
    await rig.start()
    first = await rig.engine(replies(b'"first"'))
    wire = await rig.wire()
    await wire.send(post(ask()))
    assert (await wire.response()).body == b'"first"'
    port = first.port
    await rig.orchestrator.close()
    await rig.orchestrator.hears(Drained)
    await first.stop()
    second = await Engine(replies(b'"second"')).start(port)
    rig.engines.append(second)
    await rig.lease(second, n=2)
    await wire.send(post(ask()))
    assert (await wire.response()).body == b'"second"'
    assert len(rig.orchestrator.heard(Fault)) == 0


async def test_engine_stopping_under_a_closing_lease_is_no_fault(rig: Rig) -> None:
    """A request whose engine goes while its lease closes waits again, uncounted, however often."""
    await rig.start()

    async def script(request: Request) -> None:
        await request.connection.closed.wait()

    wire = await rig.wire()
    await wire.send(post(ask()))
    for n in range(1, 5):
        engine = await rig.engine(script, n=n)
        await engine.request()
        await rig.orchestrator.close(n=n)
        await until(lambda: all(lease.state == "closing" for lease in rig.worker.admission.leases))
        engine.connections[0].transport.abort()
        await rig.orchestrator.hears(Drained, n)
    await rig.engine(n=9)
    assert (await wire.response()).status == 200
    assert not rig.orchestrator.heard(Fault)


@pytest.mark.parametrize("kind", ["silent", "events", "plain"])
async def test_aborted_drain(rig: Rig, kind: str) -> None:
    """What still runs is ended with a retryable error, in the form that fits, and the lease is drained."""
    await rig.start()

    async def script(request: Request) -> None:
        if kind == "events":
            request.connection.write(SSE_HEAD + chunk(b"data: 1\n\n"))
        elif kind == "plain":
            request.connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{")

    engine = await rig.engine(script)
    wire = await rig.wire()
    await wire.send(post(ask(stream=True)))
    request = await engine.request()
    if kind != "silent":
        assert (await wire.head())[0] == 200
    await rig.orchestrator.close()
    await rig.orchestrator.close(abort=True)
    await rig.orchestrator.hears(Drained)
    await asyncio.wait_for(request.connection.closed.wait(), 30)
    if kind == "silent":
        got = await wire.response()
        assert (got.status, got.code, got.header("retry-after")) == (503, "drain_aborted", "1")
    elif kind == "events":
        events = await wire.cut()
        assert events.startswith(b"data: 1\n\n")
        assert b'"code":"drain_aborted"' in events
    else:
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await wire.reader.readexactly(99)


async def test_smaller_share_is_kept(rig: Rig) -> None:
    """A lease that loses slots admits no more than it has, and says what runs."""
    await rig.start()
    go = asyncio.Semaphore(0)

    async def script(request: Request) -> None:
        await go.acquire()
        request.connection.write(response(b"{}"))

    engine = await rig.engine(script, slots=2)
    wires = [await rig.wire() for _ in range(4)]
    for wire in wires:
        await wire.send(post(ask()))
    await engine.request(2)
    await rig.orchestrator.hears(Want, 2)
    await rig.orchestrator.open(engine, slots=1, revision=1)
    usage = await rig.orchestrator.hears(Usage)
    await until(lambda: any(u.revision == 1 and u.in_flight == 2 for u in rig.orchestrator.heard(Usage)))
    assert usage.model == "mistral"
    go.release()
    await until(lambda: rig.in_flight() == 1)
    assert len(engine.requests) == 2
    for _ in range(3):
        go.release()
    for wire in wires:
        assert (await wire.response()).status == 200


async def test_hot_path_says_nothing(rig: Rig) -> None:
    """Requests for a resident model cost no message."""
    await rig.start()
    await rig.engine()
    before = len([m for m in rig.orchestrator.said if not isinstance(m, Usage)])
    wire = await rig.wire()
    for _ in range(50):
        await wire.send(post(ask()))
        await wire.response()
    assert len([m for m in rig.orchestrator.said if not isinstance(m, Usage)]) == before

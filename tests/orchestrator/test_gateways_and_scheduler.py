"""Gateways, scheduler and executors together, over fakes."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from modelswap.orchestrator import links as linking
from modelswap.protocol.codec import decode_from_orchestrator, encode
from modelswap.protocol.messages import (
    Admitted,
    Catalog,
    Close,
    Drained,
    Fault,
    GatewayMessage,
    Heartbeat,
    Hello,
    Open,
    OrchestratorMessage,
    Refuse,
    Want,
)
from tests.orchestrator.conftest import Api, serving
from tests.orchestrator.fakes import DEADLINE, TOKEN, Bench, config, until


class Gateway:
    """One gateway's connection."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self.connection = connection

    async def say(self, message: GatewayMessage) -> None:
        """Say something."""
        await self.connection.send_str(encode(message).decode())

    async def hear(self, kind: type[OrchestratorMessage]) -> Any:
        """Return the next message of a kind."""
        async with asyncio.timeout(DEADLINE):
            while True:
                message = decode_from_orchestrator(await self.connection.receive_str())
                if isinstance(message, kind):
                    return message


async def connect(api: Api, name: str = "g") -> Gateway:
    """Return a gateway that has said hello and got its catalog."""
    headers = {"authorization": f"Bearer {TOKEN}"}
    gateway = Gateway(await api.http.ws_connect(api.url + "/gateway", headers=headers))
    await gateway.say(Hello(gateway=name))
    await gateway.hear(Catalog)
    return gateway


async def test_a_waiting_request_brings_its_model_in(bench: Bench) -> None:
    """The lease carries this start's address, its slots, and the model's key."""
    bench.config = config(a={"api_key": "hush-hush", "concurrency": 2}, b={})
    async with serving(bench) as api:
        gateway = await connect(api)
        await gateway.say(Want(ticket=1, model="a", age_ms=250))
        opened = await gateway.hear(Open)
        (running,) = bench.runtime.living.values()
        assert (opened.host, opened.port) == (running.address.host, running.address.port)
        assert (opened.slots, opened.api_key) == (2, "hush-hush")
        await gateway.say(Admitted(ticket=1, model="a", epoch=opened.epoch))
        line = 'orchestrator_queue_ended_total{model="a",outcome="granted"} 1.0'
        async with asyncio.timeout(DEADLINE):
            while line not in (text := (await api.get("/metrics"))[1]):  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.005)
        assert 'orchestrator_queue_wait_seconds_count{model="a"} 1.0' in text
        assert "orchestrator_gateways_connected 1.0" in text


async def test_a_swap_waits_for_the_gateway_to_drain(api: Api, bench: Bench) -> None:
    """Nothing is stopped before it said so."""
    gateway = await connect(api)
    await api.post("/ensure_model", {"model": "a"})
    opened = await gateway.hear(Open)
    asking = asyncio.create_task(api.post("/ensure_model", {"model": "b"}))
    closing = await gateway.hear(Close)
    assert closing.epoch == opened.epoch and bench.runtime.stops == []
    await gateway.say(Drained(model="a", epoch=opened.epoch))
    assert (await asking)[0] == 200
    assert [instance.partition(".")[0] for instance, _ in bench.runtime.stops] == ["a"]
    assert (await gateway.hear(Open)).model == "b"


async def test_a_fault_has_the_instance_looked_at(api: Api, bench: Bench) -> None:
    """If it is well the gateway may go on; if not it is replaced."""
    gateway = await connect(api)
    await api.post("/ensure_model", {"model": "a"})
    opened = await gateway.hear(Open)
    await gateway.say(Fault(model="a", epoch=opened.epoch, reason="connection refused"))
    again = await gateway.hear(Open)
    assert (again.epoch, again.faults) == (opened.epoch, 1)
    bench.engine.well = False
    await gateway.say(Fault(model="a", epoch=opened.epoch, reason="connection refused", n=2))
    await gateway.hear(Close)
    await until(lambda: not bench.runtime.living)
    assert bench.runtime.stops[-1][1] == 0.0


async def test_a_model_that_will_not_start_refuses_its_requests(api: Api, bench: Bench) -> None:
    """With the reason, the log and when to come back."""
    gateway = await connect(api)
    bench.engine.canary_error = aiohttp.ClientPayloadError("cut off")
    await gateway.say(Want(ticket=1, model="a"))
    refused = await gateway.hear(Refuse)
    assert (refused.ticket, refused.status, refused.code) == (1, 503, "model_start_failed")
    assert "cut off" in refused.message and "last line" in refused.message and refused.retry_after_ms


async def test_heartbeats_are_answered_and_silence_is_not_forgiven(bench: Bench) -> None:
    """A gateway that says nothing for a term is disconnected, and may come back."""
    bench.config = config({"orchestrator": {"term": 0.5}})
    async with serving(bench) as api:
        gateway = await connect(api)
        await gateway.say(Heartbeat(n=3))
        assert (await gateway.hear(Heartbeat)).n == 3
        async with asyncio.timeout(DEADLINE):
            while (await gateway.connection.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
        assert gateway.connection.close_code == linking.SILENT
        await until(lambda: api.service.links.connected == 0)
        await connect(api)
        await until(lambda: api.service.links.connected == 1)


async def test_gateways_hear_of_a_reload(api: Api, bench: Bench) -> None:
    """The catalog comes again, with what engines call the models."""
    gateway = await connect(api)
    bench.config = config(c={"adapters": ["tuned"]})
    await api.post("/reload", {})
    catalog = await gateway.hear(Catalog)
    assert [(m.name, m.adapters, m.upstream_name) for m in catalog.models] == [("c", ("tuned",), "upstream-c")]
    assert (await api.post("/ensure_model", {"model": "tuned"}))[1]["model"] == "c"


@pytest.mark.parametrize("known", [True, False])
async def test_gateways_are_journalled_while_they_are_connected(api: Api, known: bool) -> None:
    """So that the next orchestrator knows whom to expect."""
    gateway = await connect(api)
    await until(lambda: api.service.journal.gateways == {"g"})
    if not known:
        await gateway.connection.close()
        await until(lambda: api.service.journal.gateways == frozenset())

"""The shipped compose files, brought up as README.md says, and the commands that people type at them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final

import openai
import pytest
import pytest_asyncio

from tests.docker.stack import WEIGHTS, ComposeStack, docker, inspect
from tests.system.stack import until

pytestmark = [pytest.mark.docker, pytest.mark.asyncio(loop_scope="module")]

ENSURE: Final = 'curl -X POST localhost:8888/ensure_model -H "Content-Type: application/json" -d \'{"model": "llava"}\''


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def adopted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ComposeStack]:
    """The stack with adopted engines, which answer at a reader's pace; nothing of it may be left over."""
    folder = tmp_path_factory.mktemp("adopted")
    async with ComposeStack(folder, engine=["--tokens=150", "--tokens-per-second=20"]) as stack:
        yield stack
    assert await stack.leftovers() == []


async def test_up_starts_only_the_services(adopted: ComposeStack) -> None:
    """``create`` and ``up`` leave the engines stopped, and requests start and stop them one by one."""
    assert await adopted.engine_containers()
    for model in ("mistral", "coder", "llava", "mistral"):
        assert await adopted.ask(model) == WEIGHTS[model]
        assert await adopted.running_engines() == {model}


async def test_status_can_be_asked_with_curl(adopted: ComposeStack) -> None:
    """``curl localhost:8888/status | jq`` tells what is current."""
    await adopted.swap("mistral")
    status = json.loads(await adopted.shell("curl -sS localhost:8888/status | jq"))
    assert status["current_model"] == "mistral"


async def test_a_model_can_be_ensured_with_curl(adopted: ComposeStack) -> None:
    """The documented POST to ``/ensure_model`` swaps and tells when the model is ready."""
    await adopted.swap("coder")
    answer = json.loads(await adopted.shell(ENSURE))
    assert answer["model"] == "llava"
    assert await adopted.running_engines() == {"llava"}


async def test_the_logs_show_swaps(adopted: ComposeStack) -> None:
    """``docker logs -f multimodal-stack-orchestrator`` and ``docker compose logs -f`` show a swap as it happens."""
    await adopted.swap("mistral")
    async with (
        adopted.following("docker logs -f --tail 0 multimodal-stack-orchestrator") as log,
        adopted.following("docker compose logs -f --tail 0") as logs,
    ):
        await asyncio.sleep(0.5)  # both begin to follow; what they then miss fails the test, never passes it
        await adopted.swap("coder")
        await log.shows("coder", "swap")
        await logs.shows("orchestrator", "coder", "swap")
    whole = adopted.following("docker logs -f multimodal-stack-orchestrator")
    async with whole as log:
        await log.shows("serving")


async def test_the_engines_can_be_listed(adopted: ComposeStack) -> None:
    """``docker ps -a | grep llm`` lists the three engines, one of them up."""
    await adopted.swap("llava")
    lines = (await adopted.shell(f"docker ps -a | grep llm | grep {adopted.project}")).splitlines()
    assert len(lines) == 3
    assert [("llava-llm" in line) for line in lines if " Up " in line] == [True]


async def test_the_engines_can_be_stopped_by_hand(adopted: ComposeStack) -> None:
    """After ``docker compose stop mistral-llm llava-llm coder-llm`` nothing is current; a request brings it back."""
    await adopted.swap("coder")
    await adopted.shell("docker compose stop mistral-llm llava-llm coder-llm")

    async def noticed() -> bool:
        return (await adopted.status())["current_model"] is None

    await until(noticed, "the manual stop is noticed", 1.0)
    assert await adopted.ask("coder") == WEIGHTS["coder"]


async def test_a_restarted_orchestrator_takes_over(adopted: ComposeStack) -> None:
    """``docker compose restart model-orchestrator`` cuts no stream, and neither stops nor starts the engine."""
    await adopted.ask("mistral")
    engine = (await adopted.engine_containers())["mistral"]
    before = (await inspect(engine))["State"]
    async with openai.AsyncOpenAI(base_url=adopted.base_url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="mistral", messages=[{"role": "user", "content": "talk"}], stream=True
        )
        reading = aiter(stream)
        await anext(reading)
        await adopted.shell("docker compose restart model-orchestrator")
        under_way = asyncio.create_task(count(reading))
        await until(adopted.healthy, "the orchestrator is back")

        async def taken_over() -> bool:
            return bool((await adopted.status())["current_model"] == "mistral")

        await until(taken_over, "the engine is taken over")
        assert await adopted.ask("mistral") == WEIGHTS["mistral"]
        pieces, reason = await under_way
    assert pieces == 150 and reason == "stop"
    after = (await inspect(engine))["State"]
    assert after["StartedAt"] == before["StartedAt"] and after["Running"]


async def test_the_services_are_locked_down(adopted: ComposeStack) -> None:
    """Both services run without root, capabilities or a writable root file system, on loopback, and stay up."""
    for service in ("api-gateway", "model-orchestrator"):
        container = (await adopted.compose("ps", "--quiet", service)).strip()
        document = await inspect(container)
        host: dict[str, Any] = document["HostConfig"]
        assert document["Config"]["User"] == "10001:10001"
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert document["RestartCount"] == 0
        published = [each["HostIp"] for ports in document["NetworkSettings"]["Ports"].values() for each in ports or []]
        assert set(published) == {"127.0.0.1"}

    async def well() -> bool:
        states = (await adopted.compose("ps", "--format", "{{.Health}}")).split()
        return len(states) >= 2 and set(states[:2]) == {"healthy"}

    await until(well, "both health checks pass")


async def test_engines_are_not_published(adopted: ComposeStack) -> None:
    """No engine's port can be reached from outside the project's network, and Docker starts none by itself."""
    for container in (await adopted.engine_containers()).values():
        host = (await inspect(container))["HostConfig"]
        assert not host["PortBindings"]
        assert host["RestartPolicy"]["Name"] in ("no", "")


async def test_weights_are_downloaded_ahead(adopted: ComposeStack) -> None:
    """The orchestrator's user downloads into the fresh model cache, and an engine, which is root, finds it there."""
    await adopted.swap("mistral")
    folder = "hub/models--" + WEIGHTS["mistral"].replace("/", "--")
    owner = await docker("exec", adopted.container, "stat", "-c", "%u", f"/var/cache/huggingface/{folder}")
    assert owner == "10001\n"
    engine = (await adopted.engine_containers())["mistral"]
    files = await docker("exec", engine, "sh", "-c", f"ls /root/.cache/huggingface/{folder}/snapshots/*")
    assert files.split() == ["config.json", "model.safetensors"]


async def count(stream: Any) -> tuple[int, str | None]:
    """Read a stream to its end; returns how many pieces of text came, and why it ended."""
    pieces, reason = 0, None
    async for chunk in stream:
        for choice in chunk.choices:
            pieces += bool(choice.delta.content)
            reason = choice.finish_reason or reason
    return pieces, reason

"""The shipped compose files, brought up as README.md says, and the commands that people type at them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import openai
import pytest

from tests.docker.stack import ComposeStack, docker, inspect
from tests.system.stack import until

pytestmark = [pytest.mark.docker, pytest.mark.asyncio(loop_scope="module")]

SERVED: Final = {
    "mistral": "mistralai/Mistral-7B-Instruct-v0.3",
    "coder": "Qwen/Qwen2.5-Coder-7B-Instruct",
    "llava": "llava-hf/llava-v1.6-mistral-7b-hf",
}
ENSURE: Final = 'curl -X POST localhost:8888/ensure_model -H "Content-Type: application/json" -d \'{"model": "llava"}\''


@pytest.fixture(scope="module")
async def adopted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ComposeStack]:
    """The stack with adopted engines, which answer at a reader's pace; nothing of it may be left over."""
    folder = tmp_path_factory.mktemp("adopted")
    async with ComposeStack(folder, engine=["--tokens-per-second=20"]) as stack:
        yield stack
    assert await stack.leftovers() == []


async def ask(stack: ComposeStack, model: str, tokens: int = 2) -> str:
    """Ask a model through the gateway; returns which engine says that it answered."""
    async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=tokens
        )
    return answer.model


async def test_up_starts_only_the_services(adopted: ComposeStack) -> None:
    """``create`` and ``up`` leave the engines stopped, and requests start and stop them one by one."""
    assert await adopted.engine_containers()
    for model in ("mistral", "coder", "llava", "mistral"):
        assert await ask(adopted, model) == SERVED[model]
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
    assert await ask(adopted, "coder") == SERVED["coder"]


async def test_a_restarted_orchestrator_takes_over(adopted: ComposeStack) -> None:
    """``docker compose restart model-orchestrator`` cuts no stream, and neither stops nor starts the engine."""
    await ask(adopted, "mistral")
    engine = (await adopted.engine_containers())["mistral"]
    before = (await inspect(engine))["State"]
    pieces = 0
    async with openai.AsyncOpenAI(base_url=adopted.base_url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="mistral", messages=[{"role": "user", "content": "talk"}], max_tokens=200, stream=True
        )
        reading = aiter(stream)
        await anext(reading)
        await adopted.shell("docker compose restart model-orchestrator")
        under_way = asyncio.create_task(count(reading))
        await until(adopted.healthy, "the orchestrator is back")
        assert (await adopted.status())["current_model"] == "mistral"
        assert await ask(adopted, "mistral") == SERVED["mistral"]
        pieces, reason = await under_way
    assert pieces >= 190 and reason == "length"
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


async def test_the_model_cache_can_be_shared(adopted: ComposeStack) -> None:
    """What the orchestrator's user writes into a fresh model cache is there for an engine, which is root."""
    await adopted.swap("mistral")
    await docker(
        "exec",
        adopted.container,
        "sh",
        "-c",
        "mkdir -p /var/cache/huggingface/hub && touch /var/cache/huggingface/hub/it",
    )
    engine = (await adopted.engine_containers())["mistral"]
    assert await docker("exec", engine, "ls", "/root/.cache/huggingface/hub") == "it\n"


async def count(stream: Any) -> tuple[int, str | None]:
    """Read a stream to its end; returns how many pieces of text came, and why it ended."""
    pieces, reason = 0, None
    async for chunk in stream:
        for choice in chunk.choices:
            pieces += bool(choice.delta.content)
            reason = choice.finish_reason or reason
    return pieces, reason


async def test_managed_engines(tmp_path: Path) -> None:
    """The recommended variant: modelswap makes the engines' containers, uses them again, and swaps by requests."""
    async with ComposeStack(tmp_path, ["compose.managed.yaml"]) as stack:
        for model in ("mistral", "coder", "llava", "mistral"):
            assert await ask(stack, model) == model
            assert await stack.running_engines() == {model}
        first = await stack.engine_containers()
        assert set(first) == set(SERVED)
        await stack.shell("docker compose restart model-orchestrator")
        await until(stack.healthy, "the orchestrator is back")
        assert await ask(stack, "mistral") == "mistral"
        assert await ask(stack, "coder") == "coder"
        assert await stack.engine_containers() == first  # the same containers, used again
    assert await stack.leftovers() == []


@pytest.mark.parametrize("variant", ["compose.yaml", "compose.managed.yaml"])
async def test_behind_the_socket_proxy(variant: str, tmp_path: Path) -> None:
    """With the proxy the orchestrator has no socket, swaps as before, and is refused every other call."""
    async with ComposeStack(tmp_path, [variant, "compose.socket-proxy.yaml"]) as stack:
        for model in ("mistral", "coder", "mistral"):
            await ask(stack, model)
            assert await stack.running_engines() == {model}
        mounts = (await inspect(stack.container))["Mounts"]
        assert [m["Source"] for m in mounts if m["Destination"] == "/var/run/docker.sock"] == ["/dev/null"]
        assert await call(stack, "GET", "/version") == 200
        for method, path in FORBIDDEN + ([] if stack.managed else CREATING):
            assert await call(stack, method, path) == 403, (method, path)
        gateway = (await stack.compose("ps", "--quiet", "api-gateway")).strip()
        assert await call(stack, "GET", "/version", gateway) is None  # not on that network
    assert await stack.leftovers() == []


FORBIDDEN: Final = [
    ("POST", "/v1.41/containers/x/exec"),
    ("POST", "/containers/x/attach"),
    ("GET", "/containers/x/archive"),
    ("GET", "/containers/x/export"),
    ("PUT", "/containers/x/archive"),
    ("GET", "/containers/../exec/x/json"),
    ("GET", "/containers/%2e%2e/exec/x/json"),
    ("POST", "/build"),
    ("POST", "/containers/prune"),
    ("GET", "/secrets"),
    ("POST", "/swarm/init"),
    ("POST", "/plugins/pull"),
    ("DELETE", "/volumes/somebody-elses"),
    ("POST", "/networks/create"),
    ("DELETE", "/images/x"),
]
CREATING: Final = [
    ("POST", "/v1.41/containers/create"),
    ("POST", "/images/create"),
    ("DELETE", "/containers/x"),
]
_CALL: Final = """
import http.client, sys
try:
    connection = http.client.HTTPConnection("docker-proxy", 2375, timeout=5)
    connection.request(sys.argv[1], sys.argv[2])
    print(connection.getresponse().status)
except OSError:
    print(None)
"""


async def call(stack: ComposeStack, method: str, path: str, container: str | None = None) -> int | None:
    """Return with which status the proxy answers a container (the orchestrator's); None if it can't be reached."""
    said = await docker("exec", container or stack.container, "/opt/modelswap/bin/python", "-c", _CALL, method, path)
    return None if said.strip() == "None" else int(said)

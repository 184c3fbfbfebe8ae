"""The other variants of the shipped compose files: engines that modelswap makes, and a proxy before Docker's socket."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.docker.stack import WEIGHTS, ComposeStack, docker, inspect
from tests.system.stack import until

pytestmark = pytest.mark.docker


async def test_managed_engines(tmp_path: Path) -> None:
    """The recommended variant: modelswap makes the engines' containers, uses them again, and swaps by requests."""
    async with ComposeStack(tmp_path, ["compose.managed.yaml"]) as stack:
        for model in ("mistral", "coder", "llava", "mistral"):
            assert await stack.ask(model) == model
            assert await stack.running_engines() == {model}
        first = await stack.engine_containers()
        assert set(first) == set(WEIGHTS)
        await stack.shell("docker compose restart model-orchestrator")
        await until(stack.healthy, "the orchestrator is back")
        assert await stack.ask("mistral") == "mistral"
        assert await stack.ask("coder") == "coder"
        assert await stack.engine_containers() == first  # the same containers, used again
    assert await stack.leftovers() == []


@pytest.mark.parametrize("variant", ["compose.yaml", "compose.managed.yaml"])
async def test_behind_the_socket_proxy(variant: str, tmp_path: Path) -> None:
    """With the proxy the orchestrator has no socket, swaps as before, and is refused every other call."""
    async with ComposeStack(tmp_path, [variant, "compose.socket-proxy.yaml"]) as stack:
        for model in ("mistral", "coder", "mistral"):
            await stack.ask(model)
            assert await stack.running_engines() == {model}
        mounts = (await inspect(stack.container))["Mounts"]
        assert [m["Source"] for m in mounts if m["Destination"] == "/var/run/docker.sock"] == ["/dev/null"]
        assert await call(stack, "GET", "/version") == 200
        for method, path in FORBIDDEN + ([] if stack.managed else CREATING):
            assert await call(stack, method, path) == 403, (method, path)
        assert "POST /build" in await stack.compose("logs", "docker-proxy")  # what is refused is told
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

"""The same files, read by Compose itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from modelswap.importing.compose.document import load
from modelswap.importing.compose.reading import read_service
from modelswap.importing.sections import Section
from modelswap.importing.service import Port, Volume

MAIN = """
include:
  - inc/more.yaml
  - {path: inc/other.yaml, project_directory: .}
x-common: &common {environment: &env {A: "1", B: "${EMPTY:-fallback}"}}
services:
  base:
    image: vllm/vllm-openai:${TAG}
    command: --model ${MODEL} --port 8000
    environment: [PASSED, "Q=${QUOTED}"]
    volumes: ["./models:/models:ro", "cache:/root/.cache", {type: bind, source: ../up, target: /up}]
    ports: ["${PORT_A}:8000", "127.0.0.1:9000-9001:9000-9001"]
  child:
    extends: base
    environment: {A: two, PASSED: given}
    command: [--model, other/model, "${MISSING:+set}", "${UNSET-dflt}", "${EMPTY-kept}", "${EMPTY+alt}"]
    volumes: ["./other:/models"]
    ports: ["8003:8000"]
  far:
    extends: {file: sub/far.yaml, service: farbase}
    <<: *common
  num:
    <<: *common
    image: ghcr.io/ggml-org/llama.cpp:server-cuda-${NESTED}
    command: -m /m.gguf -ngl 99 --x "a b"
    ulimits: {memlock: -1}
    environment: {T: true, N: 12, S: "on"}
volumes: {cache: {}}
"""
OVER = """
services:
  base:
    environment: {A: over}
    ports: !override ["1234:8000"]
    volumes: ["./third:/third"]
  num: {ulimits: !reset null, command: -m /n.gguf}
"""
ENV = """
TAG=v0.11.0   # the version
export MODEL="Qwen/Qwen2.5-7B"
EMPTY=
PORT_A=8001
QUOTED='a b'
NESTED=${TAG}-cu
"""


def compose(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the Compose plugin."""
    return subprocess.run(
        ["docker", "compose", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.docker
def test_services_are_what_compose_says(tmp_path: Path) -> None:
    """Interpolation, .env, include, extends, overrides, tags and short forms mean what they mean to Compose."""
    if compose("version", folder=tmp_path).returncode != 0:
        pytest.skip("needs the Compose plugin")
    files = {
        "compose.yaml": MAIN,
        "over.yaml": OVER,
        ".env": ENV,
        "inc/more.yaml": "services: {included: {image: 'ollama/ollama:${TAG:-none}', volumes: ['./data:/data']}}",
        "inc/other.yaml": "services: {included2: {image: postgres, volumes: ['./pg:/data']}}",
        "sub/far.yaml": "services: {farbase: {image: sglang, command: python3 -m x, volumes: ['./rel:/rel']}}",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    said = compose("-f", "compose.yaml", "-f", "over.yaml", "config", "--format", "json", folder=tmp_path)
    assert said.returncode == 0, said.stderr
    expected = json.loads(said.stdout)

    def read(path: str) -> str | None:
        return Path(path).read_text() if Path(path).is_file() else None

    document = load([str(tmp_path / "compose.yaml"), str(tmp_path / "over.yaml")], read, os.environ)
    assert document.project == expected["name"]
    assert set(document.services) == set(expected["services"])
    for name, theirs in expected["services"].items():
        ours = read_service(name, Section(document.services[name]), lambda _: None)
        assert ours.image == theirs.get("image", "")
        assert ours.command == (theirs.get("command") or [])
        assert ours.env == theirs.get("environment", {})
        assert ours.ulimits == theirs.get("ulimits", {})
        volumes = {Volume(v["source"], v["target"], v.get("read_only", False), v["type"] == "volume")
                   for v in theirs.get("volumes", [])}  # fmt: skip
        assert set(ours.volumes) == volumes
        ports = {Port(p["target"], p.get("published", ""), p.get("host_ip", "")) for p in theirs.get("ports", [])}
        assert set(ours.ports) == ports

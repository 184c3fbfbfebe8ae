"""The files in ``deploy`` and ``requirements`` agree with each other and with the code; needs no Docker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from modelswap.spec.load import load

_ROOT: Final = Path(__file__).resolve().parents[2]
_COMPOSE: Final = _ROOT / "deploy" / "compose"
_FILES: Final = sorted(_COMPOSE.glob("compose*.yaml"))


class _Loader(yaml.SafeLoader):
    """Knows Compose's own tags."""


def _untagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    match node:
        case yaml.SequenceNode():
            return loader.construct_sequence(node, deep=True)
        case yaml.MappingNode():
            return loader.construct_mapping(node, deep=True)
        case _:
            return None


yaml.add_multi_constructor("!", _untagged, _Loader)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((_COMPOSE / name).read_text(), _Loader)  # noqa: S506 - a safe loader's child
    return found


def _pins(lock: str) -> dict[str, str]:
    text = (_ROOT / "requirements" / lock).read_text()
    return dict(re.findall(r"^([\w.-]+)==([\w.+-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["modelswap.yaml", "modelswap.managed.yaml"])
def test_the_configs_are_valid(name: str) -> None:
    """Each config file loads with an empty environment, with the names that the documentation uses."""
    config = load(_COMPOSE / name, {})
    assert set(config.models) == {"mistral", "coder", "llava"}
    assert {model.runtime for model in config.models.values()} == {"managed" if "managed" in name else "adopted"}
    assert config.orchestrator.allowed_hosts == ["model-orchestrator"]


def test_adopted_models_are_the_services() -> None:
    """Each adopted model names a service of compose.yaml which serves just that model, and is under the profile."""
    services = _read("compose.yaml")["services"]
    for model in load(_COMPOSE / "modelswap.yaml", {}).models.values():
        service = services[model.compose_service]
        assert service["command"][0] == model.model
        assert service["profiles"] == ["models"] and service["restart"] == "no"


def test_both_variants_serve_the_same() -> None:
    """The adopted and the managed variant load the same weights with the same options from the same image."""
    services = _read("compose.yaml")["services"]
    for model in load(_COMPOSE / "modelswap.managed.yaml", {}).models.values():
        twin = next(each for each in services.values() if (each.get("command") or [""])[0] == model.model)
        assert twin["command"][1:] == [str(argument) for argument in model.args]
        assert twin["image"] == f"${{VLLM_IMAGE:-{model.image}}}"


def test_every_setting_is_documented() -> None:
    """Every variable that the files take is in ``.env.example`` and in docs/docker.md, and none is there in vain."""
    used = {"COMPOSE_FILE", "COMPOSE_PROJECT_NAME", "HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY", "NO_PROXY"}
    for file in [*_FILES, *_COMPOSE.glob("modelswap*.yaml")]:
        used |= set(re.findall(r"\$\{(\w+)", file.read_text()))
    example = (_COMPOSE / ".env.example").read_text()
    assert set(re.findall(r"^(?:# )?([A-Z][A-Z_]+)=", example, re.MULTILINE)) == used
    guide = (_ROOT / "docs" / "docker.md").read_text()
    assert [name for name in sorted(used - {"COMPOSE_PROJECT_NAME"}) if f"`{name}`" not in guide] == []


def test_what_is_not_published_stays_so() -> None:
    """Only the two services publish a port, each on loopback unless told otherwise."""
    for file in _FILES:
        for name, service in _read(file.name).get("services", {}).items():
            assert "network_mode" not in service and "privileged" not in service
            for port in service.get("ports", []):
                assert name in ("api-gateway", "model-orchestrator")
                assert port.startswith("${MODELSWAP_BIND:-127.0.0.1}:")


def test_the_unit_leaves_gpus_to_engines() -> None:
    """Nothing in it shuts devices out, as ProtectClock does by an implied DeviceAllow (systemd issue 18142)."""
    text = (_ROOT / "deploy" / "systemd" / "modelswap.service").read_text()
    said = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    assert said["CapabilityBoundingSet"] == "" and said["NoNewPrivileges"] == "yes"
    assert not {"ProtectClock", "PrivateDevices", "DeviceAllow", "DevicePolicy", "MemoryDenyWriteExecute"} & said.keys()


def test_the_images_locks_follow_the_main_one() -> None:
    """What is in the image are the tested versions, and nothing that is only for development or the embedded engine."""
    every, runtime, build = _pins("all.lock"), _pins("runtime.lock"), _pins("build.lock")
    assert runtime and runtime.items() <= every.items()
    assert build and build.items() <= every.items()
    assert not {"pytest", "mypy", "ruff", "openvino", "openai", "hatchling"} & runtime.keys()


def test_the_runtime_lock_is_complete() -> None:
    """Every dependency in pyproject.toml is in the lock that the image is made from."""
    text = (_ROOT / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert declared is not None
    names = re.findall(r'^\s*"([\w.-]+)', declared[1], re.MULTILINE)
    assert {name.lower() for name in names} <= _pins("runtime.lock").keys()


def test_no_file_names_a_package_index() -> None:
    """The locks hold versions and hashes only, so that every machine's own index is asked."""
    for lock in (_ROOT / "requirements").glob("*.lock"):
        assert not re.search(r"https?://|--index", lock.read_text())

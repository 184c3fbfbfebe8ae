"""Which containers load their weights from the folder that we download into."""

from __future__ import annotations

from typing import Any

import pytest

from modelswap.runtimes.docker.sharing import shares_cache

VOLUME = {"Type": "volume", "Name": "hf-cache", "Source": "/var/lib/docker/volumes/hf-cache/_data"}
FOLDER = {"Type": "bind", "Source": "/data/hf"}


def container(mount: dict[str, Any], target: str, *env: str, user: str = "") -> dict[str, Any]:
    """Return what Docker tells of a container with one mount, and one that is none of our business."""
    other = {"Type": "volume", "Name": "compile-cache", "Destination": "/cache"}
    return {"Config": {"Env": list(env), "User": user}, "Mounts": [other, {**mount, "Destination": target}]}


USUAL = "/root/.cache/huggingface"


@pytest.mark.parametrize(
    ("inspected", "hf_cache", "shared"),
    [
        (container(VOLUME, USUAL), "hf-cache", True),
        (container(VOLUME, USUAL), "other", False),
        (container(VOLUME, USUAL), "", False),
        (container(VOLUME, "/models", "HF_HOME=/models"), "hf-cache", True),
        (container(VOLUME, USUAL, "HF_HOME=/models"), "hf-cache", False),
        (container(VOLUME, "/x/huggingface", "XDG_CACHE_HOME=/x"), "hf-cache", True),
        (container(VOLUME, "/home/me/.cache/huggingface", "HOME=/home/me", user="me"), "hf-cache", True),
        (container(VOLUME, USUAL, user="me"), "hf-cache", False),
        (container(VOLUME, USUAL, "HF_HUB_CACHE=/hub"), "hf-cache", False),
        (container(VOLUME, "/models", "HF_HUB_CACHE=/models/hub"), "hf-cache", True),
        (container(VOLUME, "/models", "HF_HUB_CACHE=/models"), "hf-cache", False),
        (container(FOLDER, "/data", "HUGGINGFACE_HUB_CACHE=/data/hub"), "/data/hf", True),
        (container({"Type": "bind", "Source": "/data/hf/hub"}, f"{USUAL}/hub"), "/data/hf", True),
        (container(VOLUME, "/root/.cache"), "hf-cache", False),
        (container(FOLDER, USUAL), "/data/hf", True),
        (container(FOLDER, "/root/.cache"), "/data/hf/huggingface", True),
        (container(FOLDER, "/root/.cache"), "/data/hf", False),
        (container({"Type": "tmpfs"}, USUAL), "hf-cache", False),
        ({"Config": {"Env": None}, "Mounts": None}, "hf-cache", False),
    ],
)
def test_only_the_very_same_folder_is_shared(inspected: dict[str, Any], hf_cache: str, shared: bool) -> None:
    """By what is mounted where the engine looks; where that can't be told, nothing is downloaded in vain."""
    assert shares_cache(inspected, hf_cache) is shared

"""Where the cache is, and what a download's environment has from whom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelswap.spec.config import Docker, Model
from modelswap.weights import places
from modelswap.weights.explain import redacted
from modelswap.weights.places import Unseen, as_on_host, environment, hub_cache, on_host, shared_home

ENVIRONMENTS: list[dict[str, str]] = [
    {"HOME": "/home/u"},
    {"HOME": "/home/u", "XDG_CACHE_HOME": "/cache"},
    {"HOME": "/home/u", "HF_HOME": "~/hf"},
    {"HOME": "/home/u", "HF_HOME": "$HOME/a/${NAME}/b", "NAME": "n"},
    {"HOME": "/home/u", "HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"},
    {"HOME": "/home/u", "HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"},
]
PRINT = """
import importlib, json, os, sys
from huggingface_hub import constants
found = []
for env in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(env)
    found.append(importlib.reload(constants).HF_HUB_CACHE)
print(json.dumps(found))
"""


def managed(**fields: Any) -> Model:
    """Return a model in a container of ours."""
    return Model(**{"model": "org/name", "image": "vllm", **fields})


def here(source: str) -> Path | None:
    """See Docker's folders as on its own machine, and its volume `weights` at /mnt."""
    return {"weights": Path("/mnt")}.get(source, Path(source) if source.startswith("/") else None)


def test_the_cache_is_where_the_library_has_it() -> None:
    """Asked of huggingface_hub itself, for every way to say it."""
    done = subprocess.run(
        [sys.executable, "-c", PRINT], input=json.dumps(ENVIRONMENTS), capture_output=True, text=True, check=True
    )
    assert [str(hub_cache(env)) for env in ENVIRONMENTS] == json.loads(done.stdout)


def test_a_models_own_variables_go_first() -> None:
    """Its hub, token and folders; nothing else of an engine's environment, and nothing of ours alone."""
    model = Model(model="org/name", env={"HF_TOKEN": "its", "HF_HOME": "/its", "LD_PRELOAD": "x", "http_proxy": "p"})
    env = environment(model, {"HUGGING_FACE_HUB_TOKEN": "ours", "PATH": "/bin", "MODELSWAP_TOKEN": "t"})
    assert env == {"PATH": "/bin", "HF_TOKEN": "its", "HF_HOME": "/its", "http_proxy": "p"}


def test_xet_is_left_to_the_hub_itself() -> None:
    """Other servers are asked plainly, unless somebody says otherwise."""
    model = Model(model="org/name")
    other = {"HF_ENDPOINT": "https://mirror.example"}
    assert "HF_HUB_DISABLE_XET" not in (environment(model, {"HF_ENDPOINT": "https://huggingface.co/"}) or {})
    assert (environment(model, other) or {})["HF_HUB_DISABLE_XET"] == "1"
    assert (environment(model, other | {"HF_HUB_DISABLE_XET": "0"}) or {})["HF_HUB_DISABLE_XET"] == "0"


def test_an_endpoint_that_is_set_to_nothing_is_none() -> None:
    """As compose passes on a variable that stands in `.env` without a value."""
    assert environment(Model(model="org/name"), {"HF_ENDPOINT": ""}) == {}
    assert environment(Model(model="org/name", env={"HF_ENDPOINT": ""}), {"HF_ENDPOINT": "https://m"}) == {}
    assert places.is_public({"HF_ENDPOINT": ""})


def test_secrets_are_known_however_they_are_written() -> None:
    """A token as the library cleans it and as Python escapes it, and the passwords of addresses."""
    env = {
        "HF_TOKEN": "hf_o\x01ne\n",
        "HUGGING_FACE_HUB_TOKEN": "hf_two",
        "HF_ENDPOINT": "https://me:p%40ss@mirror.example",
        "https_proxy": "http://u:proxied@proxy:3128",
        "HTTP_PROXY": "http://[::1",
        "NO_PROXY": "a,b",
        "PATH": "/bin",
    }
    said = "hf_o\x01ne hf_o\\x01ne hf_two https://me:p%40ss@mirror.example p@ss http://u:proxied@proxy:3128"
    assert redacted(said, env) == "… … … https://me:…@mirror.example … http://u:…@proxy:3128"
    assert redacted("nothing", {"HF_TOKEN": "", "HF_ENDPOINT": "https://mirror.example"}) == "nothing"


def test_a_container_uses_our_cache_or_the_one_that_is_shared() -> None:
    """What is mounted there is an HF_HOME, so our HF_HUB_CACHE is none of theirs; a login's token is still found."""
    ours = {"HF_HOME": "/ours", "HF_HUB_CACHE": "/ours/other"}
    assert environment(Model(model="org/name"), ours) == ours
    assert environment(managed(), ours) == {"HF_HOME": "/ours", "HF_TOKEN_PATH": "/ours/token"}
    env = environment(managed(), ours, Path("/shared"))
    assert env == {"HF_HOME": "/shared", "HF_TOKEN_PATH": "/ours/token"}


@pytest.mark.parametrize(
    ("fields", "hub"),
    [
        ({"volumes": ["/srv/hf:/root/.cache/huggingface"]}, "/srv/hf/hub"),
        ({"volumes": ["/srv/cache:/root/.cache:ro", "/x:/y"]}, "/srv/cache/huggingface/hub"),
        ({"volumes": ["/a:/root/.cache", "/b:/root/.cache/huggingface/hub"]}, "/b"),
        ({"volumes": ["weights:/data"], "env": {"HF_HOME": "/data/hf"}}, "/mnt/hf/hub"),
        ({"volumes": ["weights:/data"], "env": {"HF_HUB_CACHE": "/data"}}, "/mnt"),
        ({"volumes": ["unseen:/root/.cache/huggingface"]}, None),
        ({"env": {"HF_HOME": "/inside"}}, None),
    ],
)
def test_a_container_with_a_cache_of_its_own_keeps_it(fields: dict[str, Any], hub: str | None) -> None:
    """If we see it; else its weights are not for us."""
    env = environment(managed(**fields), {"HF_HOME": "/ours"}, Path("/shared"), seen=here)
    assert (None if env is None else str(hub_cache(env))) == hub


def test_volumes_are_not_seen_from_here() -> None:
    """Folders are, on Docker's machine."""
    assert as_on_host("weights") is None
    assert as_on_host("/srv") == (Path("/srv") if on_host() else None)


def test_dockers_folders_are_ours_unless_we_are_in_a_container(tmp_path: Path) -> None:
    """Or the daemon is in there with us; one that merely can be seen (`pid: host`) is not."""
    assert on_host(tmp_path)
    (tmp_path / ".dockerenv").touch()
    for number, namespace in (("self", "mnt:[1]"), ("7", "mnt:[2]")):
        (tmp_path / "proc" / number / "ns").mkdir(parents=True)
        (tmp_path / "proc" / number / "ns" / "mnt").symlink_to(namespace)
    assert not on_host(tmp_path)
    (tmp_path / "proc" / "7" / "comm").write_text("dockerd\n")
    assert not on_host(tmp_path)
    (tmp_path / "proc" / "7" / "ns" / "mnt").unlink()
    (tmp_path / "proc" / "7" / "ns" / "mnt").symlink_to("mnt:[1]")
    assert on_host(tmp_path)


def test_on_dockers_machine_the_shared_cache_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, or the one that the config names; a volume is somewhere else, and its weights are not for us."""
    monkeypatch.setattr(places, "on_host", lambda: True)
    assert shared_home(Docker()) is None
    assert shared_home(Docker(hf_cache="/srv/hf"), seen=here) == Path("/srv/hf")
    assert shared_home(Docker(hf_cache="volume")) is Unseen.CACHE
    assert environment(managed(), {}, Unseen.CACHE) is None
    assert environment(managed(volumes=["/srv/hf:/root/.cache"]), {}, Unseen.CACHE, seen=here) is not None
    assert environment(Model(model="org/name"), {}, Unseen.CACHE) == {}
    assert shared_home(Docker(hf_cache="~/hf"), {"HOME": "/home/u"}, seen=here) == Path("/home/u/hf")


def test_in_a_container_the_shared_cache_is_what_is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in the container's own layer would be seen by nobody else."""
    monkeypatch.setattr(places, "on_host", lambda: False)
    monkeypatch.setattr(Path, "is_mount", lambda path: str(path) in ("/", "/cache"))
    assert shared_home(Docker(hf_cache="volume"), {"HF_HOME": "/cache/huggingface"}, seen=here) is None
    assert shared_home(Docker(), {"HF_HOME": "/cache"}, seen=here) is None
    assert shared_home(Docker(), {"HF_HOME": "/root/hf"}, seen=here) is Unseen.CACHE

"""A pull's progress, references and logins, and finding out which container we are in: what needs no Docker."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelswap.runtimes.docker.images import PullProgress
from modelswap.runtimes.docker.registry import is_exact, login, registry_of
from modelswap.runtimes.docker.surroundings import own_id

ID = "0123456789abcdef" * 4
STATUSES = (
    "Pulling fs layer",
    "Waiting",
    "Downloading",
    "Verifying Checksum",
    "Download complete",
    "Extracting",
    "Pull complete",
    "Already exists",
    "Retrying in 5 seconds",
)


def item(layer: str, status: str, current: int = 0, total: int = 0) -> dict[str, Any]:
    return {"id": layer, "status": status, "progressDetail": {"current": current, "total": total} if total else {}}


def fractions(*items: dict[str, Any]) -> list[float | None]:
    progress = PullProgress()
    seen = []
    for each in items:
        progress.take(each)
        seen.append(progress.fraction)
    return seen


def test_downloading_and_unpacking_are_half_each() -> None:
    """One layer, from the first byte to the last."""
    assert fractions(
        item("a", "Pulling fs layer"),
        item("a", "Downloading", 50, 100),
        item("a", "Download complete"),
        item("a", "Extracting", 50, 100),
        item("a", "Pull complete"),
    ) == [None, 0.25, 0.5, 0.75, 1.0]


def test_layers_count_by_their_bytes_and_unknown_ones_as_the_average() -> None:
    """A layer that still waits is part of the whole."""
    begun = [item("a", "Pulling fs layer"), item("b", "Pulling fs layer"), item("a", "Downloading", 100, 100)]
    assert fractions(*begun)[-1] == pytest.approx(0.25)
    assert fractions(*begun, item("b", "Downloading", 100, 300))[-1] == pytest.approx(0.25)
    assert fractions(*begun, item("b", "Downloading", 300, 300))[-1] == pytest.approx(0.5)


def test_what_names_no_layer_is_no_progress() -> None:
    """The stream's first and last lines speak of the tag and the digest."""
    progress = PullProgress()
    assert not progress.take({"id": "latest", "status": "Pulling from library/thing"})
    assert not progress.take({"status": "Digest: sha256:0"})
    assert progress.fraction is None


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(STATUSES), st.integers(0, 200), st.sampled_from((0, -1, 100)))
    )
)
def test_progress_is_a_fraction_that_never_shrinks(items: list[tuple[str, str, int, int]]) -> None:
    """Whatever Docker says, also when a layer's download begins anew."""
    known = [each for each in fractions(*(item(*each) for each in items)) if each is not None]
    assert known == sorted(known)
    assert all(0 <= each <= 1 for each in known)


@pytest.mark.parametrize(
    ("ref", "registry", "exact"),
    [
        ("ubuntu", "docker.io", False),
        ("vllm/vllm-openai:v0.33.0", "docker.io", True),
        ("ghcr.io/org/thing", "ghcr.io", False),
        ("127.0.0.1:5000/thing", "127.0.0.1:5000", False),
        ("127.0.0.1:5000/thing:1", "127.0.0.1:5000", True),
        ("localhost/thing", "localhost", False),
        ("org/thing@sha256:0", "docker.io", True),
    ],
)
def test_references_are_read_as_docker_does(ref: str, registry: str, exact: bool) -> None:
    """Which registry it names, and whether it has a tag: Docker would pull all tags otherwise."""
    assert (registry_of(ref), is_exact(ref)) == (registry, exact)


async def test_what_docker_login_noted_is_passed_on(tmp_path: Path) -> None:
    """For the registry of the image, and for no other one."""
    auths = {
        "https://index.docker.io/v1/": {"auth": base64.b64encode(b"me:pass:word").decode()},
        "ghcr.io": {"identitytoken": "token"},
        "broken.io": {"auth": "***"},
    }
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    env = {"DOCKER_CONFIG": str(tmp_path)}
    hub = json.loads(base64.urlsafe_b64decode((await login("vllm/vllm-openai", env)).header))
    assert (hub["username"], hub["password"]) == ("me", "pass:word")
    ghcr = json.loads(base64.urlsafe_b64decode((await login("ghcr.io/a/b", env)).header))
    assert ghcr["identitytoken"] == "token"
    for ref in ("quay.io/a/b", "broken.io/a"):
        assert (await login(ref, env)).header == ""
    assert (await login("ubuntu", {"HOME": str(tmp_path / "nobody")})).header == ""


async def test_a_credential_helper_is_not_asked_but_told_of(tmp_path: Path) -> None:
    """It is another program; whoever is refused then learns why."""
    folder = tmp_path / ".docker"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"credHelpers": {"gcr.io": "gcloud"}, "auths": {"gcr.io": {}}}))
    env = {"HOME": str(tmp_path)}
    assert "credential helper" in (await login("gcr.io/a/b", env)).caveat
    assert (await login("ghcr.io/a/b", env)).caveat == ""
    (folder / "config.json").write_text("{")
    assert (await login("gcr.io/a/b", env)).caveat == ""


def test_our_container_is_known_by_the_files_that_docker_mounts() -> None:
    """Not by the mounts of others' containers, which the host's table shows."""
    root = f"/var/lib/docker/containers/{ID}"
    inside = (
        "717 592 0:52 / / rw,relatime master:245 - overlay overlay rw\n"
        f"722 717 254:1 {root}/resolv.conf /etc/resolv.conf rw,relatime - ext4 /dev/vda1 rw\n"
        f"723 717 254:1 {root}/hostname /etc/hostname rw,relatime - ext4 /dev/vda1 rw\n"
    )
    host = f"900 29 0:60 / {root}/mounts/shm rw,nosuid - tmpfs shm rw,size=65536k\n"
    assert own_id(inside) == ID
    assert own_id(host) == ""
    assert own_id("") == ""

"""Several compose files as one: overrides, extends, include."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from modelswap.importing.compose.document import Document, load
from modelswap.importing.result import CannotImport


def read(files: Mapping[str, str], *names: str, env: Mapping[str, str] | None = None) -> Document:
    """Load ``names`` (the first file if there are none) of ``files`` in ``/stack``."""
    there = {f"/stack/{name}": text for name, text in files.items()}
    return load([f"/stack/{name}" for name in names or list(files)[:1]], there.get, env or {})


def test_a_later_file_lies_over_an_earlier_one() -> None:
    """Mappings merge, lists grow, commands are replaced, ports and volumes go by their target."""
    document = read(
        {
            "a.yaml": """
services:
  x:
    image: one
    command: [a, b]
    environment: [A=1, B=2]
    volumes: ["./a:/data", "v:/v"]
    ports: ["8000:8000"]
    devices: [/dev/a]
""",
            "b.yaml": """
services:
  x:
    image: two
    command: c d
    environment: {B: 3}
    volumes: ["/b:/data:ro"]
    ports: ["8000:8000", "9000:9000"]
    devices: [/dev/a, /dev/b]
  y: {image: three}
""",
        },
        "a.yaml",
        "b.yaml",
    )
    assert document.services["y"] == {"image": "three"}
    assert document.services["x"] == {
        "image": "two",
        "command": "c d",
        "environment": {"A": "1", "B": "3"},
        "volumes": [
            {"type": "bind", "source": "/b", "target": "/data", "read_only": "true"},
            {"type": "volume", "source": "v", "target": "/v"},
        ],
        "ports": [{"target": "8000", "published": "8000"}, {"target": "9000", "published": "9000"}],
        "devices": ["/dev/a", "/dev/b"],
    }


def test_override_and_reset() -> None:
    """The two tags act on what an earlier file says, and are gone where there is nothing to act on."""
    files = {
        "a.yaml": "services: {x: {image: i, ports: ['1:1'], labels: {a: b}, deploy: {replicas: 2, mode: m}}}",
        "b.yaml": "services: {x: {ports: !override ['2:2'], labels: !reset null, deploy: {mode: !reset null}}}",
    }
    assert read(files, "a.yaml", "b.yaml").services["x"] == {
        "image": "i",
        "ports": [{"target": "2", "published": "2"}],
        "deploy": {"replicas": "2"},
    }
    assert read(files, "b.yaml").services["x"] == {"ports": [{"target": "2", "published": "2"}], "deploy": {}}


def test_extends_within_a_file_and_across_files() -> None:
    """A chain is followed; another file's paths are seen from its own folder."""
    document = read(
        {
            "a.yaml": """
services:
  child: {extends: parent, environment: {B: child}}
  parent: {extends: {file: sub/base.yaml, service: base}, environment: {A: parent}}
""",
            "sub/base.yaml": "services: {base: {image: i, volumes: ['./m:/m'], environment: {A: base, B: base}}}",
        }
    )
    assert document.services["child"] == {
        "image": "i",
        "volumes": [{"type": "bind", "source": "/stack/sub/m", "target": "/m"}],
        "environment": {"A": "parent", "B": "child"},
    }


def test_what_cannot_be_followed_is_a_problem_not_an_error() -> None:
    """A missing base and a remote include are told, and the rest is read."""
    document = read(
        {
            "a.yaml": """
include: [oci://somewhere/file, missing.yaml, {path: [more.yaml]}]
services:
  x: {image: i, extends: {file: gone.yaml, service: base}}
  y: {image: i, extends: nobody}
""",
            "more.yaml": "name: other\nservices: {z: {image: j}}",
        }
    )
    assert set(document.services) == {"x", "y", "z"}
    assert document.project == "stack"
    assert [key for key, _ in document.problems] == ["include", "include", "services.x.extends", "services.y.extends"]


@pytest.mark.parametrize(
    "files",
    [
        {"a.yaml": "services: {x: {extends: y}, y: {extends: x}}"},
        {"a.yaml": "include: [b.yaml]\nservices: {}", "b.yaml": "include: [a.yaml]\nservices: {}"},
    ],
)
def test_circles_end(files: dict[str, str]) -> None:
    """What leads back to itself is an error."""
    with pytest.raises(CannotImport, match="itself"):
        read(files)


def test_include_has_its_own_folder_and_env() -> None:
    """Paths and `.env` of an included file are those of its folder, and the project's own values go first."""
    document = read(
        {
            "a.yaml": "include: [sub/b.yaml]\nservices: {x: {image: $TAG}}",
            ".env": "TAG=mine",
            "sub/b.yaml": "services: {y: {image: '$TAG-$ONLY', volumes: ['./d:/d']}}",
            "sub/.env": "TAG=theirs\nONLY=here",
        }
    )
    assert document.services["x"]["image"] == "mine"
    assert document.services["y"]["image"] == "mine-here"
    assert document.services["y"]["volumes"][0]["source"] == "/stack/sub/d"


@pytest.mark.parametrize(
    ("text", "env", "expected"),
    [
        ("services: {x: {}}", {}, ("stack", False)),
        ("name: mine\nservices: {x: {}}", {}, ("mine", True)),
        ("name: mine\nservices: {x: {}}", {"COMPOSE_PROJECT_NAME": "given"}, ("given", True)),
    ],
)
def test_the_projects_name(text: str, env: dict[str, str], expected: tuple[str, bool]) -> None:
    """It is said by the environment, else by the file, else it is the folder's."""
    document = read({"a.yaml": text}, env=env)
    assert (document.project, document.named) == expected


@pytest.mark.parametrize(
    ("text", "said", "remedy"),
    [
        ("services: {}", "has no services", "compose file"),
        ("version: '3'", "has no services", "compose file"),
        ("llm: {image: vllm/vllm-openai}", "has no services", "put llm under 'services:'"),
        ("services: [a]", "services: wants a mapping", "mend it"),
        ("services: {x: nginx}", "services.x: wants a mapping", "mend it"),
        ("models: {a: {cmd: llama-server}}", "llama-swap's config", "modelswap import llama-swap /stack/a.yaml"),
        ("models: {a: {engine: vllm}}", "modelswap's already", "modelswap check"),
        ("services: {x: {extends: {}}}", "names no service", "mend it"),
    ],
)
def test_wrong_files_are_told_with_their_remedy(text: str, said: str, remedy: str) -> None:
    """Whoever gives the wrong file learns which command is for it."""
    with pytest.raises(CannotImport) as raised:
        read({"a.yaml": text})
    assert said in str(raised.value)
    assert remedy in str(raised.value.remedy)


def test_a_missing_file_is_told() -> None:
    """So is one that is named second."""
    with pytest.raises(CannotImport, match=r"/stack/b\.yaml: no such file"):
        read({"a.yaml": "services: {x: {}}"}, "a.yaml", "b.yaml")

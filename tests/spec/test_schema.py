"""The published JSON Schema and the example that goes with it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from modelswap.spec import example, schema


def test_the_packaged_schema_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """What is packaged is what the config's shape gives."""
    assert schema.main(["--check"]) == 0
    assert capsys.readouterr().err == ""


def test_a_stale_schema_says_how_to_mend_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing or old, the check fails and names the command; writing makes it pass."""
    file = tmp_path / "x.json"
    assert schema.main(["--check"], file) == 1
    assert "make schema" in capsys.readouterr().err
    file.write_text("{}")
    assert schema.main(["--check"], file) == 1
    assert schema.main([], file) == 0
    assert schema.main(["--check"], file) == 0


def test_the_schema_tells_what_editors_show() -> None:
    """Unknown keys are refused, and each key carries its docstring as a description."""
    document = json.loads(schema.render())
    assert document["$schema"].endswith("2020-12/schema") and document["additionalProperties"] is False
    model = document["$defs"]["Model"]
    assert model["properties"]["engine"]["enum"] == ["vllm", "llamacpp", "openvino", "sglang", "custom"]
    undescribed = {
        (section, key)
        for section, definition in document["$defs"].items()
        for key, property_ in definition["properties"].items()
        if "description" not in property_
    }
    assert undescribed <= {(section, key) for section in ("Gateway", "Orchestrator") for key in ("host", "port")}


def test_sizes_may_be_texts_or_numbers() -> None:
    """An editor accepts both forms of a size."""
    document = json.loads(schema.render())
    kinds = {choice["type"] for choice in document["$defs"]["Gateway"]["properties"]["max_body"]["anyOf"]}
    assert kinds == {"integer", "string"}


def test_the_example_is_printed_by_its_module(capsys: pytest.CaptureFixture[str]) -> None:
    """The command that errors point to prints the example."""
    runpy.run_path(example.__file__, run_name="__main__")
    assert capsys.readouterr().out == example.text()

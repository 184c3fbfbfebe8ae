"""The config file's JSON Schema: ``python -m modelswap.spec.schema`` writes it, ``--check`` tells if it is stale."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from modelswap.spec.config import Config

FILE = Path(__file__).with_name("modelswap.schema.json")


def render() -> str:
    """Return the schema as JSON text; descriptions are the docstrings of the config's attributes."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "modelswap.yaml",
        **{key: value for key, value in Config.model_json_schema().items() if key != "title"},
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None, file: Path = FILE) -> int:
    """Write the schema to ``file``, or with ``--check`` return 1 if what is there is stale."""
    parser = argparse.ArgumentParser(prog="python -m modelswap.spec.schema", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the file is stale")
    if not parser.parse_args(arguments).check:
        file.write_text(render(), encoding="utf-8")
        return 0
    if file.is_file() and file.read_text(encoding="utf-8") == render():
        return 0
    sys.stderr.write(f"{file.name} doesn't match spec/config.py: run `make schema` and commit the result\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())

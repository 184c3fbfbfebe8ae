"""The commented example of a config file: ``python -m modelswap.spec.example`` prints it."""

from __future__ import annotations

import sys
from importlib import resources


def text() -> str:
    """Return the example, as YAML that loads."""
    return resources.files("modelswap.spec").joinpath("example.yaml").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.stdout.write(text())

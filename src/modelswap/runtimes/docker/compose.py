"""The labels that compose gives its containers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

PROJECT: Final = "com.docker.compose.project"
SERVICE: Final = "com.docker.compose.service"
NUMBER: Final = "com.docker.compose.container-number"
ONE_OFF: Final = "com.docker.compose.oneoff"


def compose_of(inspected: Mapping[str, Any]) -> tuple[str, str]:
    """Return the compose project and service of an inspected container, both empty if compose didn't make it."""
    labels = inspected.get("Config", {}).get("Labels") or {}
    return str(labels.get(PROJECT, "")), str(labels.get(SERVICE, ""))

"""The range of ports that engines may listen on."""

from __future__ import annotations

import pytest

from modelswap.spec.errors import ConfigError
from modelswap.spec.load import loads

MODEL = "models: {a: {engine: custom, command: [x]}}\n"


def test_range_is_read() -> None:
    """A range of ports includes both its ends."""
    config = loads(f"{MODEL}orchestrator: {{engine_ports: 20000-20002}}", {})
    assert config.orchestrator.ports == range(20000, 20003)
    assert loads(MODEL, {}).orchestrator.ports is None


@pytest.mark.parametrize("wrong", ["20002-20000", "0-5", "60000-70000", "20000", "a-b"])
def test_wrong_range_is_an_error(wrong: str) -> None:
    """What isn't a range of ports is refused with the place."""
    with pytest.raises(ConfigError, match="orchestrator"):
        loads(f"{MODEL}orchestrator: {{engine_ports: '{wrong}'}}", {})

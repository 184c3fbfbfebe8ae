"""JSON text frames for `modelswap.protocol.messages`."""

from __future__ import annotations

import msgspec

from modelswap.protocol.messages import GatewayMessage, OrchestratorMessage

_encoder = msgspec.json.Encoder()
_from_gateway: msgspec.json.Decoder[GatewayMessage] = msgspec.json.Decoder(GatewayMessage)
_from_orchestrator: msgspec.json.Decoder[OrchestratorMessage] = msgspec.json.Decoder(OrchestratorMessage)


def encode(message: GatewayMessage | OrchestratorMessage) -> bytes:
    """Return ``message`` as UTF-8 JSON."""
    return _encoder.encode(message)


def decode_from_gateway(frame: bytes | str) -> GatewayMessage:
    """Read what a gateway said; raises `msgspec.DecodeError` on anything else."""
    return _from_gateway.decode(frame)


def decode_from_orchestrator(frame: bytes | str) -> OrchestratorMessage:
    """Read what the orchestrator said; raises `msgspec.DecodeError` on anything else."""
    return _from_orchestrator.decode(frame)

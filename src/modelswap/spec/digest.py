"""When two entries of a config file start the same engine."""

from __future__ import annotations

import hashlib
import json
from typing import Final

from modelswap.spec.config import Model

_KNOWS_ITS_NAMES: Final = frozenset({"vllm", "llamacpp", "openvino"})
# Read by us at run time, never by the engine's process: a change needs no restart.
_OURS: Final = frozenset(
    {"adapters", "aliases", "canary", "concurrency", "health_interval", "hooks", "idle", "memory", "pin", "preload"}
    | {"priority", "pull", "ready", "standby", "start_timeout", "stop_grace", "ttl"}
)


def definition(name: str, model: Model) -> str:
    """Return a digest of everything that the engine of ``model`` is started from, secrets included.

    16 hex digits of a SHA-256. Equal digests mean that a running engine may go on under the new config. What we alone
    read (priority, time limits, the canary…) isn't in it; name and aliases are, for the engines that are told them,
    which somebody else's container isn't. What has its default value isn't in it either, so that a version with more
    keys takes over what an older one has started.
    """
    parts = model.model_dump(mode="json", exclude=set(_OURS), exclude_defaults=True)
    parts["api_key"] = model.api_key.get_secret_value() if model.api_key else None
    if model.engine in _KNOWS_ITS_NAMES and model.runtime != "adopted":
        parts["names"] = [name, *model.aliases]
    if model.engine == "sglang" and model.runtime != "adopted":
        # It takes one name only, and no key.
        parts |= {"names": [name], "api_key": None}
    if model.engine == "openvino":
        # The embedded server is told how long it may take to end.
        parts["stop_grace"] = model.stop_grace
    encoded = json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]

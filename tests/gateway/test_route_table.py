"""Which paths are relayed, and where to."""

from __future__ import annotations

import pytest

from modelswap.gateway import routes


@pytest.mark.parametrize(
    ("target", "label", "upstream"),
    [
        (b"/v1/chat/completions", "/v1/chat/completions", b"/v1/chat/completions"),
        (b"/chat/completions", "/v1/chat/completions", b"/v1/chat/completions"),
        (b"/chat/completions?a=b", "/v1/chat/completions", b"/v1/chat/completions?a=b"),
        (b"http://h:1/v1/embeddings", "/v1/embeddings", b"/v1/embeddings"),
        (b"/v1/some-new_thing/x.y:z", "other", b"/v1/some-new_thing/x.y:z"),
        (b"/v1/new?q=/../", "other", b"/v1/new?q=/../"),
    ],
)
def test_inference_paths_are_relayed(target: bytes, label: str, upstream: bytes) -> None:
    """Known paths have labels of their own, all others under /v1 share one."""
    route = routes.inference(target)
    assert route is not None
    assert (route.label, route.target) == (label, upstream)


@pytest.mark.parametrize(
    "target",
    [
        b"/",
        b"*",
        b"/sleep",
        b"/v1",
        b"/v1/",
        b"/v1/../sleep",
        b"/v1/x/../../sleep",
        b"/v1/./x",
        b"/v1//sleep",
        b"/v1/%2e%2e/sleep",
        b"/v1/x%2fy",
        b"/v1/..;/sleep",
        b"/v1\\sleep",
        b"/v1/models",
        b"/v1/models/x",
        b"/v1/load_lora_adapter",
        b"/v1/unload_lora_adapter?x",
        b"http://h/v1/../sleep",
        b"/V1/completions",
    ],
)
def test_everything_else_is_not(target: bytes) -> None:
    """Paths that an engine could read as its admin API are never passed on."""
    assert routes.inference(target) is None

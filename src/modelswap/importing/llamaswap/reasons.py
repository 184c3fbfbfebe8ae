"""Why a key of llama-swap's has no counterpart here. One table, so that it is easy to mend when it gets one."""

from __future__ import annotations

from typing import Final

MODEL: Final = {
    "unlisted": "every model is listed in /v1/models",
    "metadata": "/v1/models has the names only",
    "capabilities": "/v1/models has the names only",
    "sendLoadingState": "who waits on a stream is told its progress anyway, in comments (gateway.progress_after)",
    "timeouts": "modelswap has no time limit of its own on a running request",
    "filters.stripParams": "requests are passed on as they are",
    "filters.strip_params": "requests are passed on as they are",
    "filters.setParams": "requests are passed on as they are",
    "filters.setParamsByMatch": "requests are passed on as they are",
    "filters": "requests are passed on as they are",
}
FILE: Final = {
    "startPort": "engines get free ports by themselves (orchestrator.engine_ports)",
    "logLevel": "there is no such setting",
    "logTimeFormat": "logs are JSON with ISO times",
    "logToStdout": "engines log to files of their own: modelswap logs MODEL",
    "logRequests": "requests are counted (/metrics), not logged",
    "metricsMaxInMemory": "metrics are Prometheus's",
    "captureBuffer": "requests are never kept",
    "store": "modelswap keeps its history in its state folder (orchestrator.state_dir)",
    "ui": "there is no such page",
    "performance": "see /metrics",
    "sendLoadingState": MODEL["sendLoadingState"],
    "includeAliasesInList": "aliases are always listed",
    "upstream": "there is no /upstream path",
    "profiles": "names can't be rewritten at run time; aliases are fixed",
    "hooks": "nothing happens then; a model's own hooks are for its loads and unloads",
    "peers": "only engines that modelswap starts are served; put a router in front for others",
}


def why_lost(table: dict[str, str], key: str) -> str:
    """Return why ``key`` (dotted, within its section) is not carried over."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if reason := table.get(".".join(parts[:length])):
            return reason
    return "not a key that is known here"

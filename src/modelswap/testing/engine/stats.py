"""What a simulated engine counts."""

from __future__ import annotations

import msgspec


class Stats(msgspec.Struct, kw_only=True):
    """Counted since the start.

    ``requests``: inference requests, of which ``running`` run now and ``waiting`` wait for a slot or for the engine to
    wake. ``cancelled``: given up because the client had left. ``misrouted``: named a model that is not served here.
    ``connections``: accepted ever; ``open_connections``: now. ``health``: polls.
    """

    requests: int = 0
    running: int = 0
    peak_running: int = 0
    waiting: int = 0
    answered: int = 0
    cancelled: int = 0
    misrouted: int = 0
    connections: int = 0
    open_connections: int = 0
    health: int = 0


class Report(msgspec.Struct, kw_only=True):
    """Answers ``GET /sim/stats``."""

    model: str
    instance: str
    pid: int
    child: int | None
    ready: bool
    asleep: bool
    stats: Stats


def loads(stats: Stats) -> bytes:
    """Return what SGLang's ``/v1/loads`` says of load."""
    core = {"dp_rank": 0, "num_running_reqs": stats.running, "num_waiting_reqs": stats.waiting}
    return msgspec.json.encode({"version": "simulated", "dp_rank_count": 1, "loads": [core]})


def metrics(model: str, stats: Stats, sleep_level: int) -> bytes:
    """Return what vLLM's ``/metrics`` says of load and sleep."""
    label = f'engine="0",model_name="{model}"'
    states = {"awake": sleep_level == 0, "weights_offloaded": sleep_level == 1, "discard_all": sleep_level == 2}
    lines = [
        "# HELP vllm:num_requests_running Number of requests in model execution batches.",
        "# TYPE vllm:num_requests_running gauge",
        f"vllm:num_requests_running{{{label}}} {float(stats.running)}",
        "# HELP vllm:num_requests_waiting Number of requests waiting to be processed.",
        "# TYPE vllm:num_requests_waiting gauge",
        f"vllm:num_requests_waiting{{{label}}} {float(stats.waiting)}",
        "# HELP vllm:engine_sleep_state Engine sleep state.",
        "# TYPE vllm:engine_sleep_state gauge",
        *(
            f'vllm:engine_sleep_state{{{label},sleep_state="{state}"}} {float(value)}'
            for state, value in states.items()
        ),
        "# HELP vllm:request_success_total Count of successfully processed requests.",
        "# TYPE vllm:request_success_total counter",
        f'vllm:request_success_total{{{label},finished_reason="stop"}} {float(stats.answered)}',
    ]
    return ("\n".join(lines) + "\n").encode()

"""What relaying costs: CPU per request and per streamed event, of our gateway and of nginx, on the same core.

Both proxies stand before the same engine and get the same load in turns, so that whatever else the machine does hits
both. Each is pinned to one core; engine and load have the other. Ours has everything on: leases from an orchestrator
over a real WebSocket, metrics, request ids. nginx keeps its upstream connections, buffers no responses and logs
nothing. CPU is user and system time of the proxy's process, read from /proc.

Unary requests come from 32 connections of wrk: first each pauses 2 ms between requests, so that both proxies are
offered the same load, then wrk goes as fast as each proxy can. The ratio is the median over pairs of rounds that follow
each other, because what else a machine does slows both of a pair.

Needs nginx and wrk (Debian: apt install nginx-light wrk). Exits with 1 if a ratio is over the bar.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Final

BAR: Final = 1.4
ROUNDS: Final = 11
SECONDS: Final = 2
CONNECTIONS: Final = 32
STREAMS: Final = 48

_HERE: Final = Path(__file__).parent
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_WRK_SCRIPT: Final = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-none"
wrk.headers["Accept"] = "application/json"
wrk.headers["User-Agent"] = "OpenAI/Python 2.0.0"
local bodies = {{}}
for i = 1, 64 do
  bodies[i] = '{{"model":"bench","max_tokens":16,"temperature":0.2,"prompt":"' .. string.rep("word ", 4 * i) .. '"}}'
end
local n = 0
function request()
  n = n % 64 + 1
  return wrk.format(nil, nil, nil, bodies[n])
end
{pause}
"""
_NGINX_CONF: Final = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024; client_max_body_size 64m; client_body_buffer_size 64k;
    add_header X-Request-Id $request_id;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_buffering off;
      proxy_set_header Connection ""; proxy_set_header Host $proxy_host; proxy_set_header Authorization "";
      proxy_set_header X-Request-Id $request_id;
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Proxy:
    """One of the two."""

    name: str
    port: int
    pid: int

    def cpu(self) -> float:
        """User and system time so far, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


def main() -> int:
    cores = sorted(os.sched_getaffinity(0))
    proxy_core, load_core = cores[0], cores[-1]
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    wrk = shutil.which("wrk")
    if nginx is None or wrk is None:
        print("This benchmark needs nginx and wrk; on Debian: apt install nginx-light wrk", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modelswap-bench-")))
        engine, orchestrator, ours, theirs = _free_ports(4)
        (folder / "paced.lua").write_text(_WRK_SCRIPT.format(pause="function delay() return 2 end"))
        (folder / "flat.lua").write_text(_WRK_SCRIPT.format(pause=""))
        (folder / "nginx.conf").write_text(_NGINX_CONF.format(folder=folder, engine=engine, port=theirs))
        stack.enter_context(_python(load_core, "relay_engine.py", str(engine)))
        stack.enter_context(_python(load_core, "relay_orchestrator.py", str(orchestrator), str(engine)))
        gateway = stack.enter_context(
            _python(proxy_core, "relay_gateway.py", str(ours), str(orchestrator), str(folder / "metrics"))
        )
        command = [nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)]
        other = stack.enter_context(_process(proxy_core, command, wait_for_port=theirs))
        proxies = (Proxy("modelswap", ours, gateway.pid), Proxy("nginx", theirs, other.pid))

        def unary(script: str) -> Callable[[Proxy], int]:
            return lambda proxy: _wrk(load_core, wrk, folder / script, proxy)

        worst = 0.0
        print(f"CPU per item in µs, medians of {ROUNDS} rounds of {SECONDS} s in turns; core {proxy_core}")
        for title, load in (
            ("unary, same load", unary("paced.lua")),
            ("unary, saturated", unary("flat.lua")),
            ("streamed event", lambda proxy: _streams(load_core, proxy)),
        ):
            worst = max(worst, _compare(title, proxies, load))
    print(f"the bar is {BAR}: {'met' if worst <= BAR else 'missed'}")
    return 0 if worst <= BAR else 1


def _compare(title: str, proxies: Sequence[Proxy], load: Callable[[Proxy], int]) -> float:
    for proxy in proxies:
        load(proxy)  # warm up
    costs: dict[str, list[float]] = {proxy.name: [] for proxy in proxies}
    rates: dict[str, list[float]] = {proxy.name: [] for proxy in proxies}
    for n in range(ROUNDS):
        for proxy in proxies if n % 2 == 0 else reversed(proxies):
            cpu, began = proxy.cpu(), monotonic()
            items = load(proxy)
            costs[proxy.name].append((proxy.cpu() - cpu) / items * 1e6)
            rates[proxy.name].append(items / (monotonic() - began))
    ours, theirs = (median(costs[proxy.name]) for proxy in proxies)
    ratio = median(a / b for a, b in zip(*(costs[proxy.name] for proxy in proxies), strict=True))
    shown = "  ".join(
        f"{proxy.name} {cost:6.2f} at {median(rates[proxy.name]):7.0f}/s"
        for proxy, cost in zip(proxies, (ours, theirs), strict=True)
    )
    print(f"  {title:18} {shown}  ratio {ratio:.2f}", flush=True)
    return float(ratio)


def _wrk(core: int, wrk: str, script: Path, proxy: Proxy) -> int:
    url = f"http://127.0.0.1:{proxy.port}/v1/completions"
    command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "-s", str(script), url]
    out = subprocess.run(_pinned(core, command), check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        raise SystemExit(f"{proxy.name} did not answer everything:\n{out}")
    return next(int(line.split()[0]) for line in out.splitlines() if " requests in " in line)


def _streams(core: int, proxy: Proxy) -> int:
    command = [sys.executable, str(_HERE / "relay_load.py"), str(proxy.port), str(STREAMS), str(SECONDS)]
    return int(subprocess.run(_pinned(core, command), check=True, capture_output=True, text=True).stdout)


def _pinned(core: int, command: Sequence[str]) -> list[str]:
    return ["taskset", "-c", str(core), *command]


@contextmanager
def _python(core: int, script: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    with _process(core, [sys.executable, str(_HERE / script), *args]) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise SystemExit(f"{script} did not start")
        yield process


@contextmanager
def _process(core: int, command: Sequence[str], wait_for_port: int = 0) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(_pinned(core, command), stdout=subprocess.PIPE, text=True)
    try:
        while wait_for_port and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", wait_for_port)) == 0:
                    break
        yield process
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())

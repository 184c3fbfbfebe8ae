"""A vLLM server that has done all of its start that needs neither model nor GPU, and waits to be told the rest.

It runs in the engine's own Python and is copied or mounted there as one file, so it needs the standard library and vLLM
alone::

    python vllm_standby.py wait SOCKET [ARCHITECTURE …]    import everything, then wait for an order
    python vllm_standby.py tell SOCKET                     pass on the order that standard input holds

Most of a cold start is importing Python modules, in three processes one after the other and once more to look at the
model's class (measured with vLLM 0.32 and a 135M model on two cores: 25 of 31 s). Here they are imported once, while
nobody waits, and every process that follows is forked. Nothing is imported that initialises CUDA, and if something did
so all the same, this ends: a forked process could not use the GPU, and a waiting one would hold its memory.

An order is one line of JSON: ``argv`` as in a cold start, ``env`` (all of it, or with ``"add": true`` on top of ours),
``cwd``, and ``log``, a file that both outputs append to from then on. The answer is one line, too: ``{"taken": true}``,
or ``{"error": "…"}`` and the connection stays as useful as before. ``{"ask": "state"}`` is answered without effect.

Exit statuses before an order: 3, there is no vLLM here; 4, this vLLM lacks something that is relied on here (the last
line says what). Read in the sources of vLLM 0.9 to 0.32; what is relied on is checked when it is used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.util
import json
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

NO_VLLM = 3
UNFIT = 4

# What a server and its engine and worker processes import. What a version lacks is simply imported later.
MODULES = (
    "transformers.models.auto.modeling_auto",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.api_server.routers",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.core_client",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.structured_output",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.registry",
    "vllm.distributed.parallel_state",
    "vllm.tokenizers",
    "vllm.transformers_utils.processor",
)
WORKERS = {"cpu": "vllm.v1.worker.cpu_worker", "xpu": "vllm.v1.worker.xpu_worker"}
WORKER = "vllm.v1.worker.gpu_worker"


class Unfit(Exception):
    """Raised when the vLLM at hand can't be held on standby; the message says why."""


class Pacer(importlib.abc.MetaPathFinder):
    """Finds no module, and rests after each burst of imports for as long as that took.

    Others shall not notice that a standby is being made. A lower priority would be simpler, but only root may raise it
    again when the order comes.
    """

    def __init__(self, burst: float = 0.03) -> None:
        self.burst = burst
        self.rested = time.process_time()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Return None, perhaps after a rest."""
        used = time.process_time() - self.rested
        if used > self.burst:
            time.sleep(min(used, 2.0))
            self.rested = time.process_time()


def interpreter() -> str | None:
    """Return the Python that the command ``vllm`` runs in, if it isn't this one; None if there is none."""
    script = shutil.which("vllm")
    if script is None:
        return None
    try:
        with open(script, "rb") as file:
            first = file.readline(4096).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    words = first.removeprefix("#!").split()
    return words[0] if first.startswith("#!") and words and os.access(words[0], os.X_OK) else None


def prepare(architectures: list[str]) -> str:
    """Import all that can be; returns vLLM's version. Raises `Unfit`."""
    import vllm

    fork_processes()
    from vllm.platforms import current_platform

    wanted = [*MODULES, WORKERS.get(current_platform.device_type, WORKER)]
    for name in wanted:
        # A version that lacks one imports it under another name when it starts.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    inspect_in_forks()
    for architecture in architectures:
        with contextlib.suppress(Exception):  # a hint that leads nowhere costs time, nothing else
            import_model(architecture)
    check_device_untouched()
    return str(getattr(vllm, "__version__", "unknown"))


def fork_processes() -> None:
    """Have vLLM's processes forked, unless it has a reason of its own against it (CUDA in use, NUMA binding, WSL).

    Its CPU platform and its command line ask for ``spawn`` without one: they can't know that nothing is in the way.
    """
    try:
        from vllm.utils import system_utils as utils
    except ImportError:
        from vllm import utils
    has_reason = getattr(utils, "_maybe_force_spawn", None)
    if has_reason is None or not hasattr(utils, "get_mp_context"):
        raise Unfit("vLLM's get_mp_context or _maybe_force_spawn is not where it was")
    method = "VLLM_WORKER_MULTIPROC_METHOD"

    def context() -> Any:
        os.environ[method] = "fork"
        has_reason()
        return multiprocessing.get_context(os.environ[method])

    utils.get_mp_context = context


def inspect_in_forks() -> None:
    """Have vLLM look at a model's class in a fork instead of a new Python that imports everything once more."""
    from vllm.model_executor.models import registry

    original = getattr(registry, "_run_in_subprocess", None)
    if original is None:
        return

    def run(function: Callable[[], object]) -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "answer")
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    with open(path, "wb") as file:
                        pickle.dump(function(), file)
                    status = 0
                finally:
                    os._exit(status)
            _, status = os.waitpid(child, 0)
            if status:
                return original(function)  # says what is wrong in the usual words
            with open(path, "rb") as file:
                return pickle.load(file)

    registry._run_in_subprocess = run


def import_model(architecture: str) -> None:
    """Import the module that serves a model architecture, as its ``config.json`` names it."""
    from vllm.model_executor.models import registry

    module, _ = registry._VLLM_MODELS[architecture]
    importlib.import_module(f"vllm.model_executor.models.{module}")


def check_device_untouched() -> None:
    """Raise `Unfit` if an import has initialised CUDA."""
    import torch

    if torch.cuda.is_initialized():
        raise Unfit("an import initialised CUDA")


def order_from(path: str, version: str) -> dict[str, Any]:
    """Wait at a Unix socket until an order comes, and acknowledge it."""
    folder, name = os.path.split(os.path.abspath(path))
    home = os.getcwd()
    # A socket's path may be 107 bytes long only; relative to its folder it is short.
    os.chdir(folder)
    with socket.socket(socket.AF_UNIX) as listener:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        listener.bind(name)
        os.chdir(home)
        listener.listen(8)
        print(f"standby: ready, vLLM {version}", file=sys.stderr, flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(10.0)
                order, answer = understood(connection.makefile("rb").readline(), version)
                connection.sendall(json.dumps(answer).encode() + b"\n")
                if order is not None:
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                    return order


def understood(line: bytes, version: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the order in a line, if it is one, and what is to be answered."""
    try:
        said = json.loads(line)
        if said.get("ask") == "state":
            return None, {"ready": True, "version": version, "pid": os.getpid()}
        argv, env, cwd = said["argv"], said["env"], said.get("cwd")
        if not (isinstance(argv, list) and all(isinstance(word, str) for word in argv) and len(argv) > 1):
            raise ValueError("argv is not a list of at least two words")
        if not all(isinstance(name, str) and isinstance(value, str) for name, value in env.items()):
            raise ValueError("env is not names and values")
        if cwd is not None and not os.path.isdir(cwd):
            raise ValueError(f"cwd {cwd} is no folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, {"error": f"{type(error).__name__}: {error}"}
    return said, {"taken": True}


def become(order: dict[str, Any]) -> None:
    """Be the server that was ordered; ends as that does."""
    if not order.get("add"):
        os.environ.clear()
    os.environ.update(order["env"])
    if order.get("cwd"):
        os.chdir(order["cwd"])
    if order.get("log"):
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    argv = unwrapped(order["argv"])
    with contextlib.suppress(ImportError):  # vLLM brings it; without it, ps shows how the standby was started
        import setproctitle

        setproctitle.setproctitle(" ".join(argv))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if argv[1] == "-m":
        sys.argv = [argv[2], *argv[3:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
        return
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(shutil.which(argv[0]) or argv[0]))
    from vllm.entrypoints.cli.main import main

    sys.exit(main())


def unwrapped(argv: list[str]) -> list[str]:
    """Return ``argv`` without what only wraps the program (``uv run``, a script that is an image's entrypoint)."""
    at = next((number for number, word in enumerate(argv) if word in ("-m", "serve")), 1)
    return argv[max(at - 1, 0) :]


def wait(path: str, architectures: list[str]) -> None:
    """Get ready, wait, and become what is ordered."""
    if importlib.util.find_spec("vllm") is None:
        other = interpreter()
        if other is None or os.environ.get("MODELSWAP_STANDBY_PYTHON"):
            print("standby: there is no vLLM in this Python, nor on PATH", file=sys.stderr)
            sys.exit(NO_VLLM)
        os.environ["MODELSWAP_STANDBY_PYTHON"] = other
        os.execv(other, [other, os.path.abspath(__file__), "wait", path, *architectures])  # noqa: S606
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # as PID 1 of a container it would be ignored
    pacer = Pacer()
    sys.meta_path.insert(0, pacer)
    try:
        version = prepare(architectures)
    except Unfit as reason:
        print(f"standby: {reason}", file=sys.stderr)
        sys.exit(UNFIT)
    finally:
        sys.meta_path.remove(pacer)
    order = order_from(path, version)
    become(order)


def tell(path: str) -> None:
    """Pass an order on and print the answer; ends with status 1 if it wasn't taken."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30.0)
        os.chdir(os.path.dirname(os.path.abspath(path)))
        connection.connect(os.path.basename(path))
        connection.sendall(sys.stdin.buffer.readline().rstrip(b"\n") + b"\n")
        answer = connection.makefile("rb").readline()
    sys.stdout.write(answer.decode())
    sys.exit(0 if json.loads(answer or b"{}").get("error") is None and answer else 1)


if __name__ == "__main__":
    del sys.path[0]  # our own folder, which may hold anything, a module called vllm included
    if len(sys.argv) >= 3 and sys.argv[1] == "wait":
        wait(sys.argv[2], sys.argv[3:])
    elif len(sys.argv) == 3 and sys.argv[1] == "tell":
        tell(sys.argv[2])
    else:
        sys.exit(__doc__)

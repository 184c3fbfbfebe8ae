"""A vLLM server that has done all of its start that needs neither model nor GPU, and waits to be told the rest.

It runs in the engine's own Python and is copied or mounted there as one file, so it needs the standard library and vLLM
alone::

    python vllm_standby.py wait SOCKET [WORD …]     import everything, then wait for an order
    python vllm_standby.py tell SOCKET              pass on the order that standard input holds

A word is an architecture whose module is imported, too, or ``--program=vllm``: the script that a cold start would run,
which says what Python to wait in. Blank words only make room for the server's process title.

Most of a cold start is importing Python modules, in three processes one after the other and once more to look at the
model's class (measured with vLLM 0.32 and a 135M model on two cores: 25 of 31 s). Here they are imported once, while
nobody waits, and every process that follows is forked. Nothing is imported that initialises CUDA, and if something did
so all the same, this ends: a forked process could not use the GPU, and a waiting one would hold its memory.

An order is one line of JSON: ``argv`` as in a cold start, ``env`` (all of it, or with ``"add": true`` on top of ours,
without the names in ``unset``), ``cwd``, and ``log``, a file that both outputs append to from then on. What the imports
themselves, or whatever wraps our Python, have made of the environment stays, as it would in a cold start. The answer is
one line, too: ``{"taken": true}``, or ``{"error": "…"}`` and the connection stays as useful as before.
``{"ask": "state"}`` is answered without effect.

Exit statuses before an order: 3, there is no vLLM here; 4, this vLLM lacks something that is relied on here, or another
one has been installed since (the last line says what). Read in the sources of vLLM 0.9 to 0.32; what is relied on is
checked when it is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.abc
import importlib.util
import json
import multiprocessing
import os
import pickle
import platform
import runpy
import select
import shlex
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
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

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
OTHER_PYTHON = "MODELSWAP_STANDBY_PYTHON"
PROGRAM = "--program="
LOWEST = 19
LOOK_EVERY = 30.0
"""How often it is looked whether what was imported is still what is installed, in seconds."""
INSPECT_WITHIN = 60.0
"""How long a fork may look at a model's class, in seconds; it takes one or two."""
CUDA_NOT_INITIALISED = 3
IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
IO_IDLE = 3 << 13


class Unfit(Exception):
    """Raised when the vLLM at hand can't be held on standby; the message says why."""


class Background(importlib.abc.MetaPathFinder):
    """Has what is imported meanwhile go on without others noticing; finds no module.

    At the lowest priority for the first minute, if that can be undone when the order comes, which takes root
    (CAP_SYS_NICE) or a limit that allows it. Then, since on a busy machine it would never be done, and where it can't
    be undone: at the usual one, with a rest after each burst of imports for as long as that took. Disk reads wait for
    everybody else's in any case. Where the kernel shares time out between sessions (autogroup), ours is set back.
    """

    def __init__(self, patience: float = 60.0, burst: float = 0.03) -> None:
        self.patience = patience
        self.burst = burst
        self.usual = os.getpriority(os.PRIO_PROCESS, 0)
        self.lowered = self.stuck = False
        self.group: int | None = None
        self.began = self.rested = 0.0
        self.disks = 0

    def __enter__(self) -> None:
        self.began, self.rested = time.monotonic(), time.process_time()
        self.lowered = can_come_back(self.usual)
        if self.lowered:
            os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
        self.group = group_priority(LOWEST)
        self.disks = io_priority(0)
        io_priority(0, IO_IDLE)
        sys.meta_path.insert(0, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        self.rise()
        for thread in threads():
            io_priority(thread, self.disks)
        if self.stuck or any(priority(thread) not in (self.usual, None) for thread in threads()):
            raise Unfit("its priority can't be made what it was")

    def rise(self) -> None:
        """Go back to the usual priority, with all threads that imports have started."""
        if self.group is not None:
            self.stuck = group_priority(self.group) is None
            self.group = None
        if self.lowered:
            self.lowered = False
            for thread in threads():
                with contextlib.suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread, self.usual)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Return None, perhaps after a rest."""
        if time.monotonic() - self.began > self.patience:
            self.rise()
        if self.lowered:
            return
        used = time.process_time() - self.rested
        if used > self.burst:
            time.sleep(min(used, 2.0))
            self.rested = time.process_time()


def can_come_back(usual: int) -> bool:
    """Return whether we may leave the lowest priority again; tried out in a process of its own."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, LOWEST)
            os.setpriority(os.PRIO_PROCESS, 0, usual)
            status = 0
        os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def threads() -> list[int]:
    """Return our threads; none where the system doesn't tell."""
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return []


def priority(thread: int) -> int | None:
    """Return a thread's nice value; None if it has ended."""
    try:
        return os.getpriority(os.PRIO_PROCESS, thread)
    except ProcessLookupError:
        return None


def group_priority(nice: int) -> int | None:
    """Give our session's group of processes another nice value; returns the one before, None if there are no groups."""
    name = "/proc/self/autogroup"
    try:
        with open(name) as file:
            before = int(file.read().split()[-1])  # "/autogroup-25 nice 0"
        for tried in range(100):
            try:
                with open(name, "w") as file:
                    file.write(str(nice))
                return before
            except BlockingIOError:  # the kernel lets one process in a tenth of a second do this
                if tried == 99:
                    raise
                time.sleep(0.05)
    except (OSError, ValueError, IndexError):
        pass
    return None


def io_priority(thread: int, level: int | None = None) -> int:
    """Return a thread's (0: ours) priority at the disks, as far as this system knows that; with a ``level``, set it."""
    number = IOPRIO_SET.get(platform.machine())
    if number is None or sys.platform != "linux":
        return 0
    system = ctypes.CDLL(None).syscall
    if level is not None:
        system(number, 1, thread, level)
    return max(int(system(number + 1, 1, thread)), 0)  # ioprio_get has the next number on both


def interpreter(script: str, path: str | None = None) -> list[str]:
    """Return the command of the Python that a script runs in, by its first line; empty if that isn't a Python.

    ``path`` is where programs are looked for (by default PATH).
    """
    found = shutil.which(script, path=path)
    if found is None:
        return []
    try:
        with open(found, "rb") as file:
            first, second = (file.readline(4096).decode().strip() for _ in range(2))
        words = shlex.split(first[2:]) if first.startswith("#!") else []
        if words and os.path.basename(words[0]) == "sh" and second.startswith("'''exec'"):
            words = shlex.split(second)[1:-2]  # what pip and uv write where the path is long or has blanks
        elif words and os.path.basename(words[0]) == "env":
            words = [word for word in words[1:] if word != "-S"]
    except (OSError, ValueError):
        return []
    program = shutil.which(words[0], path=path) if words else None
    if program is None or not os.path.basename(program).startswith(("python", "pypy")):
        return []
    return [program, *words[1:]]


def prepare(architectures: list[str]) -> str:
    """Import all that can be; returns vLLM's version. Raises `Unfit`."""
    told = os.environ.get(METHOD)
    import vllm

    original = fork_processes(told)
    from vllm.platforms import current_platform

    wanted = [*MODULES, WORKERS.get(current_platform.device_type, WORKER)]
    for name in wanted:
        # A version that lacks one imports it under another name when it starts.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if original is not None:
        replace_everywhere("get_mp_context", *original)
    inspect_in_forks()
    for architecture in architectures:
        with contextlib.suppress(Exception):  # a hint that leads nowhere costs time, nothing else
            import_model(architecture)
    check_device_untouched()
    return str(getattr(vllm, "__version__", "unknown"))


def fork_processes(told: str | None) -> tuple[object, object] | None:
    """Have vLLM's processes forked, unless it has a reason of its own against it (CUDA in use, NUMA binding, WSL).

    Its CPU platform and its command line ask for ``spawn`` without one: they can't know that nothing is in the way.
    What the user has ``told`` in the environment is another matter, and holds. Returns what was replaced by what.
    """
    try:
        from vllm.utils import system_utils as utils
    except ImportError:
        from vllm import utils
    has_reason, original = getattr(utils, "_maybe_force_spawn", None), getattr(utils, "get_mp_context", None)
    if has_reason is None or original is None:
        raise Unfit("vLLM's get_mp_context or _maybe_force_spawn is not where it was")
    if told is not None:
        return None
    # ROCm: which devices are visible is said by two variables that must agree.
    agree = getattr(utils, "_sync_visible_devices_env_vars", None)

    def context() -> Any:
        os.environ[METHOD] = "fork"
        has_reason()
        if agree is not None:
            agree()
        return multiprocessing.get_context(os.environ[METHOD])

    utils.get_mp_context = context
    os.register_at_fork(after_in_child=begin_anew)
    return original, context


def begin_anew() -> None:
    """Undo in a forked process what a new one wouldn't have from its parent."""
    # Older versions write their process's name before each line by wrapping these.
    for file in (sys.stdout, sys.stderr):
        for name in ("write", "_original_write", "start_new_line"):
            getattr(file, "__dict__", {}).pop(name, None)
    # Python's own generator does this by itself.
    generator = getattr(sys.modules.get("numpy"), "random", None)
    if generator is not None:
        generator.seed()


def replace_everywhere(name: str, original: object, ours: object) -> None:
    """Put ``ours`` wherever ``original`` was imported by its name already."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get(name) is original:
            setattr(module, name, ours)


def inspect_in_forks() -> None:
    """Have vLLM look at a model's class in a fork instead of a new Python that imports everything once more."""
    from vllm.model_executor.models import registry

    original = getattr(registry, "_run_in_subprocess", None)
    if original is None:
        return

    def run(function: Callable[[], object]) -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "answer")
            if not done_in_fork(function, path):
                return original(function)  # says what is wrong in the usual words
            with open(path, "rb") as file:
                return pickle.load(file)

    registry._run_in_subprocess = run


def done_in_fork(function: Callable[[], object], path: str) -> bool:
    """Return whether a fork has called ``function`` and written to ``path`` what it returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks of whoever has threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(path, "wb") as file:
                pickle.dump(function(), file)
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + INSPECT_WITHIN
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        if time.monotonic() > deadline:  # some thread held a lock at the fork
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.005)


def import_model(architecture: str) -> None:
    """Import the module that serves a model architecture, as its ``config.json`` names it."""
    from vllm.model_executor.models import registry

    module, _ = registry._VLLM_MODELS[architecture]
    importlib.import_module(f"vllm.model_executor.models.{module}")


def check_device_untouched() -> None:
    """Raise `Unfit` if an import has initialised CUDA (or what others have in its place).

    torch only knows of what went through its own initialisation; asking it whether there are GPUs at all may be enough
    to make forks useless. So the driver is asked as well, if it is loaded: every call fails before it is initialised.
    """
    import torch

    if torch.cuda.is_initialized():
        raise Unfit("an import initialised CUDA")
    if hasattr(torch, "xpu") and torch.xpu.is_initialized():
        raise Unfit("an import initialised XPU")
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1", mode=getattr(os, "RTLD_NOLOAD", 0) | os.RTLD_NOW)
        if driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != CUDA_NOT_INITIALISED:
            raise Unfit("an import initialised the CUDA driver")
    if "/dev/kfd" in open_files():
        raise Unfit("an import opened the AMD device")


def open_files() -> set[str]:
    """Return the names of the files that we have open; none where the system doesn't tell."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f"/proc/self/fd/{name}"))
    return found


class Installed:
    """The files that our modules came from, as they were: all of vLLM's, and the first one of every other package."""

    def __init__(self) -> None:
        files = {os.path.realpath(sys.executable), os.path.join(sys.prefix, "pyvenv.cfg")}
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and ("." not in name or name.startswith("vllm.")):
                files.add(os.path.abspath(file))
        self.files = {file: self.facts(file) for file in files}

    @staticmethod
    def facts(file: str) -> tuple[int, int, int] | None:
        """Return what changes when a file is replaced; None if it isn't there."""
        try:
            found = os.stat(file)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def check(self) -> None:
        """Raise `Unfit` if one of them isn't what was imported."""
        for file, facts in self.files.items():
            if self.facts(file) != facts:
                raise Unfit(f"{file} has been replaced since it was imported")


def order_from(path: str, version: str) -> dict[str, Any]:
    """Wait at a Unix socket until an order comes, and acknowledge it; raises `Unfit` if another vLLM is installed."""
    installed = Installed()
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
            if not select.select([listener], [], [], LOOK_EVERY)[0]:
                installed.check()
                continue
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(10.0)
                order, answer = understood(connection.makefile("rb").readline(), version)
                if order is not None:
                    try:
                        installed.check()
                    except Unfit as reason:
                        connection.sendall(json.dumps({"error": str(reason)}).encode() + b"\n")
                        raise
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
        argv, env, cwd, unset = said["argv"], said["env"], said.get("cwd"), said.get("unset", [])
        if not (isinstance(argv, list) and all(isinstance(word, str) for word in argv) and len(argv) > 1):
            raise ValueError("argv is not a list of at least two words")
        if not all(isinstance(name, str) and isinstance(value, str) for name, value in env.items()):
            raise ValueError("env is not names and values")
        if not (isinstance(unset, list) and all(isinstance(name, str) for name in unset)):
            raise ValueError("unset is not a list of names")
        if cwd is not None and not os.path.isdir(cwd):
            raise ValueError(f"cwd {cwd} is no folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, {"error": f"{type(error).__name__}: {error}"}
    return said, {"taken": True}


def take_environment(order: Mapping[str, Any], began: Mapping[str, str]) -> None:
    """Change what the order changes of the environment that we ``began`` with.

    vLLM sets variables when it is imported (PYTORCH_NVML_BASED_CUDA_CHECK among them, without which asking for GPUs
    initialises CUDA, and nothing can be forked any more); those stay.
    """
    env: dict[str, str] = order["env"]
    gone = order.get("unset", []) if order.get("add") else [name for name in began if name not in env]
    for name in gone:
        os.environ.pop(name, None)
    for name, value in env.items():
        if began.get(name) != value:
            os.environ[name] = value


def become(order: dict[str, Any], began: Mapping[str, str]) -> None:
    """Be the server that was ordered; ends as that does."""
    if order.get("log"):
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    take_environment(order, began)
    if order.get("cwd"):
        os.chdir(order["cwd"])
    argv = unwrapped(order["argv"])
    if (port := port_of(argv)) is not None:
        os.register_at_fork(after_in_child=lambda: let_go(port))
    if argv[1] == "-m":
        be_called(["-m", *argv[2:]])
        if not isolated():
            sys.path.insert(0, os.getcwd())
        sys.argv = [argv[2], *argv[3:]]
        # Something may have imported it on the way; a cold start imports it once, as its main program.
        sys.modules.pop(argv[2], None)
        runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
        return
    script = shutil.which(argv[0]) or argv[0]
    be_called([script, *argv[1:]], name=os.path.basename(script))
    if not isolated():
        sys.path.insert(0, os.path.dirname(os.path.realpath(script)))
    sys.argv = [script, *argv[1:]]
    if interpreter(script):
        runpy.run_path(script, run_name="__main__")
        return
    from vllm.entrypoints.cli.main import main

    sys.exit(main())


def port_of(argv: list[str]) -> int | None:
    """Return the port that a command line tells the server to listen on; the last one counts."""
    said = [argv[at + 1] for at, word in enumerate(argv[:-1]) if word == "--port"]
    said += [word.removeprefix("--port=") for word in argv if word.startswith("--port=")]
    return int(said[-1]) if said and said[-1].isdecimal() else None


def let_go(port: int) -> None:
    """Let go of the sockets at a port of ours; for forked processes, as new ones wouldn't have them.

    The server binds its port before it starts the others. If one of them outlived it with that, whoever connects would
    wait for an answer instead of being refused.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError, IndexError):
            number = int(name)
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as copy:
                bound = copy.getsockname()
            if isinstance(bound, tuple) and bound[1] == port:
                os.dup2(nothing, number)  # some object still owns the number, and may close it
    os.close(nothing)


def isolated() -> bool:
    """Return whether this Python was told to look for modules in no folder beside its own (-I, -P)."""
    return bool(sys.flags.isolated or getattr(sys.flags, "safe_path", False))


def started_as() -> list[str]:
    """Return our own command, the options of this Python included; before 3.10 only the Python is known."""
    return list(getattr(sys, "orig_argv", [sys.executable]))


def be_called(words: list[str], name: str | None = None) -> None:
    """Show ``words`` after our Python's own command as what runs here, and ``name`` as the name of the process.

    vLLM brings what that takes; without it, ps shows how the standby was started.
    """
    started = started_as()
    own = next((at for at, word in enumerate(started) if os.path.abspath(word) == os.path.abspath(__file__)), 1)
    with contextlib.suppress(OSError), open("/proc/self/comm") as file:
        name = name or file.read().strip()
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(" ".join([*started[:own], *words]))
    if name:
        # Setting a title has changed it.
        with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
            file.write(name)


def unwrapped(argv: list[str]) -> list[str]:
    """Return ``argv`` without what only wraps the program (``uv run``, a script that is an image's entrypoint)."""
    at = next((number for number, word in enumerate(argv) if word in ("-m", "serve")), 1)
    return argv[max(at - 1, 0) :]


def wait(path: str, words: list[str]) -> None:
    """Get ready, wait, and become what is ordered."""
    programs = [word.removeprefix(PROGRAM) for word in words if word.startswith(PROGRAM)]
    architectures = [word for word in words if word.strip() and not word.startswith("-")]
    moved = os.environ.pop(OTHER_PYTHON, None)
    other = next((found for program in programs if (found := interpreter(program))), [])
    if importlib.util.find_spec("vllm") is None:
        other = other or interpreter("vllm")
        if not other or moved:
            print("standby: there is no vLLM in this Python, nor on PATH", file=sys.stderr)
            sys.exit(NO_VLLM)
    if other and not moved and other != started_as()[: len(other)]:
        # The words are compared, not what they lead to: the Pythons of several environments lead to the same.
        os.environ[OTHER_PYTHON] = other[0]
        os.execv(other[0], [*other, os.path.abspath(__file__), "wait", path, *words])  # noqa: S606
    began = dict(os.environ)
    usual = signal.getsignal(signal.SIGTERM)
    first = os.getpid() == 1
    if first:  # the first process of a container isn't ended by what it doesn't handle
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        with Background():
            version = prepare(architectures)
        order = order_from(path, version)
    except Unfit as reason:
        print(f"standby: {reason}", file=sys.stderr)
        sys.exit(UNFIT)
    if first:
        signal.signal(signal.SIGTERM, usual)
    become(order, began)


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
    if not isolated():
        del sys.path[0]  # our own folder, which may hold anything, a module called vllm included
    if len(sys.argv) >= 3 and sys.argv[1] == "wait":
        wait(sys.argv[2], sys.argv[3:])
    elif len(sys.argv) == 3 and sys.argv[1] == "tell":
        tell(sys.argv[2])
    else:
        sys.exit(__doc__)

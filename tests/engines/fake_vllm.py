"""A package that passes for vLLM where one waits for its model.

It writes down what it finds, and ends as ``FAKE_END`` says.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Final

MODULE: Final = "vllm.entrypoints.openai.api_server"

_FILES: Final = {
    "vllm/__init__.py": """
        import os
        __version__ = "9.9"
        # As vLLM's env_override does.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    """,
    "vllm/utils/__init__.py": "",
    "vllm/utils/system_utils.py": """
        import multiprocessing, os

        def _maybe_force_spawn():
            if "--numa-bind" in os.sys.argv:
                os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

        def get_mp_context():
            _maybe_force_spawn()
            return multiprocessing.get_context(os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork"))
    """,
    "vllm/platforms/__init__.py": """
        import types
        from vllm import early
        current_platform = types.SimpleNamespace(device_type="cpu")
    """,
    "vllm/early.py": "from vllm.utils.system_utils import get_mp_context",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/models/__init__.py": "",
    "vllm/model_executor/models/registry.py": """
        _VLLM_MODELS = {}

        def _run_in_subprocess(function):
            return "in a new Python"
    """,
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/openai/__init__.py": "",
    "vllm/entrypoints/openai/cli_args.py": "from vllm.entrypoints.openai import api_server",
    "vllm/entrypoints/openai/api_server.py": """
        if __name__ == "__main__":
            from vllm.server import main
            main()
    """,
    "vllm/entrypoints/cli/__init__.py": "",
    "vllm/entrypoints/cli/main.py": """
        def main():
            from vllm.server import main
            return main()
    """,
    "vllm/server.py": """
        import atexit, ctypes, json, os, resource, signal, socket, sys, threading, warnings

        def links():
            found = {}
            for name in os.listdir("/proc/self/fd"):
                try:
                    found[name] = os.readlink(f"/proc/self/fd/{name}")
                except OSError:
                    pass
            return found

        def title():
            import setproctitle
            if setproctitle.title is not None:
                return setproctitle.title
            with open("/proc/self/cmdline") as file:
                return file.read().rstrip("\\0").replace("\\0", " ")

        def status(*names):
            with open("/proc/self/status") as file:
                lines = dict(line.split(":", 1) for line in file)
            return {name: lines[name].strip() for name in names}

        def read(name):
            with open(f"/proc/self/{name}") as file:
                return file.read().strip()

        def facts():
            main = sys.modules["__main__"]
            death = ctypes.c_int(-1)
            ctypes.CDLL(None).prctl(2, ctypes.byref(death), 0, 0, 0)
            files = links()
            umask = os.umask(0)
            os.umask(umask)
            return {
                "argv": sys.argv,
                "path": sys.path,
                "environ": {name: value for name, value in os.environ.items() if not name.startswith("MODELSWAP_")},
                "instance": "MODELSWAP_INSTANCE" in os.environ and not os.environ["MODELSWAP_INSTANCE"].startswith("s"),
                "cwd": os.getcwd(),
                "umask": umask,
                "main": [main.__name__, main.__file__, getattr(main.__spec__, "name", None)],
                "flags": str(sys.flags),
                "stdin": files["0"],
                "outputs": [files["1"] == files["2"], os.path.basename(os.path.dirname(files["1"]))],
                "streams": [
                    [f.fileno(), f.isatty(), f.line_buffering, f.encoding, f.errors, f.mode]
                    for f in (sys.stdin, sys.stdout, sys.stderr)
                ],
                "files": sorted(files),
                "signals": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
                "status": status("SigBlk", "SigIgn", "SigCgt", "Threads", "NoNewPrivs", "CapEff", "Cpus_allowed"),
                "limits": [resource.getrlimit(number) for number in range(16)],
                "oom": [read("oom_score_adj"), read("coredump_filter")],
                "nice": [os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")],
                "io": ctypes.CDLL(None).syscall(252 if os.uname().machine == "x86_64" else 31, 1, 0),
                "scheduler": os.sched_getscheduler(0),
                "session": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid(), os.getppid()],
                "death": death.value,
                "name": read("comm"),
                "title": title(),
                "warnings": [str(one) for one in warnings.filters],
                "hooks": [sys.excepthook is sys.__excepthook__, threading.excepthook is threading.__excepthook__],
                "finders": [getattr(finder, "__name__", type(finder).__name__) for finder in sys.meta_path],
            }

        def main():
            atexit.register(lambda: print("at exit", flush=True))
            from vllm.early import get_mp_context
            found = facts()
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # so does its command line
            print("method", get_mp_context().get_start_method())
            with open("facts.json", "w") as file:
                json.dump(found, file)
            print("facts", flush=True)
            match os.environ.get("FAKE_END", ""):
                case "exit":
                    sys.exit(7)
                case "say":
                    sys.exit("it was said")
                case "raise":
                    raise RuntimeError("it went wrong")
                case "signal":
                    os.kill(os.getpid(), signal.SIGSEGV)
                case "return":
                    return
                case "fork":
                    server = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
                    other = socket.create_server(("127.0.0.1", 0))
                    child = os.fork()
                    held = [name for name in links().values() if name.startswith("socket:")]
                    print("parent" if child else "child", len(held), flush=True)
            signal.pause()
    """,
    "torch/__init__.py": """
        import os, types
        cuda = types.SimpleNamespace(is_initialized=lambda: bool(os.environ.get("FAKE_CUDA")))
    """,
    "setproctitle.py": """
        title = None

        def setproctitle(text):
            global title
            title = text
            with open("/proc/self/comm", "w") as file:  # so does the real one
                file.write(text[:15])
    """,
    "transformers/__init__.py": "",
}


def write_to(folder: Path) -> Path:
    """Write the package, and a script ``bin/vllm`` beside it; returns that."""
    for name, text in _FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    script = folder / "bin" / "vllm"
    script.parent.mkdir(exist_ok=True)
    lines = [f"#!{sys.executable}", "import sys", "from vllm.entrypoints.cli.main import main", "sys.exit(main())"]
    script.write_text("\n".join(lines) + "\n")
    script.chmod(0o755)
    return script

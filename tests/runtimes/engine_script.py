"""A stand-in engine for the runtime's tests, run as ``python engine_script.py BEHAVIOUR [ARGUMENT]``.

Says ``ready`` in its log once it does what it was asked to. Needs nothing but the standard library, so that it starts
fast and in any container.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path


def say(*words: object) -> None:
    """Log a line."""
    sys.stdout.write(" ".join(str(word) for word in words) + "\n")
    sys.stdout.flush()


def is_open(number: int) -> bool:
    """Return whether we have this descriptor."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def idle() -> None:
    """Do nothing until a signal ends it."""
    while True:
        signal.pause()


def fork_away() -> bool:
    """Fork a child with a session of its own; returns True in the child, and in the parent once the child is set up."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.write(writer, b"!")
        return True
    os.read(reader, 1)
    say("child", child)
    return False


def main(behaviour: str, argument: str) -> None:
    """Behave."""
    match behaviour:
        case "obey":
            say("ready")
            idle()
        case "hold":
            held = bytearray(os.urandom(1)) * (int(argument) << 20)
            say("ready")
            idle()
            del held
        case "child-holds":
            if fork_away():
                main("hold", argument)
            idle()
        case "exit":
            say("leaving")
            sys.exit(int(argument))
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say("ready")
            idle()
        case "listen":
            with socket.create_server(("127.0.0.1", int(argument))):
                say("ready")
                idle()
        case "child-listens":
            if fork_away():
                with socket.create_server(("127.0.0.1", int(argument))):
                    say("ready")
                    idle()
            idle()
        case "child-stays":
            if fork_away():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                say("ready")
            idle()
        case "orphan":
            if fork_away():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                say("ready")
                idle()
        case "bare-child":
            if (child := os.fork()) == 0:
                os.execve(sys.executable, [sys.executable, "-S", "-E", __file__, "stubborn"], {})  # noqa: S606
            say("child", child)
            sys.exit(int(argument))
        case "say":
            say(argument)
            say("ready")
            idle()
        case "answer":
            port, word = argument.split(",")
            with socket.create_server(("0.0.0.0", int(port))) as server:
                say("ready")
                while True:
                    with server.accept()[0] as client:
                        client.sendall(word.encode())
        case "moment":
            say("moment", time.time_ns())
            say("ready")
            idle()
        case "eat":
            say("ready")
            eaten = []
            while True:
                eaten.append(b"." * 1_000_000)
        case "chatter":
            for number in range(int(argument)):
                say("line", number, "." * 100)
                if number % 50 == 0:
                    time.sleep(0.001)
            say("ready")
            idle()
        case "facts":
            say("session", os.getpid() == os.getsid(0) == os.getpgrp())
            say("descriptors", [number for number in range(64) if is_open(number)])
            say("stdin", Path("/proc/self/fd/0").readlink())
            say("folder", Path.cwd())
            for name in ("GREETING", "MODELSWAP_TOKEN", "MODELSWAP_INSTANCE", "MODELSWAP_ADDRESS", "SPT_NOENV"):
                say(name, os.environ.get(name))
            say("sighup", signal.getsignal(signal.SIGHUP) is signal.SIG_DFL)
            say("ready")
            idle()
        case _:
            sys.exit(64)


main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")

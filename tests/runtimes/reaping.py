"""Becomes a subreaper, leaves an orphan behind, and collects it: ``python reaping.py``. Says ``ok``."""

import os
import subprocess
import sys
import time

from modelswap.runtimes.reaper import become_subreaper, reap_orphans


def main() -> None:
    """Check it step by step; ends with an assertion's status if something is wrong."""
    assert become_subreaper()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            os.close(writer)
            os._exit(0)
        os.write(writer, b"%d" % grandchild)
        os._exit(0)
    orphan = int(os.read(reader, 100))
    ours = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    os.waitid(os.P_PID, ours.pid, os.WEXITED | os.WNOWAIT)
    assert os.waitpid(child, 0)[0] == child
    deadline = time.monotonic() + 30
    reaped: list[int] = []
    while orphan not in reaped:
        assert time.monotonic() < deadline
        reaped += reap_orphans({ours.pid})
    assert reaped == [orphan], reaped
    assert reap_orphans({ours.pid}) == []
    assert ours.wait() == 3
    sys.stdout.write("ok\n")


main()

"""What a simulated engine holds of the simulated device, while awake and while asleep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from modelswap.testing.engine.behaviour import Behaviour
from modelswap.testing.engine.options import Options, ledger_path
from modelswap.testing.ledger import Ledger, OutOfDeviceMemory

# Ends by a signal only; its own alarm at last, so that a test that was killed leaves nothing behind for ever.
_HOLDER = "import signal; signal.alarm(900)\nwhile True: signal.pause()"


class DeviceMemory:
    """Holds memory in the ledger for one instance, by this process or by a child of it."""

    def __init__(self, options: Options, instance: str) -> None:
        path = ledger_path(options)
        self._ledger = Ledger(path) if path else None
        self._instance = instance
        self._full = options.gpu_bytes
        self._residue = options.gpu_bytes // 20 if options.residue_bytes is None else options.residue_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self._leave_child = False
        self._weights = self._full * 3 // 5

    def load(self, behaviour: Behaviour) -> None:
        """Take all of it; raises `OutOfDeviceMemory`."""
        if behaviour.child is not None and self._child is None:
            self._leave_child = behaviour.child != "child"
            self._child = subprocess.Popen(
                [sys.executable, "-S", "-c", _HOLDER],
                stdin=subprocess.DEVNULL,
                start_new_session=behaviour.child == "session",
            )
        self._set(self._full, behaviour)

    def sleep(self, behaviour: Behaviour) -> None:
        """Give back all but the residue."""
        self._set(self._residue, behaviour, residue=True)

    def wake(self, behaviour: Behaviour, *, weights: bool, kv_cache: bool) -> None:
        """Take what is awake of weights and KV cache; raises `OutOfDeviceMemory`, if told so with all taken."""
        awake = (self._weights if weights else 0) + (self._full - self._weights if kv_cache else 0)
        try:
            self._set(max(awake, self._residue), behaviour)
        except OutOfDeviceMemory as error:
            if behaviour.no_rollback:
                self._set(max(error.free, self._residue), behaviour)
            raise

    def delay_release(self, seconds: float) -> None:
        """From now on, have memory come back late."""
        if self._ledger is not None:
            self._ledger.delay_release(seconds, instance=self._instance)

    def release(self, *, clean: bool = True) -> None:
        """Give up what a process gives up by ending; not ``clean``: by being killed, which a child always survives."""
        if self._child is not None:
            if self._leave_child or not clean:
                return
            self.end_child()
        if self._ledger is not None:
            self._ledger.release(instance=self._instance)

    def end_child(self) -> None:
        """Kill the child, whoever was to do that."""
        if self._child is not None:
            self._child.send_signal(signal.SIGKILL)
            self._child.wait()

    @property
    def child(self) -> int | None:
        """The PID of the child that holds the memory, if there is one."""
        return None if self._child is None else self._child.pid

    def _set(self, size: int, behaviour: Behaviour, *, residue: bool = False) -> None:
        if self._ledger is None:
            return
        self._ledger.allocate(
            size,
            instance=self._instance,
            pid=self.child or os.getpid(),
            name="sim-engine-core" if self._child else "sim-engine",
            residue=residue,
            release_delay=behaviour.late_release,
        )

"""What all tests stand on."""

from __future__ import annotations

import signal

# A shell's background jobs and `nohup` ignore these, and whatever a test starts would inherit that.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

"""Runs the server."""

import os
import sys

from modelswap.engines.openvino_server.main import main

if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Tearing down OpenVINO costs time that a swap waits for, and the kernel frees the memory anyway.
    os._exit(status)

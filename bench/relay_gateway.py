"""The gateway under test, as it runs in earnest: ports of its own and of its orchestrator, folder for metrics."""

import sys
from pathlib import Path

from modelswap.gateway.main import run
from modelswap.spec.config import Config, Gateway, Model

if __name__ == "__main__":
    config = Config(
        models={"bench": Model(engine="custom", command=["unused"])},
        gateway=Gateway(port=int(sys.argv[1])),
    )
    sys.exit(
        run(
            config,
            worker=0,
            orchestrator_url=f"http://127.0.0.1:{sys.argv[2]}",
            token="bench",  # noqa: S106 - nobody checks it
            metrics_folder=Path(sys.argv[3]),
            ready=lambda _: print("ready", flush=True),
        )
    )

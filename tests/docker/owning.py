"""A process that wants to be the only owner of a Docker: ``owning.py URL STATE_ID PREFIX``.

Says ``owner`` once it is, and stays so until its standard input ends; says ``refused: …`` if another one lives, and
``lost: …`` if another one has taken over.
"""

from __future__ import annotations

import asyncio
import sys

import aiodocker

from modelswap.runtimes.docker.owner import OtherOwner, sole_owner


async def main(url: str, state_id: str, prefix: str) -> None:
    async with aiodocker.Docker(url=url) as docker:
        try:
            async with sole_owner(docker, state_id, prefix, lambda reason: print(f"lost: {reason}", flush=True)):  # noqa: T201
                print("owner", flush=True)  # noqa: T201
                await asyncio.to_thread(sys.stdin.read)
        except OtherOwner as error:
            print(f"refused: {error}", flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

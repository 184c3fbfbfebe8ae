"""A registry (distribution API v2) with one image of one layer, that can misbehave.

Docker takes plain HTTP on loopback.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import os
import platform
import tarfile
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar.gzip"
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class Registry:
    """Serves ``thing:tag``; ``layer_bytes`` is its layer's size (random bytes, so that no two tests share one)."""

    layer_bytes: int = 100_000
    password: str = ""
    """If given, what the user ``me`` must know."""
    cut: int = 0
    """So many downloads of the layer end half-way."""
    corrupt: bool = False
    """The layer isn't what its digest says."""
    gate: asyncio.Event | None = None
    """If given, the second half of the layer waits for it."""
    downloads: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether Docker left while the layer waited."""
    port: int = 0

    def __post_init__(self) -> None:
        content = os.urandom(self.layer_bytes)
        packed = io.BytesIO()
        with tarfile.open(mode="w", fileobj=packed) as tar:
            member = tarfile.TarInfo("serve")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        self._layer = gzip.compress(packed.getvalue(), compresslevel=1)
        config: dict[str, Any] = {
            "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Entrypoint": ["/serve", "now"], "ExposedPorts": {"9000/udp": {}, "8001/tcp": {}, "80/tcp": {}}},
            "rootfs": {"type": "layers", "diff_ids": [_digest(packed.getvalue())]},
        }
        self._config = json.dumps(config).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {"mediaType": _CONFIG, "size": len(self._config), "digest": _digest(self._config)},
            "layers": [{"mediaType": _LAYER, "size": len(self._layer), "digest": _digest(self._layer)}],
        }
        self._manifest = json.dumps(manifest).encode()

    @property
    def ref(self) -> str:
        """The image's full name."""
        return f"127.0.0.1:{self.port}/thing:tag"

    @property
    def image_id(self) -> str:
        """The image's id once it is pulled."""
        return _digest(self._config)

    async def serve(self) -> web.AppRunner:
        """Begin to serve at `port`; the caller cleans the runner up."""
        app = web.Application()
        app.router.add_get("/v2/", self._root)
        app.router.add_get("/v2/{name}/manifests/{reference}", self._get_manifest)
        app.router.add_get("/v2/{name}/blobs/{digest}", self._get_blob)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    def _check(self, request: web.Request) -> None:
        if self.password:
            given = request.headers.get("authorization", "")
            if given != f"Basic {base64.b64encode(f'me:{self.password}'.encode()).decode()}":
                raise web.HTTPUnauthorized(
                    headers={
                        "www-authenticate": 'Basic realm="test"',
                        "docker-distribution-api-version": "registry/2.0",
                    },
                    text=json.dumps({"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}),
                    content_type="application/json",
                )

    async def _root(self, request: web.Request) -> web.Response:
        self._check(request)
        return web.json_response({}, headers={"docker-distribution-api-version": "registry/2.0"})

    async def _get_manifest(self, request: web.Request) -> web.Response:
        self._check(request)
        code = "NAME_UNKNOWN" if request.match_info["name"] != "thing" else "MANIFEST_UNKNOWN"
        if code == "NAME_UNKNOWN" or request.match_info["reference"] not in ("tag", _digest(self._manifest)):
            error = {"errors": [{"code": code, "message": code.lower().replace("_", " ")}]}
            return web.json_response(error, status=404)
        headers = {"content-type": _MANIFEST, "docker-content-digest": _digest(self._manifest)}
        return web.Response(body=self._manifest, headers=headers)

    async def _get_blob(self, request: web.Request) -> web.StreamResponse:
        self._check(request)
        if request.match_info["digest"] == _digest(self._config):
            return web.Response(body=self._config, headers={"content-type": "application/octet-stream"})
        self.downloads += 1
        layer = self._layer[:-9] + b"wrong!!!!" if self.corrupt else self._layer
        begin = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        response = web.StreamResponse(status=206 if begin else 200)
        if begin:
            response.headers["content-range"] = f"bytes {begin}-{len(layer) - 1}/{len(layer)}"
        response.content_length = len(layer) - begin
        await response.prepare(request)
        half = max(begin, len(layer) // 2)
        await response.write(layer[begin:half])
        if self.cut:
            self.cut -= 1
            assert request.transport is not None
            request.transport.close()
            return response
        if self.gate is not None:
            # Docker looks whether it was cancelled when bytes come.
            while not self.gate.is_set() and half < len(layer) - 1:
                try:
                    await response.write(layer[half : half + 1])
                except ConnectionError:
                    self.left.set()
                    return response
                half += 1
                await asyncio.sleep(0.01)
        await response.write(layer[half:])
        await response.write_eof()
        return response

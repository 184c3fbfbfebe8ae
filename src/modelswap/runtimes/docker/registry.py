"""Image references, their registries, and what ``docker login`` has noted for these."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

HUB: Final = "docker.io"
# Where docker login keeps Docker Hub's.
_HUB_KEYS: Final = ("https://index.docker.io/v1/", "index.docker.io", HUB)


class Login(msgspec.Struct, frozen=True):
    """For a pull from ``registry``: the value of ``X-Registry-Auth`` (a secret; empty: none is noted).

    ``caveat`` is to be said if access is denied: where a login may be that can't be read.
    """

    registry: str
    header: str = ""
    caveat: str = ""


def registry_of(ref: str) -> str:
    """Return the registry that an image is pulled from: its first part if that looks like a host, else Docker Hub."""
    first, slash, _ = ref.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return first
    return HUB


def is_exact(ref: str) -> bool:
    """Return whether a reference has a tag or a digest; Docker takes one without for all tags."""
    return "@" in ref or ":" in ref.rpartition("/")[2]


async def login(ref: str, env: Mapping[str, str] = os.environ) -> Login:
    """Return what ``$DOCKER_CONFIG/config.json`` (``~/.docker``) says for the registry of ``ref``.

    Credential helpers (``credsStore``, ``credHelpers``) are other programs and aren't asked.
    """
    registry = registry_of(ref)
    folder = Path(env.get("DOCKER_CONFIG") or f"{env.get('HOME', '')}/.docker")
    document: Any = None
    with contextlib.suppress(OSError, msgspec.DecodeError):
        document = msgspec.json.decode(await asyncio.to_thread((folder / "config.json").read_bytes))
    if not isinstance(document, dict):
        return Login(registry)
    keys = _HUB_KEYS if registry == HUB else (registry, f"https://{registry}", f"https://{registry}/v1/")
    auths = document.get("auths")
    for key in keys:
        noted = auths.get(key) if isinstance(auths, dict) else None
        if isinstance(noted, dict) and (header := _header(noted, key)):
            return Login(registry, header)
    helpers = document.get("credHelpers")
    if document.get("credsStore") or (isinstance(helpers, dict) and any(key in helpers for key in keys)):
        return Login(
            registry,
            caveat=" (what a credential helper keeps can't be read: log in without credsStore and credHelpers in"
            f" {folder / 'config.json'}, or docker pull it yourself)",
        )
    return Login(registry)


def _header(noted: Mapping[str, Any], key: str) -> str:
    if noted.get("identitytoken"):
        login = {"identitytoken": noted["identitytoken"], "serveraddress": key}
    else:
        try:
            user, colon, password = base64.b64decode(str(noted.get("auth", "")), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return ""
        if not colon:
            return ""
        login = {"username": user, "password": password.rstrip("\0"), "serveraddress": key}
    return base64.urlsafe_b64encode(msgspec.json.encode(login)).decode()

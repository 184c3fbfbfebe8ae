"""A failed download in words, with its remedy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from modelswap.weights import errors
from modelswap.weights.places import HUB, has_token, is_public, secrets
from modelswap.weights.wire import Failed

_GIVE_ONE: Final = 'env: {HF_TOKEN: "${HF_TOKEN}"}'


def explain(failed: Failed, env: Mapping[str, str]) -> errors.WeightsUnavailable:
    """Return the error to raise; nothing in it is secret."""
    repo, hub = failed.repo, hub_name(env)
    page = f"{HUB}/{repo}" if is_public(env) else f"its page at {hub}"
    revision = failed.revision or "main"
    shown = has_token(env)
    match failed.kind:
        case "not_found":
            private = (
                "or the token that was sent may not see it"
                if shown
                else f"or it is private: then give a token that may read it, {_GIVE_ONE}"
            )
            return errors.NotFound(f"{hub} has no model {repo}; mend 'model', {private}")
        case "no_revision":
            return errors.NotFound(f"{repo} has no revision '{revision}' at {hub}; mend --revision in args")
        case "no_weights":
            return errors.NotFound(
                f"{repo} has no weights of the kind that its engine loads (it has {failed.detail or 'no files'});"
                " name another repository, or its format with --load-format in args"
            )
        case "gated":
            then = (
                "with the account of the token that was sent (it must be allowed to read gated repositories)"
                if shown
                else f"then give a token of your account, {_GIVE_ONE}"
            )
            return errors.Gated(f"the licence of {repo} must be accepted first: do so on {page}, {then}")
        case "unauthorized":
            return errors.Unauthorized(
                f"{hub} doesn't accept the token that was sent for {repo}; is HF_TOKEN right, and still valid?"
            )
        case "forbidden":
            return errors.Unauthorized(
                f"{hub} forbids to download {repo} with the token that was sent; give one that may read it, {_GIVE_ONE}"
            )
        case "offline":
            return errors.Offline(
                f"{repo} is not (wholly) in the cache {failed.folder}, and HF_HUB_OFFLINE forbids to download it;"
                " take HF_HUB_OFFLINE away, or put the files there"
            )
        case "unreachable":
            return errors.Unreachable(
                f"{repo} can't be downloaded: {hub} can't be reached, or doesn't answer as it should"
                f" ({_first_line(failed.detail, env)}); check the network and proxy (HTTPS_PROXY), HF_ENDPOINT for a"
                " mirror. What came is kept"
            )
        case "refused":
            return errors.WeightsUnavailable(
                f"{hub} refuses to give {repo}: {_first_line(failed.detail, env)}; does HF_ENDPOINT name a Hugging"
                " Face hub?",
                code=errors.NotFound.code,
            )
        case "damaged":
            return errors.Unreachable(
                f"what {hub} sent of {repo} is not what it has ({_first_line(failed.detail, env)}); trying again helps"
                " unless something between here and there changes downloads"
            )
        case "disk_full":
            else_full = "" if failed.needed > failed.free else " (a quota is used up, or the inodes: df -i)"
            return errors.DiskFull(
                f"no room for {repo} in {failed.folder}: {size(failed.needed)} are still to come, and"
                f" {size(failed.free)} are free{else_full}; make room there, or set HF_HOME to a folder on a larger"
                " disk. What came is kept",
                folder=failed.folder,
                needed=failed.needed,
                free=failed.free,
            )
        case "not_writable":
            return errors.NotWritable(
                f"the cache {failed.folder} can't be written by this user (uid {os.geteuid()}):"
                f" {_first_line(failed.detail, env)}; make the folder its own (chown), or set HF_HOME to another"
            )
        case "unexpected":
            return errors.WeightsUnavailable(f"{repo} can't be downloaded: {_first_line(failed.detail, env)}")


def hub_name(env: Mapping[str, str]) -> str:
    """Return the hub's host name; a password in ``HF_ENDPOINT`` is not told."""
    address = env.get("HF_ENDPOINT") or HUB
    try:
        parts = urlsplit(address)
    except ValueError:
        return address.rpartition("@")[2]
    return parts.netloc.rpartition("@")[2] or parts.path


def size(count: int) -> str:
    """Return a number of bytes with the precision that helps, e.g. ``14.2 GB``."""
    for unit, width in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= width:
            return f"{count / width:.1f} {unit}"
    return f"{count} bytes"


def redacted(text: str, env: Mapping[str, str]) -> str:
    """Return ``text`` without the secrets in ``env``."""
    for secret in secrets(env):
        text = text.replace(secret, "…")
    return text


def _first_line(text: str, env: Mapping[str, str]) -> str:
    lines = [line.strip() for line in redacted(text, env).splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"

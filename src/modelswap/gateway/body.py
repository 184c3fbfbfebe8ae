"""What the gateway reads of a request's body, and the one thing it may change there: the top-level ``model``.

Bodies are validated and searched at C speed by msgspec. Like JSON parsers do, the last of several ``model`` keys wins.
"""

from __future__ import annotations

import json
import re
from itertools import count
from typing import Any, Final

import msgspec

from modelswap.protocol.errors import Code, ModelswapError


class Call(msgspec.Struct, gc=False):
    """The members of a request body that decide where it goes and how; everything else is skipped."""

    model: Any = None
    stream: Any = None


decode: Final = msgspec.json.Decoder(Call).decode
"""`read`, but raises what msgspec raises."""

# msgspec refuses lone surrogates in escapes; clients that cut emoji in two send them, and engines take them.
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")

# "model" with each letter as itself or escaped, a colon, and a string.
_MODEL_PAIR: Final = re.compile(
    rb'("(?:m|\\u006[dD])(?:o|\\u006[fF])(?:d|\\u0064)(?:e|\\u0065)(?:l|\\u006[cC])"[ \t\r\n]*:[ \t\r\n]*)'
    rb'"[^"\\]*(?:\\.[^"\\]*)*"'
)


def read(body: bytes) -> Call:
    """Return what decides about a request.

    Raises:
        ModelswapError: `Code.INVALID_JSON` if the body isn't one JSON object.

    """
    try:
        return decode(body)
    except msgspec.ValidationError:
        raise _invalid("The request body must be a JSON object") from None
    except RecursionError:
        raise _invalid("The request body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if _SURROGATE.search(body) is None:
            raise _invalid(f"The request body is not valid JSON: {error}") from None
    return _read_leniently(body)


def replace_model(body: bytes, name: str) -> bytes:
    """Return ``body`` with the string that `read` gave as ``model`` replaced by ``name``; all other bytes stay.

    The body must have been read with a string for a model. Linear in its length: every string that follows a key
    spelled ``model``, at whatever depth, is replaced by a number of its own; reading the outcome tells which counts.
    """
    pairs = list(_MODEL_PAIR.finditer(body))
    chosen = 0
    if len(pairs) > 1:
        numbers = count()
        numbered = _MODEL_PAIR.sub(lambda match: b'%b"%d"' % (match[1], next(numbers)), body)
        chosen = int(read(numbered).model)
    pair = pairs[chosen]
    return b"".join((body[: pair.end(1)], msgspec.json.encode(name), body[pair.end() :]))


def _read_leniently(body: bytes) -> Call:
    try:
        found = json.loads(body.decode("utf-8", "replace"), parse_constant=_no_constant)
    except RecursionError:
        raise _invalid("The request body is nested too deeply") from None
    except ValueError as error:
        raise _invalid(f"The request body is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise _invalid("The request body must be a JSON object")
    return Call(found.get("model"), found.get("stream"))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _invalid(message: str) -> ModelswapError:
    return ModelswapError(message, code=Code.INVALID_JSON)

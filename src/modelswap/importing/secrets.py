"""Secrets stay where they are: a config that we write refers to them by ``${NAME}``."""

from __future__ import annotations

import re
from typing import Final

_TELLING: Final = frozenset(
    {"KEY", "KEYS", "APIKEY", "TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "CREDENTIAL", "CREDENTIALS"}
)
_HARMLESS: Final = frozenset({"FILE", "PATH", "DIR", "MAX", "MIN", "NUM", "LIMIT", "LEN", "LENGTH", "SIZE"})
_VALUE: Final = re.compile(
    r"(?:hf_|sk-|ghp_|glpat-|nvapi-|AKIA)[A-Za-z0-9_-]{8,}|[a-z][a-z0-9+.-]*://[^/@\s]+:[^/@\s]+@.*"
)
# In a script: an option or a variable with its value, or a token by itself.
_WITHIN: Final = re.compile(
    r"""(?P<option>--(?:[\w-]*(?:api[-_]key|password|secret)|(?:hf-|huggingface-)?token))[=\s]+["']?(?P<value>[^\s"'$;&|]+)
    |\b(?P<name>[A-Za-z_]\w*)=["']?(?P<given>[^\s"'$;&|]+)
    |\b(?P<token>(?:hf_|sk-|ghp_|glpat-|nvapi-|AKIA)[A-Za-z0-9_-]{8,})""",
    re.VERBOSE,
)
_WHOLE: Final = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-[^}]*)?\}")
_REFERENCE: Final = re.compile(r"(?<!\$)\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<fallback>:-[^}]*)?\}")


def is_secret_name(name: str) -> bool:
    """Return whether a variable called ``name`` probably holds a secret."""
    parts = set(re.split(r"[^A-Z0-9]+", name.upper()))
    return bool(parts & _TELLING) and not parts & _HARMLESS


def is_secret(name: str, value: str) -> bool:
    """Return whether ``value`` of a variable called ``name`` should not be copied."""
    if not value or value.startswith("/") or value.lower() in ("true", "false", "none"):
        return False
    return is_secret_name(name) or _VALUE.fullmatch(value) is not None


def looks_secret(value: str) -> bool:
    """Return whether ``value`` looks like a token, or a URL with a password."""
    return _VALUE.fullmatch(value) is not None


def references(text: str) -> list[tuple[str, bool]]:
    """Return the variables that ``text`` refers to, each with whether it must be set (has no default)."""
    return [(match["name"], match["fallback"] is None) for match in _REFERENCE.finditer(text)]


def escaped(text: str) -> str:
    """Return ``text`` so that none of it is taken for a reference."""
    return text.replace("${", "$${")


class Vault:
    """Gives each literal secret the name of a variable; the secret itself is told to nobody."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def scrubbed(self, text: str, name: str, owner: str) -> str:
        """Return a script, or words in one text, with references for the secrets in it; an API key's is ``name``."""

        def one(match: re.Match[str]) -> str:
            if match["option"]:
                called = "HF_TOKEN" if re.search("hf|hugging", match["option"]) else name
                return match[0].removesuffix(match["value"]) + self.reference(called, match["value"], owner)
            if match["token"]:
                called = "HF_TOKEN" if match["token"].startswith("hf_") else "SECRET"
                return self.reference(called, match["token"], owner)
            if is_secret(match["name"], match["given"]):
                return match[0].removesuffix(match["given"]) + self.reference(match["name"], match["given"], owner)
            return match[0]

        return _WITHIN.sub(one, text)

    def reference(self, name: str, value: str, owner: str) -> str:
        """Return ``value`` if it is a reference, else one to a variable that is to hold it.

        It is called ``name``, unless another value has that name: then ``owner`` goes before it.
        """
        if _WHOLE.fullmatch(value):
            return value
        prefix = ""
        while self._values.get(prefix + name, value) != value:
            prefix = re.sub(r"\W+", "_", f"{owner}_{prefix}").upper()
            if prefix[0].isdigit():
                prefix = f"_{prefix}"
        self._values[prefix + name] = value
        return f"${{{prefix + name}}}"

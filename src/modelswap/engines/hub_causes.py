"""Causes that all programs built on PyTorch and Hugging Face's libraries share."""

from __future__ import annotations

from typing import Final

from modelswap.engines.diagnosis import Cause, cause

ARGUMENTS: Final[tuple[Cause, ...]] = (
    cause(r"(?m)error: (unrecognized arguments: .+)$", "it doesn't know some of args: {0}"),
    cause(r"(?m)error: (argument .+)$", "it doesn't accept args: {0}"),
)

HUB: Final[tuple[Cause, ...]] = (
    cause(
        r"(?:gated repo|GatedRepoError|Access to model \S+ is restricted)",
        "the model's licence must be accepted first: do so on its page, then give a token of your account with"
        ' env: {{HF_TOKEN: "${{HF_TOKEN}}"}}',
    ),
    cause(
        r"(?m)(\S+) is not a local folder and is not a valid model identifier",
        "there is no folder and no Hugging Face model called {0}; mend 'model'"
        " (a private one needs a token: env: {{HF_TOKEN: …}})",
    ),
    cause(
        r"RepositoryNotFoundError|Repository Not Found|Invalid repository ID or local directory specified: '([^']*)'",
        lambda match: (
            f"there is no folder and no Hugging Face model called {match[1] or 'that'}; mend 'model'"
            " (a private one needs a token: env: {HF_TOKEN: …})"
        ),
    ),
    cause(
        r"Repo id must (?:be in the form|use) [^\n]*: '([^'\n]+)'",
        "there is no folder {0}, and that is no Hugging Face id either; mend 'model'",
    ),
)

OFFLINE: Final[tuple[Cause, ...]] = (
    cause(
        r"LocalEntryNotFoundError|couldn't connect to 'https://huggingface\.co'|[Oo]ffline mode is enabled",
        "the model is not downloaded yet, and Hugging Face can't be reached; check the network, or download it first",
        permanent=False,
    ),
)

TRANSFORMERS: Final[tuple[Cause, ...]] = (
    cause(
        r"model type `?([\w.-]+)`? but Transformers does not recognize this architecture",
        "this installation's Transformers doesn't know the model type {0}; update it and the engine",
    ),
)

"""Which GPU models are on: our config has one device for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelswap.importing.result import Imported, Kind


def choose(gpus: Mapping[str, Sequence[str] | None], key: str, imported: Imported) -> bool:
    """Say ``device.index`` if all models are on the same one GPU; else note what that means. Return which of both.

    ``gpus`` tells for each model (by what people call it) which GPUs it is said to use; None if that isn't said.
    ``key`` is what notes are about.
    """
    said = {name: tuple(each) for name, each in gpus.items() if each is not None}
    different = set(said.values())
    listed = "; ".join(f"{name} on {', '.join(each)}" for name, each in said.items())
    if len(different) > 1:
        text = f"GPUs: {listed}; modelswap has one device, and swaps models also where they could run side by side"
        imported.note(Kind.CHANGED, key, text)
        return False
    only = next(iter(different), ())
    if len(only) == 1 and only[0].isdigit() and len(said) == len(gpus):
        if int(only[0]):
            imported.config["device"] = {"index": int(only[0])}
        return True
    if only and only != ("0",):
        text = f"GPUs: {listed}; say which one modelswap watches: device.index, else 0"
        imported.note(Kind.ACTION, key, text)
    return False

"""The config file: can it be used, and does it look right."""

from __future__ import annotations

from modelswap.cli.check import warnings
from modelswap.cli.doctor.finding import Finding, fine, note, problem, warning
from modelswap.cli.doctor.scene import Scene, in_thread


async def usable(scene: Scene) -> list[Finding]:
    """Whether the file is right, and what `modelswap check` would warn of."""
    if scene.config_error is not None:
        remedy = "mend it (`modelswap check` shows the same); the rest is looked at as if it named no model"
        return [problem(scene.config_error, remedy)]
    if not scene.config.models:
        message = f"there is no {scene.path}; only what every config file needs is looked at"
        return [note(message, f"python -m modelswap.spec.example > {scene.path}")]
    told = await in_thread(lambda: list(warnings(scene.config)))
    count = len(scene.config.models)
    findings = [fine(f"{scene.path} is valid: {count} model{'s' * (count != 1)}")]
    return findings + [warning(message, remedy or "see `modelswap check`") for message, remedy in told]

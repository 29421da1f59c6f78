"""The published checkpoints of a run: which there are, whether they are whole, which may go.

Light: nothing here imports torch. What is in their files is `checkpoint`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"  # their folder in the run's
MANIFEST = "manifest.json"
STAGING = ".staging"


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its weights."""

    step: int
    tokens: int
    cursor: dict[str, Any]
    next_batch: str
    config: dict[str, Any]


def name(step: int) -> str:
    """Of the folder that holds the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def published(folder: Path) -> list[Path]:
    """The published checkpoints, newest first."""
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(named, key=step_of, reverse=True)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        ValueError: it is missing, cut short, or not of this format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for key in ("files", *Progress.__dataclass_fields__):
            manifest[key]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} is missing or broken") from None
    return manifest


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint: a file missing, cut short or changed; None if nothing."""
    try:
        manifest = read(path)
        for file, facts in manifest["files"].items():
            held = path / file
            if not held.is_file():
                return f"{file} is missing"
            if held.stat().st_size != facts["bytes"]:
                return f"{file} has {held.stat().st_size} bytes, not {facts['bytes']}"
            if digest(held) != facts["sha256"]:
                return f"{file} has changed since it was written"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def newest(folder: Path, log: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, with a line for each that does not."""
    for path in published(folder):
        wrong = fault(path)
        if wrong is None:
            return path
        log(f"passing over {path}: {wrong}")
    return None


def progress(path: Path) -> Progress:
    """Where the run stood at a checkpoint."""
    manifest = read(path)
    return Progress(**{name: manifest[name] for name in Progress.__dataclass_fields__})


def surplus(steps: list[int], keep: int, keep_every: int) -> list[int]:
    """The steps of those whose checkpoints are neither new enough nor kept for good.

    Args:
        keep: how many of the newest to keep; 0 for all.
        keep_every: multiples of it are kept for good; 0 for none.
    """
    old = sorted(steps, reverse=True)[keep:] if keep else []
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def prune(folder: Path, keep: int, keep_every: int) -> list[Path]:
    """Remove what is surplus; what is left of one that cannot be removed stays for next time."""
    steps = [step_of(path) for path in published(folder)]
    gone = [folder / name(step) for step in surplus(steps, keep, keep_every)]
    _remove(gone)
    return gone


def prune_verified(folder: Path, keep: int, keep_every: int) -> dict[Path, str | None]:
    """Remove what is surplus among those that verify, and those that do not, once one does.

    Returns:
        What was removed, with what was wrong with it.
    """
    faults = {path: fault(path) for path in published(folder)}
    whole = [step_of(path) for path, wrong in faults.items() if wrong is None]
    if not whole:
        return {}
    kept = {folder / name(step) for step in whole} - {
        folder / name(step) for step in surplus(whole, keep, keep_every)
    }
    gone = {path: wrong for path, wrong in faults.items() if path not in kept}
    _remove(gone)
    return gone


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        # The manifest first: a checkpoint whose removal was cut short is not taken for whole.
        with contextlib.suppress(OSError):
            (path / MANIFEST).unlink()
        shutil.rmtree(path, ignore_errors=True)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

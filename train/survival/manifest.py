"""The published checkpoints of a run: which there are, whether they are whole, which may go.

A manifest is JSON text that ends with the SHA-256 of all of its bytes before:

    {
     "format": 2,
     "step": 500,
     …
     "sha256": "9f86d081…"
    }

One that was changed is as bad as a state file that was: the checkpoint is passed over.
Light: nothing here imports torch. What is in their files is `checkpoint`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import Cursor, regular

CHECKPOINTS = "checkpoints"  # their folder in the run's
MANIFEST = "manifest.json"
STAGING = ".staging"
FORMAT = 2
_UNSEALED = 1  # the format that had no digest of its own
_STEP = re.compile(r"step-([0-9]+)")
_STATE = re.compile(r"state-[0-9]+-of-[0-9]+\.safetensors")
_TYPES = {"step": int, "tokens": int, "next_batch": str, "config": dict, "judge": dict}


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its weights. judge: `faults.Judge.state`."""

    step: int
    tokens: int
    cursor: dict[str, Any]
    next_batch: str
    config: dict[str, Any]
    judge: dict[str, Any] = field(default_factory=dict)


def name(step: int) -> str:
    """Of the folder that holds the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def published(folder: Path) -> list[Path]:
    """The published checkpoints, newest first, also those that are damaged."""
    named = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted((p for p in named if p.name == name(step_of(p))), key=step_of, reverse=True)


def sealed(manifest: dict[str, Any]) -> bytes:
    """The text of a manifest, with the digest of itself at its end."""
    body = json.dumps(manifest, indent=1).removesuffix("\n}").encode()
    return body + _seal(body)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        ValueError: it is missing, changed, malformed, or of another step than its folder.
    """
    try:
        content = regular.content(path / MANIFEST)
    except OSError as error:
        raise ValueError(f"{MANIFEST} is missing or unreadable ({error.strerror})") from None
    manifest = parse(content)
    named = _STEP.fullmatch(path.name)  # a copy that a run starts from may be called otherwise
    if named and int(named[1]) != manifest["step"]:
        raise ValueError(f"{MANIFEST} is that of step {manifest['step']}")
    return manifest


def parse(content: bytes) -> dict[str, Any]:
    """A manifest from its text.

    Raises:
        ValueError: it was changed, or is malformed.
    """
    try:
        manifest = json.loads(content.decode())
    except (ValueError, RecursionError):
        raise ValueError(f"{MANIFEST} is no JSON: it was cut short or changed") from None
    body = content[: -len(_seal(b""))]
    if content != body + _seal(body) and not is_unsealed(manifest):
        raise ValueError(f"{MANIFEST} has changed since it was written")
    wrong = _malformed(manifest)
    if wrong:
        raise ValueError(f"{MANIFEST} is malformed: {wrong}")
    return manifest


def is_unsealed(manifest: Any) -> bool:
    """Whether a manifest is of the format that had no digest of its own.

    It is read still: whoever trains on with a newer Headrace loses nothing. No flip of one bit
    makes a sealed one look like it.
    """
    return (
        isinstance(manifest, dict)
        and manifest.get("format") == _UNSEALED
        and "sha256" not in manifest
    )


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint: a file missing, cut short or changed; None if nothing."""
    try:
        for file, facts in read(path)["files"].items():
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


def newest(folder: Path, log: Callable[[str], None], before: int | None = None) -> Path | None:
    """The newest checkpoint that verifies, with a line for each newer one that does not.

    Args:
        before: a step; None takes every checkpoint.
    """
    for path in published(folder):
        if before is not None and step_of(path) >= before:
            continue
        wrong = fault(path)
        if wrong is None:
            if is_unsealed(read(path)):
                log(f"{path / MANIFEST} is of an earlier version, without a digest of its own")
            return path
        log(f"passing over {path}: {wrong}")
    return None


def newest_progress(
    folder: Path, log: Callable[[str], None]
) -> tuple[Path, Progress] | tuple[None, None]:
    """The newest checkpoint that verifies, and where the run stood there."""
    found = newest(folder, log)
    if found is None:
        return None, None
    manifest = read(found)
    return found, Progress(**{name: manifest[name] for name in Progress.__dataclass_fields__})


def surplus(
    folder: Path, keep: int, keep_every: int, known: dict[Path, str | None], last: int | None = None
) -> list[Path]:
    """The checkpoints that are older than the `keep` newest whole ones, newest first.

    Args:
        keep: 0 for all.
        keep_every: multiples of it are kept for good; 0 for none.
        known: what is wrong with checkpoints that were verified before. What must be known of
            others is verified here, and added.
        last: the step that was saved last: what is newer neither counts nor goes.
    """
    whole, old = 0, []
    for path in published(folder) if keep else []:
        step = step_of(path)
        if last is not None and step > last:
            continue
        if whole == keep:
            if not (keep_every and step % keep_every == 0):
                old.append(path)
            continue
        if path not in known:
            known[path] = fault(path)
        whole += known[path] is None
    return old


def damaged(folder: Path, known: dict[Path, str | None]) -> list[Path]:
    """The checkpoints that do not verify, newest first; none where none does.

    Args:
        known: as for `surplus`.
    """
    known |= {path: fault(path) for path in published(folder) if path not in known}
    there = [path for path in published(folder) if known[path] is not None]
    return there if len(there) < len(published(folder)) else []


def removing(paths: Iterable[Path]) -> Iterator[tuple[Path, str | None]]:
    """Remove checkpoints; after each, why it could not be removed, None if it could."""
    for path in paths:
        try:
            remove(path)
        except OSError as error:
            yield path, error.strerror or str(error)
        else:
            yield path, None


def remove(path: Path) -> None:
    """Remove a checkpoint, published or staged; of a link only the link.

    Raises:
        OSError: it cannot be removed, or holds other files than a checkpoint's: they stay.
    """
    if path.is_symlink():
        path.unlink()
        return
    # The manifest first: a checkpoint whose removal was cut short is not taken for whole.
    names = sorted(held.name for held in path.iterdir())
    for held in [n for n in names if n == MANIFEST] + [n for n in names if _STATE.fullmatch(n)]:
        (path / held).unlink()
    path.rmdir()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(body: bytes) -> bytes:
    """The end of a manifest, by everything before it; always of the same length."""
    return f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _malformed(manifest: Any) -> str | None:
    """What no manifest of ours has, or lacks; None if nothing. A missing `judge` is added."""
    if not isinstance(manifest, dict):
        return "it is no mapping"
    if manifest.get("format") not in (FORMAT, _UNSEALED):
        return f"its format is {manifest.get('format')}, not {FORMAT}"
    if is_unsealed(manifest):
        manifest.setdefault("judge", {})
    for key, kind in _TYPES.items():
        if type(manifest.get(key)) is not kind:
            return f"{key} is missing or of a wrong type"
    if manifest["step"] < 0 or manifest["tokens"] < 0:
        return "step or tokens is negative"
    if not _is_cursor(manifest.get("cursor")):
        return "cursor is missing or of a wrong type"
    if not isinstance(manifest.get("seconds"), (int, float)):
        return "seconds is missing or of a wrong type"
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return "it names no files"
    for file, facts in files.items():
        if not _STATE.fullmatch(file):
            return f"it names {file!r}, which is no file of a checkpoint"
        if (
            not isinstance(facts, dict)
            or type(facts.get("bytes")) is not int
            or not isinstance(facts.get("sha256"), str)
        ):
            return f"it lacks the size or the digest of {file}"
    return None


def _is_cursor(held: Any) -> bool:
    """Whether it is what `Cursor.to_dict` gives; fields may be missing."""
    wanted = Cursor().to_dict()
    return isinstance(held, dict) and all(
        key in wanted
        and type(value) is type(wanted[key])
        and all(type(number) is int for number in (value if isinstance(value, list) else [value]))
        for key, value in held.items()
    )

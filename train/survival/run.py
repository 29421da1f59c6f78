"""A run's folder: who may write to it, and how it is started over."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import regular
from data.settings import ConfigError
from data.values import Malformed, dump, parse
from train.config import Config
from train.survival.manifest import CHECKPOINTS, MANIFEST, STAGING

if TYPE_CHECKING:
    from parallel import World

CONFIG = "config.yaml"
_LOCK, _PART, _PROBE = ".lock", ".config.part", ".headrace-removes"
_CHECKPOINT = {MANIFEST: None, "state-*-of-*.safetensors": None}
_EVENTS = {"events.out.tfevents.*": None}
_REPORT = {"step-*.json": None, "report.json": None, "*.png": None, **_EVENTS}
# All that a run writes, but for its settings and its lock, in the order in which it goes: names
# of files, and of folders with what a run writes there. Whatever else lies there is not ours.
_WRITTEN: dict[str, Any] = {
    CHECKPOINTS: {STAGING: _CHECKPOINT, "step-*": _CHECKPOINT},
    "metrics.jsonl": None,
    ".metrics.part": None,
    "log.txt": None,
    "tensorboard": _EVENTS,
    "faults": {"step-*.npz": None},
    "beats": {"rank-*.json": None, "report": None},
    "profile": {"steps-*-rank-*.json.gz": None},
    "evaluation": {**_REPORT, "*": _REPORT},
}
_PATIENCE_S = 30.0  # with what a job's last start has left
# Sections that the settings of a run have, resolved; `run` with all of its keys.
_SECTIONS = ("run", "train", "data", "model", "optim", "checkpoint")


class HeldError(ConfigError):
    """A job that was queued again cannot have its folder yet: a fault, but one that passes."""


@contextmanager
def claim(config: Config, fresh: bool, overwrite: bool, world: World) -> Iterator[Path]:
    """The folder of the run, held against any other process until the end.

    Args:
        fresh: start over instead of going on.
        overwrite: with `fresh`, remove what a run has written there.

    Raises:
        ConfigError: another process trains there, `fresh` would lose something, or the folder
            is not a run's.
        HeldError: another process trains there, and this job was queued again: its last start
            may have left a rank on a node whose daemon died. Its end is waited for before.
    """
    folder = config.run_path
    held: list[int] = []
    # Looked at before the lock is made, so that a folder that is not ours stays as it is.
    world.on_first(lambda: _check(folder, fresh, overwrite))
    world.on_first(lambda: held.append(_lock(folder)))
    try:
        world.on_first(lambda: _open(folder, config, fresh, overwrite))
        yield folder
    finally:
        for lock in held:
            os.close(lock)


def _lock(folder: Path) -> int:
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if path.is_symlink():
            raise ConfigError(f"{path} is a link, which is not followed: remove it") from None
        raise ConfigError(
            f"{error.filename or folder}: cannot be written ({error.strerror})"
        ) from None
    again = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    until = time.monotonic() + (_PATIENCE_S if again else 0)
    while not _is_free(lock):
        if time.monotonic() < until:
            time.sleep(0.2)
            continue
        os.close(lock)
        if again:
            raise HeldError(
                f"{folder}: another process trains there still, perhaps what this job's last "
                "start has left on a node that Slurm lost"
            )
        raise ConfigError(
            f"{folder}: another process trains there; wait for it, or set another run.name"
        )
    return lock


def _is_free(lock: int) -> bool:
    """Take a lock, unless another process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _check(folder: Path, fresh: bool, overwrite: bool) -> None:
    """See that a run may write to `folder`, and with `fresh` remove what is there.

    Raises:
        ConfigError: it may not.
    """
    try:
        names = sorted(set(os.listdir(folder)) - {_LOCK, _PART})
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror})") from None
    another = "set another run.name"
    checkpoints = folder / CHECKPOINTS
    linked = checkpoints.is_symlink()
    if os.path.lexists(checkpoints) and not checkpoints.is_dir() and not (linked and fresh):
        raise ConfigError(f"{checkpoints} is no folder; remove it, or {another}")
    staging = checkpoints / STAGING
    if os.path.lexists(staging) and not staging.is_dir() and not staging.is_symlink():
        raise ConfigError(f"{staging} is no folder; remove it, or {another}")
    for path in sorted(staging.glob("*")):
        if path.is_dir() and not path.is_symlink():
            raise ConfigError(f"{path} is a folder, where files are saved; move it, or {another}")
    settings = _settings(folder / CONFIG) if CONFIG in names else None
    ours = settings is not None and _is_run(settings)
    if CONFIG in names and not ours:
        raise ConfigError(f"{folder / CONFIG} is not the settings of a run: {another}")
    if not ours and not fresh and (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder} holds a metrics.jsonl but no run's {CONFIG}: {another}")
    if not fresh or not names:
        return
    if settings is None or not ours:
        raise ConfigError(
            f"{folder} holds {names[0]} but no {CONFIG} of a run, so nothing there is removed; "
            f"{another}"
        )
    if folder.is_symlink() and settings["run"]["name"] != folder.name:
        raise ConfigError(
            f"{folder} is a link to the run {settings['run']['name']}, which stays; {another}"
        )
    if not overwrite:
        raise ConfigError(f"{folder} holds a run; add --overwrite to remove it, or {another}")


def _open(folder: Path, config: Config, fresh: bool, overwrite: bool) -> None:
    _check(folder, fresh, overwrite)
    if fresh:
        _remove_run(folder)
    resolved = dump(config.to_dict()).encode()
    path = folder / CONFIG
    try:
        # A disk that is full stops no run that goes on as it was.
        if not path.exists() or regular.content(path) != resolved:
            regular.replace(path, resolved, folder / _PART)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _settings(path: Path) -> dict[str, Any] | None:
    """What a file of settings holds; None if it is no mapping.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        content = parse(regular.content(path).decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except Malformed:
        reason = "not valid YAML"
    else:
        return content if isinstance(content, dict) else None
    raise ConfigError(
        f"{path}: cannot be read ({reason}): restore it, or move it away to go on by the settings "
        "that you name"
    )


def _is_run(settings: dict[str, Any]) -> bool:
    """Whether these are settings that a run has written: resolved, with its name."""
    sections = [settings.get(name) for name in _SECTIONS]
    run = settings.get("run")
    return (
        all(isinstance(section, dict) for section in sections)
        and isinstance(run, dict)
        and all(isinstance(run.get(key), str) for key in ("root", "name"))
        and "start_from" in run
    )


def _remove_run(folder: Path) -> None:
    """Remove what a run has written; nothing unless all of it can go.

    Raises:
        ConfigError: naming what cannot be removed.
    """
    path = folder
    try:
        files: list[Path] = []
        folders: list[Path] = []
        for path in _written(folder, _WRITTEN):
            (files if path.is_symlink() or not path.is_dir() else folders).append(path)
        for path in files:
            # Renaming asks for the same rights as removing: of the folder, of the file, of the
            # file system.
            probe = path.with_name(_PROBE)
            path.rename(probe)
            probe.rename(path)
        for path in files:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be removed ({error.strerror})") from None
    for path in folders:
        with suppress(OSError):  # it may hold what is not ours
            path.rmdir()


def _written(folder: Path, names: dict[str, Any]) -> Iterator[Path]:
    """What of `names` lies in a folder, each folder after what is in it; no link is followed."""
    there = sorted(os.listdir(folder))
    for pattern, inside in {**names, _PROBE: None}.items():
        for path in (folder / name for name in there if fnmatchcase(name, pattern)):
            is_folder = path.is_dir() and not path.is_symlink()
            if is_folder and inside is not None:
                yield from _written(path, inside)
            if is_folder == (inside is not None) or (path.is_symlink() and pattern != "*"):
                yield path

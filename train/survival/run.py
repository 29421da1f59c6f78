"""A run's folder: who may write to it, and how it is started over."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from data.settings import ConfigError
from data.values import dump
from train.config import Config
from train.survival.manifest import CHECKPOINTS, published

if TYPE_CHECKING:
    from parallel import World


@contextmanager
def claim(config: Config, fresh: bool, overwrite: bool, world: World) -> Iterator[Path]:
    """The folder of the run, held against any other process until the end.

    Args:
        fresh: start over instead of going on.
        overwrite: with `fresh`, remove what is there.

    Raises:
        ConfigError: another process trains there, or `fresh` would lose checkpoints.
    """
    folder = config.run_path
    held: list[IO[str]] = []
    world.on_first(lambda: held.append(_lock(folder)))
    try:
        world.on_first(lambda: _open(folder, config, fresh, overwrite))
        yield folder
    finally:
        for lock in held:
            lock.close()


def _lock(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ConfigError(
            f"{folder}: another process trains there; wait for it, or set another run.name"
        ) from None
    return lock


def _open(folder: Path, config: Config, fresh: bool, overwrite: bool) -> None:
    there = published(folder / CHECKPOINTS)
    if fresh and there and not overwrite:
        raise ConfigError(
            f"{folder} holds checkpoints up to {there[0].name}; add --overwrite to remove "
            "them, or set another run.name"
        )
    if fresh:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()
    resolved = dump(config.to_dict())
    path, part = folder / "config.yaml", folder / ".config.part"
    try:
        # A disk that is full stops no run that goes on as it was.
        if not path.exists() or path.read_text(encoding="utf-8") != resolved:
            part.write_text(resolved, encoding="utf-8")
            part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None

"""Checkpoints: copied while training stands still, then staged, hashed and published by one
rename while it goes on.

    checkpoints/step-00000500/
        manifest.json                    what follows, a digest of every file, and its own
        state-00-of-02.safetensors       weight, exp_avg, exp_avg_sq of each parameter,
        state-01-of-02.safetensors       full and in fp32, dealt out over the ranks

No file depends on how many ranks wrote it or on the ZeRO stage, so any number of ranks at
any stage can go on from it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.settings import ConfigError
from parallel import World
from train.engine import WEIGHT, Engine
from train.survival.manifest import (
    FORMAT,
    MANIFEST,
    STAGING,
    Progress,
    digest,
    name,
    read,
    remove,
    sealed,
)


@dataclass(frozen=True)
class Saved:
    """How a save ended. stall: seconds that training stood still; seconds: until published."""

    path: Path
    step: int
    stall: float
    seconds: float
    error: str | None = None


class Saver:
    """Saves beside training: copies while it stands still, writes while it goes on.

    One save at a time. Each rank's thread writes and hashes its own file in the staging
    folder; when all are done, rank 0 adds the manifest and publishes by one rename. Nothing
    that is there already is touched before that, so a kill at any moment is safe.

    Args:
        folder: where checkpoints are published.
        gets_on: called before each tensor is copied.
    """

    def __init__(
        self, folder: Path, world: World, gets_on: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.world, self._gets_on = folder, world, gets_on
        self._progress: Progress | None = None
        self._thread = threading.Thread()
        self._began = self._stall = 0.0
        self._file: dict[str, dict[str, Any]] = {}
        self._error: str | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is on its way; the same on every rank."""
        return self._progress is not None

    def start(self, engine: Engine, progress: Progress) -> None:
        """Begin a save, on all ranks together; none may be on its way."""
        self._began = time.monotonic()
        staging = self.folder / STAGING
        if self.world.is_first:
            _clear(staging)
        # Every rank takes part in gathering every tensor, and keeps its share of them.
        mine: dict[str, Tensor] = {}
        dealt = {label: n % self.world.size for n, label in enumerate(engine.shapes)}
        for parameter, key, full in engine.gather():
            self._gets_on()
            if dealt[parameter] == self.world.rank:
                copy = full.detach().to("cpu", torch.float32, copy=True).contiguous()
                mine[_entry(parameter, key)] = copy
        self.world.barrier()
        self._progress, self._file, self._error = progress, {}, None
        self._thread = threading.Thread(target=self._write, args=(staging, mine), daemon=True)
        self._thread.start()
        self._stall = time.monotonic() - self._began

    def poll(self) -> Saved | None:
        """Publish the save if every rank has written; asked between steps, on all together."""
        if self._progress is None:
            return None
        writing = torch.tensor(float(self._thread.is_alive()))
        return None if float(self.world.sum(writing)) else self.finish()

    def finish(self) -> Saved | None:
        """Wait for the save that is on its way, if any, on all ranks together."""
        if self._progress is None:
            return None
        progress, self._progress = self._progress, None
        self._thread.join()
        files: dict[str, dict[str, Any]] = {}
        errors = []
        for their_file, their_error in self.world.gather((self._file, self._error)):
            files |= their_file
            errors += [their_error] if their_error else []
        final = self.folder / name(progress.step)
        if errors and self.world.is_first:
            _clear(self.folder / STAGING)  # it may have filled the disk
        error = "; ".join(errors) or self.world.on_first(lambda: self._publish(progress, files))
        seconds = time.monotonic() - self._began
        return Saved(final, progress.step, self._stall, seconds, error)

    def _write(self, staging: Path, mine: dict[str, Tensor]) -> None:
        rank, size = self.world.rank, self.world.size
        path = staging / f"state-{rank:02d}-of-{size:02d}.safetensors"
        try:
            staging.mkdir(parents=True, exist_ok=True)
            save_file(mine, path)
            _sync(path)
            self._file = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)}}
        except (OSError, SafetensorError) as fault:
            self._error = f"rank {rank}: {fault}"

    def _publish(self, progress: Progress, files: dict[str, dict[str, Any]]) -> str | None:
        """What went wrong, if something did; the staged files are gone then."""
        staging, final = self.folder / STAGING, self.folder / name(progress.step)
        manifest = {
            "format": FORMAT,
            **vars(progress),
            "files": files,
            "seconds": time.monotonic() - self._began,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        try:
            path = staging / MANIFEST
            path.write_bytes(sealed(manifest))
            _sync(path)
            _sync(staging)
            if os.path.lexists(final):
                remove(final)
            os.rename(staging, final)
            _sync(final.parent)
        except OSError as fault:
            _clear(staging)
            return str(fault)
        return None


def diverged(engine: Engine, world: World) -> str | None:
    """Which parameter's copies are not the same on the ranks that have one; None if all are.

    The sum of the bits of a parameter, as integers, must be equal.
    """
    copies = list(engine.copies())
    if world.size == 1 or not copies:
        return None
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    sums = [
        tensor.detach().contiguous().view(whole[tensor.dtype]).sum(dtype=torch.int64)
        for _, tensor, _ in copies
    ]
    everyone = world.gather(torch.stack(sums).tolist())
    for (parameter, _, holders), every in zip(copies, zip(*everyone, strict=True), strict=True):
        for ranks in holders:
            theirs = [every[rank] for rank in ranks]
            if len(set(theirs)) > 1:
                odd = [rank for rank in ranks if theirs.count(every[rank]) <= len(ranks) / 2]
                return f"{parameter} is not the same on every rank (see rank {odd})"
    return None


def load(path: Path, engine: Engine) -> None:
    """Set the weights and the optimiser's state of `engine`, on all ranks together.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    manifest = read(path)
    with contextlib.ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in manifest["files"]:
            opened = stack.enter_context(safe_open(path / file, framework="pt"))
            where |= {entry: opened for entry in opened.keys()}  # noqa: SIM118
        for label, wanted in engine.shapes.items():
            weight = _entry(label, WEIGHT)
            held = where.get(weight)
            if held is None and label in engine.model.of_training:
                continue  # saved before there was such a buffer
            shape = list(held.get_slice(weight).get_shape()) if held else None
            if shape != list(wanted):
                raise ConfigError(
                    f"{path} is of another model: {label} is {shape} there and "
                    f"{list(wanted)} here; restore model.* or set another run.name"
                )

            for key in engine.state_keys[label]:
                if _entry(label, key) not in where:
                    raise ConfigError(
                        f"{path} was saved by another optimiser: it has no {key} of {label}; "
                        "restore optim.name or set another run.name"
                    )

        def read_entry(label: str, key: str, begin: int, end: int) -> Tensor:
            entry = _entry(label, key)
            if entry not in where:
                return engine.first(label, 0, begin, end)
            mapped: Tensor = where[entry].get_tensor(entry)
            return mapped.flatten()[begin:end]  # all of the file that is read

        engine.scatter(read_entry)
    engine.set_optimizer_step(manifest["step"])


def _clear(staging: Path) -> None:
    """Remove what was staged; what cannot be removed is in nobody's way."""
    with contextlib.suppress(OSError):
        remove(staging)


def _entry(parameter: str, key: str) -> str:
    """What a tensor is called in the files."""
    return f"{parameter}|{key}"


def _sync(path: Path) -> None:
    """Force a file, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

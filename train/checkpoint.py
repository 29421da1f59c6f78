"""Checkpoints: staged, hashed, and published by one rename.

    checkpoints/step-00000500/
        manifest.json                    what follows, and a digest of every file
        state-00-of-02.safetensors       weight, exp_avg, exp_avg_sq of each parameter,
        state-01-of-02.safetensors       full and in fp32, dealt out over the ranks

No file depends on how many ranks wrote it or on the ZeRO stage, so any number of ranks at
any stage can go on from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.settings import ConfigError
from parallel import World
from train.engine import Engine
from train.manifest import MANIFEST, STAGING, Progress, digest, name, read


def save(folder: Path, engine: Engine, progress: Progress, world: World) -> Path:
    """Write the checkpoint of this step under `folder`, on all ranks together.

    Nothing that is there already is touched until the new one is whole on the disk.

    Raises:
        OSError: on every rank, if any rank could not write; the staged files are gone.
    """
    staging = folder / STAGING
    final = folder / name(progress.step)
    if world.is_first:
        shutil.rmtree(staging, ignore_errors=True)
    world.barrier()

    # Everything is gathered by all ranks together; a fault waits until that is over.
    mine: dict[str, Tensor] = {}
    for index, (parameter, key, full) in enumerate(engine.gather()):
        if (index // 3) % world.size == world.rank:
            mine[f"{parameter}|{key}"] = (
                full.detach().to("cpu", torch.float32, copy=True).contiguous()
            )
    path = staging / f"state-{world.rank:02d}-of-{world.size:02d}.safetensors"
    files: dict[str, dict[str, Any]] = {}
    error: str | None = None
    try:
        staging.mkdir(parents=True, exist_ok=True)
        save_file(mine, path)
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    except (OSError, SafetensorError) as fault:
        error = f"rank {world.rank}: {fault}"
    faults = []
    for their_files, their_error in world.gather((files, error)):
        files |= their_files
        faults += [their_error] if their_error else []
    try:
        if faults:
            raise OSError("; ".join(faults))
        world.on_first(lambda: _publish(staging, final, progress, files))
    except OSError:
        if world.is_first:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def _publish(
    staging: Path, final: Path, progress: Progress, files: dict[str, dict[str, Any]]
) -> None:
    manifest = {
        "format": 1,
        **vars(progress),
        "files": files,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    path = staging / MANIFEST
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(path)
    _sync(staging)
    if final.exists():
        shutil.rmtree(final)
    os.rename(staging, final)
    _sync(final.parent)


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
            where |= {name: opened for name in opened.keys()}  # noqa: SIM118
        for parameter, name in engine.names.items():
            held = where.get(f"{name}|weight")
            shape = list(held.get_slice(f"{name}|weight").get_shape()) if held else None
            if shape != list(engine.shape(parameter)):
                raise ConfigError(
                    f"{path} is of another model: {name} is {shape} there and "
                    f"{list(engine.shape(parameter))} here; restore model.* or set another run.name"
                )
        engine.scatter(lambda name, key: where[f"{name}|{key}"].get_tensor(f"{name}|{key}"))
    engine.set_optimizer_step(manifest["step"])


def _sync(path: Path) -> None:
    """Force a file, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

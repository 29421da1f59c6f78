"""A run's settings: the rooms' dataclasses, composed. Light: nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data import DataConfig, StreamConfig, sources
from data.settings import ConfigError, fields, load, setting, with_absolute_paths
from parallel.config import ParallelConfig
from parallel.planning.clusters import clusters
from train.model.config import ModelConfig
from train.optimiser.optim import OptimConfig
from train.survival.faults import FaultsConfig


@dataclass
class RunConfig:
    root: str = setting("runs", "folder of all runs", path=True)
    name: str | None = setting(None, "folder of this run under run.root (null: the file's name)")
    start_from: str | None = setting(
        None,
        "folder of weights to begin with: a checkpoint, or what `import` or `convert` wrote "
        "(null: random ones)",
        path=True,
    )

    def __post_init__(self) -> None:
        if not self.root.isprintable():
            raise ConfigError(f"run.root is {self.root!r}; it must be printable text")
        if self.name is not None:
            check_name(self.name)


def check_name(name: str) -> None:
    """See that a run's name is that of one folder, which lies in `run.root`.

    Raises:
        ConfigError: it is empty, or could name another folder, or cannot be read in a line.
    """
    if not name.strip() or name == "." or ".." in name or set(name) & set("/\\"):
        raise ConfigError(
            f"run.name is {name!r}; it must be the name of one folder under run.root: not empty, "
            "not '.', without '..' and separators"
        )
    if not name.isprintable() or name != name.strip():
        raise ConfigError(f"run.name is {name!r}; it must be printable, without spaces at its ends")


@dataclass
class TrainConfig(StreamConfig):
    steps: int = setting(1000, "optimiser steps of the whole run", least=1)
    dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "of weights and activations (auto: bf16 on a GPU, fp32 on a CPU)"
    )
    profile: int = setting(
        0,
        "steps to trace for Perfetto, from the third of each start on, into the run's folder; "
        "0 for none",
        least=0,
        most=100,
    )


@dataclass
class ZeroConfig:
    stage: Literal[0, 1, 2, 3] = setting(
        1, "what the ranks share: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too"
    )


@dataclass
class CheckpointConfig:
    every: int = setting(
        500,
        "steps between checkpoints; the last step always has one (0: it alone). A kill loses at "
        "most twice as many: a checkpoint is written beside training, and whole before the next "
        "one begins",
        least=0,
    )
    keep: int = setting(2, "newest checkpoints to keep; 0 for all", least=0)
    keep_every: int = setting(0, "steps whose multiples are kept for good; 0 for none", least=0)


@dataclass
class EvalConfig:
    every: int = setting(
        250,
        "steps between evaluations; the first and last always have one (0: they alone)",
        least=0,
    )
    tokens: int = setting(
        262144, "most tokens of the validation set that an evaluation reads", least=2
    )
    prompt: str = setting("def ", "text that the sample at the end goes on from")
    sample_tokens: int = setting(120, "tokens of that sample; 0 for none", least=0)
    temperature: float = setting(0.8, "of that sample; 0 takes the likeliest token", least=0)


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    @property
    def run_path(self) -> Path:
        return Path(self.run.root) / str(self.run.name)

    def to_dict(self) -> dict[str, Any]:
        """Every setting, as a run writes it: its paths mean the same in any working directory."""
        found = with_absolute_paths(self) | {"data": self.data.to_dict()}
        if self.parallel.cluster in clusters():  # a name, no path
            found["parallel"]["cluster"] = self.parallel.cluster
        return found


def due(step: int, every: int) -> bool:
    """Whether what is done every so many steps is done after this one; 0 is never."""
    return every > 0 and step % every == 0


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run from its file and the command line.

    Raises:
        ConfigError: one line naming the file or the command line, the key and the remedy.
    """
    config = load(Config, path, overrides)
    if config.run.name is None:
        config.run.name = Path(path).stem
        check_name(config.run.name)
    return config


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old → new` for every setting that differs, in more than a path's spelling."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after, name = old.get(key), new.get(key), f"{prefix}{key}"
        if _same_place(name, before, after):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before} → {after}")
    return lines


def _same_place(name: str, before: Any, after: Any) -> bool:
    """Whether a setting that names files names the same ones in both ways."""
    if name == "data.source" and before is not None and after is not None:
        return sources.absolute(before) == sources.absolute(after)
    both = isinstance(before, str) and isinstance(after, str)
    return both and name in _PATHS and os.path.realpath(before) == os.path.realpath(after)


_PATHS = {name for name, setting in fields(Config) if setting.metadata.get("path")}

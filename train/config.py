"""A run's settings: the rooms' dataclasses, composed. Light: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data import DataConfig, StreamConfig
from data.settings import ConfigError, load, setting
from parallel.config import ParallelConfig
from train.model.config import ModelConfig
from train.optimiser.optim import OptimConfig
from train.survival.faults import FaultsConfig


@dataclass
class RunConfig:
    root: str = setting("runs", "folder of all runs")
    name: str | None = setting(None, "folder of this run under run.root (null: the file's name)")
    start_from: str | None = setting(
        None,
        "folder of weights to begin with: a checkpoint, or what `import` or `convert` wrote "
        "(null: random ones)",
    )


@dataclass
class TrainConfig(StreamConfig):
    steps: int = setting(1000, "optimiser steps of the whole run")
    dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "of weights and activations (auto: bf16 on a GPU, fp32 on a CPU)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"train.steps is {self.steps}; it must be at least 1")


@dataclass
class ZeroConfig:
    stage: Literal[0, 1, 2, 3] = setting(
        1, "what the ranks share: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too"
    )


@dataclass
class CheckpointConfig:
    every: int = setting(
        500,
        "steps between checkpoints; the last step always has one. A kill loses at most twice as "
        "many: a checkpoint is written beside training, and whole before the next one begins",
    )
    keep: int = setting(2, "newest checkpoints to keep; 0 for all")
    keep_every: int = setting(0, "steps whose multiples are kept for good; 0 for none")

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"checkpoint.every is {self.every}; it must be at least 1")
        for key in ("keep", "keep_every"):
            if getattr(self, key) < 0:
                raise ConfigError(
                    f"checkpoint.{key} is {getattr(self, key)}; it must not be negative"
                )


@dataclass
class EvalConfig:
    every: int = setting(250, "steps between evaluations; the first and last always have one")
    tokens: int = setting(262144, "most tokens of the validation set that an evaluation reads")
    prompt: str = setting("def ", "text that the sample at the end goes on from")
    sample_tokens: int = setting(120, "tokens of that sample; 0 for none")
    temperature: float = setting(0.8, "of that sample; 0 takes the likeliest token")

    def __post_init__(self) -> None:
        # Two tokens: one, and the one that it predicts.
        for key, least in (("every", 1), ("tokens", 2), ("sample_tokens", 0), ("temperature", 0)):
            if getattr(self, key) < least:
                raise ConfigError(
                    f"eval.{key} is {getattr(self, key)}; it must be at least {least}"
                )


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
        return asdict(self)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run from its file and the command line.

    Raises:
        ConfigError: one line naming the file or the command line, the key and the remedy.
    """
    config = load(Config, path, overrides)
    if config.run.name is None:
        config.run.name = Path(path).stem
    return config


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines `key: old → new` for every setting that differs."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} → {after}")
    return lines

"""The model of a run as its newest good checkpoint has it, on one device, to look at or to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import data
from data.settings import ConfigError
from train import manifest
from train.config import Config
from train.engine import WEIGHT
from train.model import mixers
from train.model.transformer import Model


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, and what it was trained on."""

    model: Model
    material: data.Material
    config: Config
    checkpoint: Path

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def trained(run: Path, config: Config) -> Trained:
    """The newest checkpoint of `run` that verifies, on the GPU if there is one.

    Args:
        run: the run's folder.
        config: its settings.

    Raises:
        ConfigError: there is no good checkpoint, or it is of another model.
    """
    notes: list[str] = []
    found = manifest.newest(run / manifest.CHECKPOINTS, notes.append)
    if found is None:
        raise ConfigError("; ".join([f"{run} has no good checkpoint: train it first", *notes]))
    mixers.check(config.model)
    material = data.material(config.data, config.train)
    model = Model(config.model, material.tokenizer.vocab_size)
    held = weights(found)
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if name not in held or held[name].shape != parameter.shape
    ]
    if wrong or len(held) != len(list(model.parameters())):
        named = wrong[0] if wrong else "a parameter that it has"
        raise ConfigError(
            f"{found} is of another model ({named} does not fit); restore model.* of its run"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(held[name])
    on_gpu = torch.cuda.is_available()
    low = config.train.dtype == "bf16" or (config.train.dtype == "auto" and on_gpu)
    model.to("cuda" if on_gpu else "cpu", torch.bfloat16 if low else torch.float32)
    return Trained(model.eval(), material, config, found)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """The full fp32 weight of every parameter by its name, without the optimiser's state."""
    found: dict[str, Tensor] = {}
    for file in manifest.read(checkpoint)["files"]:
        with safe_open(checkpoint / file, framework="pt") as opened:
            for entry in opened.keys():  # noqa: SIM118
                name, _, key = entry.rpartition("|")
                if key == WEIGHT:
                    found[name] = opened.get_tensor(entry)
    return found

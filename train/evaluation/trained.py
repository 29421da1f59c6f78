"""The model of a run as its newest good checkpoint has it, on one device, to look at or to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import data
from data.settings import ConfigError
from train.config import Config
from train.model import mixers
from train.model.transformer import Model
from train.pretrained import weights
from train.pretrained.export import check
from train.survival import manifest


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
    tensors = weights.of_ours(found)
    check(model, {name: tensors.shape(name) for name in tensors.names}, found)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.read(name))
    on_gpu = torch.cuda.is_available()
    low = config.train.dtype == "bf16" or (config.train.dtype == "auto" and on_gpu)
    model.to("cuda" if on_gpu else "cpu", torch.bfloat16 if low else torch.float32)
    return Trained(model.eval(), material, config, found)

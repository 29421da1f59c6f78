"""What a model is: its parameters and the arithmetic of a token, by part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from train.forecast.activations import EMBEDDING
from train.model.linear import met
from train.model.transformer import Model

HEAD, NORMS, MLPS = "head", "norms", "MLPs"


@dataclass(frozen=True)
class Sizes:
    """A model's parameters.

    Attributes:
        by_part: number of parameters, by part: embedding, head, norms, MLPs, and each mixer's
            name. A head that is the embedding has none of its own.
        active: parameters that each token is computed with. A token reads one row of an embedding
            that is no head, and meets the experts that it chooses.
        shapes: of every parameter, by name.
    """

    by_part: dict[str, int]
    active: int
    shapes: dict[str, torch.Size]

    @property
    def total(self) -> int:
        return sum(self.by_part.values())


def sizes(model: Model) -> Sizes:
    """Count a model's parameters; it may be on meta tensors."""
    found: dict[str, int] = defaultdict(int)
    shapes = {}
    for name, parameter in model.named_parameters():
        found[_part(name, model)] += parameter.numel()
        shapes[name] = parameter.shape
    total = sum(found.values())
    lookup = 0 if model.config.tie_embeddings else found[EMBEDDING]
    asleep = model.matrices - model.matmul_parameters
    return Sizes(dict(found), total - lookup - asleep, shapes)


def _part(name: str, model: Model) -> str:
    """The part that a parameter belongs to."""
    if not name.startswith("blocks."):
        return {"embedding": EMBEDDING, "head": HEAD}.get(name.partition(".")[0], NORMS)
    _, layer, inside, *_ = name.split(".")
    return {"mixer": model.config.blocks[int(layer)], "mlp": MLPS}.get(inside, NORMS)


def flops(model: Model, lengths: Sequence[int] | np.ndarray) -> dict[str, float]:
    """FLOPs a token of a forward pass over sequences of these lengths, by part.

    A mixer's are its projections and what mixes tokens; the sum is that of `Model.flops`.
    """
    tokens = float(sum(lengths))
    found: dict[str, float] = defaultdict(float)
    for name, block in zip(model.config.blocks, model.blocks, strict=True):
        found[name] += 2.0 * met(block.mixer) + block.mixer.mixing_flops(lengths) / tokens
        found[MLPS] += 2.0 * met(block.mlp) if block.mlp is not None else 0.0
    found[HEAD] = 2.0 * model.head.weight.numel()
    return dict(found)

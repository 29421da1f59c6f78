"""Hedgehog's maps, learned so that its weights of the tokens before are the attention's.

For a head and a token i, attention has weights a_ij = softmax_j(⟨q_i, k_j⟩ / √D) and the layer
that stands in for it w_ij = ⟨φ_q(q_i), φ_k(k_j)⟩ / Σ_j. What is made small is the mean over
heads and tokens of Σ_j a_ij log(a_ij / w_ij): the cross-entropy of Zhang et al. 2024 (arXiv
2402.04347) less the entropy of a, which nothing can change. Every layer learns by itself, on
what reaches it in the model with attention everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import data
from data import Batch, Cursor
from data.settings import ConfigError
from parallel import Shard, shard
from train.config import Config
from train.model import mixers
from train.model.config import ModelConfig
from train.model.mixers import hedgehog
from train.model.mixers._parts import full, repeat_heads
from train.model.transformer import Model, place, skeleton
from train.pretrained import tokenizer as files
from train.pretrained.adopt import Pretrained
from train.pretrained.weights import Say

_MAPS = ("q_map", "k_map")
_REPORTS = 10

Students = dict[int, hedgehog.Mixer]


@dataclass(frozen=True)
class Distillation:
    """How the maps are learned.

    text: a run's settings, of which the data and the shape of batches count. steps: batches
    to learn from. lr: AdamW's learning rate.
    """

    text: Config
    steps: int = 200
    lr: float = 0.01


def distil(
    pretrained: Pretrained, config: ModelConfig, how: Distillation, say: Say
) -> dict[str, Tensor]:
    """The maps of every block of `config` that is `hedgehog`, by parameter name.

    Raises:
        ConfigError: the text cannot be read, or the model has no tokenizer for it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = _teacher(pretrained).to(device)
    students: Students = {}
    for layer, name in enumerate(config.blocks):
        if name == "hedgehog":
            student = mixers.make(name, config, layer)
            assert isinstance(student, hedgehog.Mixer)
            # The projections; maps are all that attention has not.
            student.load_state_dict(teacher.blocks[layer].mixer.state_dict(), strict=False)
            students[layer] = student.requires_grad_(False).to(device)
    maps = {
        f"blocks.{layer}.mixer.{name}": getattr(student, name).requires_grad_()
        for layer, student in students.items()
        for name in _MAPS
    }
    _learn(teacher, students, list(maps.values()), _batches(pretrained, how, say), how, say)
    return {name: parameter.detach().cpu() for name, parameter in maps.items()}


def divergence(student: hedgehog.Mixer, x: Tensor, here: Shard) -> Iterator[Tensor]:
    """Σ_j a_ij log(a_ij / w_ij), summed over heads and tokens, sequence by sequence.

    Each is to be let go of before the next: it holds weights of all tokens for all.

    Args:
        x: (1, T, dim), what the mixer mixes.
    """
    with torch.no_grad():
        q, k, _ = student.project(x, here)
        k = repeat_heads(k, student.heads // student.kv_heads)
    for first, last in pairwise(here.cu_seqlens.tolist()):
        q_here, k_here = (full(part[0, first:last]) for part in (q, k))
        after = torch.ones(last - first, last - first, dtype=torch.bool, device=x.device).triu(1)
        scores = torch.einsum("ihd,jhd->hij", q_here, k_here) * student.head_dim**-0.5
        wanted = scores.masked_fill(after, -torch.inf).log_softmax(-1)
        products = torch.einsum(
            "ihd,jhd->hij",
            hedgehog.features(q_here, student.q_map),
            hedgehog.features(k_here, student.k_map),
        ).masked_fill(after, 0)
        got = products / products.sum(-1, keepdim=True).clamp_min(1e-12)
        # Before the logarithm, which must not see what is masked.
        ratio = wanted.masked_fill(after, 0) - got.masked_fill(after, 1).clamp_min(1e-12).log()
        yield (wanted.exp() * ratio).sum()


def _learn(
    teacher: Model,
    students: Students,
    maps: list[Tensor],
    batches: Iterator[Batch],
    how: Distillation,
    say: Say,
) -> None:
    optimizer = torch.optim.AdamW(maps, how.lr, weight_decay=0.0)
    first = next(batches)
    before = _measure(teacher, students, first)
    for step in range(1, how.steps + 1):
        total = 0.0
        for _, part in _apart(teacher, students, next(batches)):
            part.backward()
            total += float(part.detach())
        optimizer.step()
        optimizer.zero_grad()
        if step == how.steps or step % max(1, how.steps // _REPORTS) == 0:
            apart = total / len(students)
            say(f"step {step}/{how.steps}  {apart:.4f} nats from the attention's weights")
    after = _measure(teacher, students, first)
    for layer in students:
        say(f"layer {layer}: {before[layer]:.4f} nats before, {after[layer]:.4f} after")


def _apart(teacher: Model, students: Students, batch: Batch) -> Iterator[tuple[int, Tensor]]:
    """Each layer's mean divergence on a batch, in as many parts as it has sequences."""
    device = teacher.embedding.weight.device
    here = shard(np.diff(batch.cu_seqlens).tolist(), device)
    for layer, x in _hidden(teacher, torch.from_numpy(batch.tokens).to(device), here):
        if layer in students:
            count = len(batch.tokens) * students[layer].heads
            for part in divergence(students[layer], x, here):
                yield layer, part / count


@torch.no_grad()
def _measure(teacher: Model, students: Students, batch: Batch) -> dict[int, float]:
    found = dict.fromkeys(students, 0.0)
    for layer, part in _apart(teacher, students, batch):
        found[layer] += float(part)
    return found


@torch.no_grad()
def _hidden(model: Model, tokens: Tensor, here: Shard) -> Iterator[tuple[int, Tensor]]:
    """What every block's mixer mixes, from the first block on."""
    x = model.embedding(tokens).unsqueeze(0)
    for layer, block in enumerate(model.blocks):
        yield layer, x if block.post_norm else block.mixer_norm(x)
        x = block(x, here)


def _teacher(pretrained: Pretrained) -> Model:
    model = skeleton(pretrained.config, pretrained.model.embedding.num_embeddings)
    place(model, lambda _, old: torch.empty(old.shape))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in pretrained.named_weights():
            parameters[name].copy_(weight)
    return model.requires_grad_(False)


def _batches(pretrained: Pretrained, how: Distillation, say: Say) -> Iterator[Batch]:
    found = files.find(pretrained.source, pretrained.model.embedding.num_embeddings, say)
    if found is None:
        raise ConfigError(f"{pretrained.source} has no tokenizer to read the text with")
    file = str(pretrained.source / found.file)
    material = data.material(replace(how.text.data, tokenizer=file), how.text.train, say)
    stream = material.batches(Cursor())
    try:
        yield from stream
    finally:
        stream.close()

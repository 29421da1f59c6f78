"""`python -m train convert HF_DIR --to DIR …`: a hybrid of a pretrained Transformer (`--pattern`),
or one with experts (`--experts`), or both.

The layers that the pattern names `liger` or `hedgehog` take over the projections of the
attention layers in their places; all others stay as they are.

- liger (Lan et al. 2025, arXiv 2503.01496) has no parameter that attention has not. What it
  lacks, training on brings.
- hedgehog (Zhang et al. 2024, arXiv 2402.04347) has maps of queries and keys. They are learned
  here, on text, so that its weights of the tokens before become those of the attention layer.

How MLPs become experts is said in `upcycle`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from data.settings import ConfigError
from train.model.config import ModelConfig, expanded
from train.model.mixers import hedgehog, liger
from train.model.transformer import check_settings
from train.pretrained import adopt, families, weights
from train.pretrained.distil import Distillation, distil
from train.pretrained.upcycle import Upcycling
from train.pretrained.weights import Say

# Layers that have taken over another's projections have more to learn than a model that goes on.
TAKEN_OVER = 1e-4
WHY = (
    "is a third of the peak that such models are pretrained at: more than for training on, since "
    "layers have a new part; the default is for random weights"
)
RECIPES = {"liger": liger, "hedgehog": hedgehog}


def convert(
    source: Path,
    to: Path,
    pattern: list[str] | None,
    distillation: Distillation | None,
    upcycling: Upcycling | None,
    say: Say,
) -> None:
    """Write the hybrid as a folder that a run can start from.

    Args:
        pattern: as model.pattern; repeated over the depth. None leaves all layers as they are.
        distillation: for patterns with `hedgehog`.
        upcycling: what becomes of the MLPs; None leaves them as they are.

    Raises:
        ConfigError: the model cannot be read, or the pattern asks for what it cannot become.
    """
    with weights.making(to) as folder:
        pretrained = adopt.read(source)
        config = pretrained.config if pattern is None else hybrid(pretrained.config, pattern)
        maps: dict[str, Tensor] = {}
        if "hedgehog" in config.blocks:
            if distillation is None:
                raise ConfigError(
                    "--pattern names hedgehog, whose maps are learned: add --text RUN.yaml"
                )
            maps = distil(pretrained, config, distillation, say)

        def named() -> Iterator[tuple[str, Tensor]]:
            yield from pretrained.named_weights()
            yield from maps.items()

        written = named()
        if upcycling is not None:
            config = upcycling.settings(config)
            rows = pretrained.model.embedding.num_embeddings
            written = upcycling.named_weights(config, rows, written)
        adopt.write(config, written, source, folder, to, say)
    say(f"{source} as {', '.join(config.block_kinds)} in {to}")
    say(f"to train on: {adopt.onward(to, TAKEN_OVER)}")
    say(f"optim.lr={TAKEN_OVER} {WHY}")


def hybrid(config: ModelConfig, pattern: list[str]) -> ModelConfig:
    """The settings of a model like `config` with the layers that `pattern` names.

    Raises:
        ConfigError: a layer cannot become what the pattern asks for.
    """
    if not pattern:
        raise ConfigError("--pattern is empty; name the mixers, as in [liger, liger, attention]")
    pattern = expanded(pattern)
    settings: dict[str, dict[str, Any]] = {}
    for layer, (held, kind, given) in enumerate(families.layers(config)):
        wanted = pattern[layer % len(pattern)]
        if wanted == held:
            settings[held] = config.mixers.get(held, {})
            continue
        if wanted not in RECIPES:
            raise ConfigError(
                f"--pattern names {wanted!r} where the model has {held!r}; a layer stays, or "
                f"becomes {' or '.join(RECIPES)}"
            )
        if kind != "attention" or given.window is not None or given.conv_size:
            raise ConfigError(
                f"--pattern makes layer {layer} a {wanted}; in the model it is {held!r}, and "
                "only attention without a window or a short convolution can become one"
            )
        known = {field.name for field in dataclasses.fields(RECIPES[wanted].Config)}
        kept = {k: v for k, v in config.mixers.get(held, {}).items() if k in known - {"window"}}
        if settings.setdefault(wanted, kept) != kept:
            raise ConfigError(f"--pattern makes {wanted} of layers with unlike settings")
    post_norm = config.post_norm
    if post_norm:
        post_norm = [name for name in settings if name != "gated_deltanet"]
    made = dataclasses.replace(config, pattern=pattern, mixers=settings, post_norm=post_norm)
    check_settings(made)
    return made

"""`python -m train export FOLDER --to DIR`: a model as a folder in Hugging Face's format.

config.json                what transformers needs to know; for a model that it does not
                           have, model_type "headrace" and the settings of `model`
model.safetensors          the weights, in parts with an index if they are large
tokenizer.model, .json     the tokenizer, and what AutoTokenizer needs besides
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.config import longest_seq_len
from data.settings import ConfigError
from data.tokens.tokenizer import Tokenizer
from train.config import Config
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.pretrained import families, weights
from train.pretrained import tokenizer as files
from train.pretrained.families import OWN, Family
from train.pretrained.folder import Stored
from train.pretrained.links import links
from train.pretrained.weights import Say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(found: Stored, to: Path, style: str, dtype: str, say: Say) -> None:
    """Write a model to `to`.

    Args:
        style: a family's name, `headrace`, or `auto` for the first of them that fits.
        dtype: fp32 or bf16, of the weights written.

    Raises:
        ConfigError: `style` cannot express the model, or it has no tokenizer.
    """
    config, model, tokenizer = found.config, found.model, found.tokenizer
    family = choose(config.model, style, say)
    written: Iterator[tuple[str, Tensor]]
    if family is None:
        description: dict[str, Any] = {"model_type": OWN, "model": asdict(config.model)}
        written = ((name, found.read(name)) for name, _ in model.kept_tensors())
    else:
        description = family.describe(config.model)
        written = _of_family(model, family, found.read)
    description |= {
        "vocab_size": found.vocab_size,
        "max_position_embeddings": positions(config, found.step),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": _ends(tokenizer),
        "pad_token_id": tokenizer.pad_id,
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }
    with weights.making(to) as folder:
        cast = ((name, tensor.to(DTYPES[dtype])) for name, tensor in written)
        weights.write(cast, folder, weights.THEIRS)
        files.write(tokenizer, folder, say)
        if family is not None and family.own_tokenizer:
            say(
                f"AutoTokenizer makes {family.own_tokenizer}'s own tokenizer of any file here; "
                "PreTrainedTokenizerFast.from_pretrained reads this one"
            )
        text = json.dumps(description, indent=2)
        (folder / "config.json").write_text(text, encoding="utf-8")
    kind = family.architecture if family else f"model_type {OWN}, for `python -m train import`"
    say(f"{found.source} as {kind} in {to}")


def choose(config: ModelConfig, style: str, say: Say) -> Family | None:
    """The family to export as; None for our own format.

    Raises:
        ConfigError: the one asked for cannot express the model, with the first reason.
    """
    if style == OWN:
        return None
    if style == "auto":
        family, faults = families.nearest(config)
        if not faults:
            return family
        say(f"transformers has no such model; nearest is {family.name}: {faults[0]}")
        return None
    wished = families.named(style)
    if wished is None:
        raise ConfigError(f"--as is {style!r}; the styles are {', '.join(styles())}")
    faults = wished.faults(config)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ConfigError(f"{faults[0]}{more}; --as {OWN} takes every model")
    return wished


def styles() -> list[str]:
    """What a model may be exported as."""
    return ["auto", *(family.name for family in families.FAMILIES), OWN]


def _of_family(
    model: Model, family: Family, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for link in links(model, family):
        yield from link.to_theirs(read)


def positions(config: Config, step: int | None) -> int:
    """The longest sequence that weights were trained on.

    Args:
        step: of the run's checkpoint; None for weights that were not trained on since their import.
    """
    before = config.model.max_positions
    if before and step is None:
        return before
    return max(before or 0, longest_seq_len(config.data, config.train, step or 0))


def _ends(tokenizer: Tokenizer) -> int | list[int] | None:
    """Where generation stops, as transformers writes it: eos first."""
    ends = [tokenizer.eos_id, *sorted(tokenizer.end_ids - {tokenizer.eos_id})]
    if tokenizer.eos_id < 0:
        return None
    return ends if len(ends) > 1 else tokenizer.eos_id

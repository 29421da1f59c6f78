"""`python -m train export RUN --to DIR`: a run's model as a folder in Hugging Face's format.

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

import data
from data import tokenizer as tokenizers
from data.config import longest_seq_len
from data.settings import ConfigError
from data.tokenizer import Tokenizer
from train.config import Config
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.pretrained import families, weights
from train.pretrained import tokenizer as files
from train.pretrained.families import Family
from train.pretrained.links import links
from train.survival import manifest

OWN = "headrace"  # model_type of what transformers does not have
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Say = Callable[[str], None]


def export(
    run: Path, config: Config, to: Path, step: int | None, style: str, dtype: str, say: Say
) -> None:
    """Write the model of a run, or of a folder that `import` or `convert` wrote, to `to`.

    Args:
        step: of the checkpoint; None takes the newest that verifies.
        style: a family's name, `headrace`, or `auto` for the first of them that fits.
        dtype: fp32 or bf16, of the weights written.

    Raises:
        ConfigError: there are no such weights, or `style` cannot express the model.
    """
    family = choose(config.model, style, say)
    source = _weights(run, step, say)
    tensors = weights.of_ours(source)
    model = skeleton(config.model, tensors.shape("embedding.weight")[0])
    check(model, {name: tensors.shape(name) for name in tensors.names}, source)
    tokenizer = _tokenizer(config, say)
    written: Iterator[tuple[str, Tensor]]
    if family is None:
        description: dict[str, Any] = {"model_type": OWN, "model": asdict(config.model)}
        written = ((name, tensors.read(name)) for name, _ in model.named_parameters())
    else:
        description = family.describe(config.model, model.blocks[0].mlp.out.in_features)
        written = _of_family(model, family, tensors)
    description |= {
        "vocab_size": model.embedding.num_embeddings,
        "max_position_embeddings": positions(config, _step(source)),
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
    say(f"{source} as {kind} in {to}")


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


def skeleton(config: ModelConfig, vocab_size: int) -> Model:
    """The model without memory for its weights: names and shapes."""
    with torch.device("meta"):
        return Model(config, vocab_size)


def check(model: Model, shapes: dict[str, list[int]], source: Path) -> None:
    """See that these are the shapes of the model's parameters.

    Raises:
        ConfigError: naming the first that is not.
    """
    for name, parameter in model.named_parameters():
        if shapes.get(name) != list(parameter.shape):
            raise ConfigError(
                f"{source} is of another model: {name} is {shapes.get(name)} there and "
                f"{list(parameter.shape)} by the settings of model"
            )


def _of_family(
    model: Model, family: Family, tensors: weights.Tensors
) -> Iterator[tuple[str, Tensor]]:
    for link in links(model, family):
        yield from link.to_theirs(tensors.read)


def positions(config: Config, step: int | None) -> int:
    """The longest sequence that weights were trained on.

    Args:
        step: of the run's checkpoint; None for weights that were not trained on since their import.
    """
    before = config.model.max_positions
    if before and step is None:
        return before
    return max(before or 0, longest_seq_len(config.data, config.train, step or 0))


def _step(source: Path) -> int | None:
    return manifest.step_of(source) if source.parent.name == manifest.CHECKPOINTS else None


def _ends(tokenizer: Tokenizer) -> int | list[int] | None:
    """Where generation stops, as transformers writes it: eos first."""
    ends = [tokenizer.eos_id, *sorted(tokenizer.end_ids - {tokenizer.eos_id})]
    if tokenizer.eos_id < 0:
        return None
    return ends if len(ends) > 1 else tokenizer.eos_id


def _weights(run: Path, step: int | None, say: Say) -> Path:
    """The folder with the weights to export."""
    checkpoints = run / manifest.CHECKPOINTS
    if step is None:
        found = manifest.newest(checkpoints, say)
        if found is None and checkpoints.exists():
            raise ConfigError(f"{run} has no whole checkpoint to export")
        return found or run
    wanted = checkpoints / manifest.name(step)
    if wanted not in manifest.published(checkpoints):
        steps = ", ".join(str(manifest.step_of(path)) for path in manifest.published(checkpoints))
        raise ConfigError(f"--step is {step}; {run} has checkpoints of {steps or 'no step'}")
    wrong = manifest.fault(wanted)
    if wrong:
        raise ConfigError(f"{wanted}: {wrong}")
    return wanted


def _tokenizer(config: Config, say: Say) -> Tokenizer:
    if config.data.tokenizer is not None:
        return tokenizers.load(Path(config.data.tokenizer))
    return data.material(config.data, config.train, say).tokenizer

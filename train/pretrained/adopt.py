"""`python -m train import HF_DIR --to DIR`: a model in Hugging Face's format, to train on.

    config.yaml            the sections of a run's file that the model decides
    weights.safetensors    the weights by our names, named as in a checkpoint
    tokenizer.model|json   the tokenizer, if ours can be it

The weights are as they were, to the last bit and in their dtype.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.settings import ConfigError, absolute, build
from data.values import dump
from train.model import mixers
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.pretrained import families, weights
from train.pretrained import tokenizer as files
from train.pretrained.families import OWN
from train.pretrained.links import Link, links
from train.pretrained.weights import Say, check, skeleton


@dataclass(frozen=True)
class Pretrained:
    """A model in Hugging Face's format: its settings as ours, and where its weights lie.

    model: on `meta`. links: between its tensors and ours.
    """

    source: Path
    model: Model
    tensors: weights.Tensors
    links: list[Link]

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Our parameters by name, read one by one."""
        for link in self.links:
            yield from link.to_ours(self.tensors.read)


def adopt(source: Path, to: Path, say: Say) -> None:
    """Write the model in `source` as a folder that a run can start from.

    Raises:
        ConfigError: as `read`, or `to` is there already.
    """
    found = read(source)
    write(found.config, found.named_weights(), source, to, say)
    say(f"{source} in {to}; to train on: {onward(to)}")


def read(source: Path) -> Pretrained:
    """Open a model in Hugging Face's format.

    Raises:
        ConfigError: it is of no family here, has what our layers have not, or lacks tensors.
    """
    path = source / "config.json"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        kind, vocab_size = held["model_type"], held["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no description of a model ({error})") from None
    family = families.named(kind)
    if family is None and kind != OWN:
        known = ", ".join(family.name for family in families.FAMILIES)
        raise ConfigError(f"{path}: model_type is {kind!r}; known are {known} and {OWN}")
    try:
        settings = family.adopt(held) if family else held.get("model", {})
        config = _settings(settings, str(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    model = skeleton(config, vocab_size)
    tensors = weights.of_family(source)
    own = (Link({name: -1}, {name: -1}) for name, _ in model.named_parameters())
    linked = list(links(model, family) if family else own)
    _check_names(linked, tensors, config, source)
    return Pretrained(source, model, tensors, linked)


def write(
    config: ModelConfig, named: Iterable[tuple[str, Tensor]], source: Path, to: Path, say: Say
) -> None:
    """Write a folder that a run can start from.

    Args:
        named: the weights by our names.
        source: where the tokenizer lies.

    Raises:
        ConfigError: a weight is not of the shape that `config` says, or `to` is there already.
    """
    shapes: dict[str, list[int]] = {}

    def seen() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            shapes[name] = list(tensor.shape)
            yield name, tensor

    with weights.making(to) as folder:
        weights.write(seen(), folder, weights.OURS)
        check(skeleton(config, shapes["embedding.weight"][0]), shapes, source)
        sections: dict[str, Any] = {"run": {"name": to.name, "start_from": absolute(str(to))}}
        found = files.find(source)
        if found is None:
            say(f"{source} has no tokenizer that gives text back as it was: set data.tokenizer")
        else:
            shutil.copyfile(found, folder / found.name)
            sections["data"] = {"tokenizer": absolute(str(to / found.name))}
        sections["model"] = asdict(config)
        text = dump(sections)
        (folder / "config.yaml").write_text(text, encoding="utf-8")


def onward(folder: Path) -> str:
    """The command that trains on."""
    return f"python -m train {folder / 'config.yaml'} data.source=… train.steps=…"


def _settings(settings: dict[str, Any], where: str) -> ModelConfig:
    config = build(ModelConfig, {key: (value, where) for key, value in settings.items()}, where)
    mixers.check(config)
    return config


def _check_names(
    linked: list[Link], tensors: weights.Tensors, config: ModelConfig, source: Path
) -> None:
    """Every tensor that is needed is there, and none is left over that would change the model."""
    wanted = {name for link in linked for name in link.theirs}
    for name in sorted(wanted):
        if name not in tensors:
            raise ConfigError(f"{source}: there is no tensor {name}")
    for name in sorted(tensors.names - wanted):
        tied = config.tie_embeddings and name == "lm_head.weight"
        # Wavelengths that old versions saved, and heads that predict further tokens.
        if not (tied or name.endswith("rotary_emb.inv_freq") or name.startswith("mtp.")):
            raise ConfigError(f"{source}: {name} has no place in such a model here")

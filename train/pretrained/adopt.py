"""`python -m train import HF_DIR --to DIR`: a model in Hugging Face's format, to train on.

    config.yaml            the sections of a run's file that the model decides
    weights.safetensors    the weights by our names, named as in a checkpoint
    tokenizer.model|json   the tokenizer, if ours can be it, and the files that belong to it:
                           what ends a text, how it chats, how it generates

The weights are as they were, to the last bit and in their dtype.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.settings import ConfigError, absolute, build
from data.tokens.beside import mapping, shown
from data.values import dump
from train.model.config import ModelConfig
from train.model.transformer import Model, check_settings, skeleton
from train.pretrained import families, weights
from train.pretrained import tokenizer as files
from train.pretrained.described import MOST_LAYERS, Described, settings
from train.pretrained.families import OWN, Family
from train.pretrained.links import Link, links
from train.pretrained.weights import Say, check

# Models of these families are pretrained at peaks of 1.5e-4 to 4e-4 and end far below. Much above
# that they forget first what they have to learn again.
CONTINUED = 3e-5
WHY = "is a tenth of the peak that such models are pretrained at; the default is for random weights"


_LONGEST = 400  # characters of what is wrong; a value may be a page
# Of weights as safetensors names them; whole numbers are quantised ones.
DTYPES = ("F64", "F32", "F16", "BF16")


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
    with weights.making(to) as folder:
        found = read(source)
        write(found.config, found.named_weights(), source, folder, to, say)
    say(f"{source} in {to}; to train on: {onward(to, CONTINUED)}")
    say(f"optim.lr={CONTINUED} {WHY}")


def read(source: Path) -> Pretrained:
    """Open a model in Hugging Face's format.

    Raises:
        ConfigError: it is of no family here, has what our layers have not, or lacks tensors.
    """
    config, rows, family = description(source)
    try:
        model = skeleton(config, rows)
    except (RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{source / 'config.json'}: there is no model of such sizes ({reason})"
        ) from None
    tensors = weights.of_family(source)
    own = (Link({name: -1}, {name: -1}) for name, _ in model.kept_tensors())
    linked = [link.found(tensors) for link in (links(model, family) if family else own)]
    _check_names(linked, tensors, config, source)
    _check_shapes(linked, tensors, model, source)
    return Pretrained(source, model, tensors, linked)


def description(source: Path) -> tuple[ModelConfig, int, Family | None]:
    """What the config.json in `source` says: our settings, rows of the embedding, and the family.

    The family is None where the format is our own.

    Raises:
        ConfigError: as `read`.
    """
    path = source / "config.json"
    if not path.is_file():
        raise ConfigError(weights.elsewhere(source) or f"{path}: there is no such file")
    try:
        held = mapping(path.read_bytes(), "config.json")
        said = Described(held)
        kind, rows = said.text("model_type"), said.whole("vocab_size")
        family = families.named(kind)
        if family is None and kind != OWN:
            known = ", ".join(family.name for family in families.FAMILIES)
            raise ConfigError(f"model_type is {shown(kind)}; known are {known} and {OWN}")
        given = settings(family, held) if family else said.mapping("model").held
        return _settings(given), rows, family
    except ConfigError as error:
        reason = " ".join(str(error).removeprefix("config.json: ").split())
        raise ConfigError(f"{path}: {reason[:_LONGEST]}") from None


def write(
    config: ModelConfig,
    named: Iterable[tuple[str, Tensor]],
    source: Path,
    folder: Path,
    to: Path,
    say: Say,
) -> None:
    """Write a folder that a run can start from, wherever that run is started.

    Args:
        named: the weights by our names.
        source: where the tokenizer lies.
        folder: an empty one, which will be `to`.

    Raises:
        ConfigError: a weight is not of the shape that `config` says.
    """
    to = Path(os.path.abspath(to))
    shapes: dict[str, list[int]] = {}

    def seen() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            shapes[name] = list(tensor.shape)
            yield name, tensor

    weights.write(seen(), folder, weights.OURS)
    rows = shapes["embedding.weight"][0]
    check(skeleton(config, rows), shapes, source)
    sections: dict[str, Any] = {"run": {"name": to.name, "start_from": absolute(str(to))}}
    found = files.find(source, rows, say)
    if found is None:
        say(f"{source} has no tokenizer to train with: set data.tokenizer")
    else:
        files.copy(found, folder)
        sections["data"] = {"tokenizer": absolute(str(to / found.file))}
    sections["model"] = asdict(config)
    (folder / "config.yaml").write_text(dump(sections), encoding="utf-8")


def onward(folder: Path, lr: float) -> str:
    """The command that trains on."""
    words = f"data.source=… train.steps=… optim.lr={lr}"
    return f"python -m train {shlex.quote(str(folder / 'config.yaml'))} {words}"


def _settings(given: dict[str, Any]) -> ModelConfig:
    where = "config.json"
    config = build(ModelConfig, {key: (value, where) for key, value in given.items()}, where)
    if max(config.layers, len(config.pattern)) > MOST_LAYERS:
        raise ConfigError(f"layers is {config.layers}; the limit is {MOST_LAYERS}")
    check_settings(config)
    return config


def _check_names(
    linked: list[Link], tensors: weights.Tensors, config: ModelConfig, source: Path
) -> None:
    """Every tensor that is needed is there, and none is left over that would change the model."""
    wanted = {name for link in linked for name in link.theirs}
    for name in sorted(wanted):
        if name not in tensors:
            raise ConfigError(f"{source}: there is no tensor {name}")
        if (kind := tensors.dtype(name)) not in DTYPES:
            raise ConfigError(f"{source}: {name} is of dtype {kind}; {', '.join(DTYPES)} are read")
    for name in sorted(tensors.names - wanted):
        tied = config.tie_embeddings and name == "lm_head.weight"
        # Wavelengths that old versions saved, and heads that predict further tokens.
        if not (tied or name.endswith("rotary_emb.inv_freq") or name.startswith("mtp.")):
            raise ConfigError(f"{source}: {shown(name)} has no place in such a model here")


def _check_shapes(linked: list[Link], tensors: weights.Tensors, model: Model, source: Path) -> None:
    """Their tensors are of the shapes that ours have on the way to them."""
    parameters = dict(model.kept_tensors())
    for link in linked:
        for name, tensor in link.to_theirs(lambda name: parameters[name].detach()):
            if tensors.shape(name) != list(tensor.shape):
                raise ConfigError(
                    f"{source} is of another model: {name} is {tensors.shape(name)} there and "
                    f"{list(tensor.shape)} by its config.json"
                )

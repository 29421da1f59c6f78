"""A model in a folder, whoever wrote it.

    a run                      config.yaml, checkpoints/step-…/
    `import`, `convert`        config.yaml, weights.safetensors, a tokenizer
    `export`, transformers     config.json, model.safetensors, a tokenizer

Here such a folder becomes settings, shapes, and tensors that are read one by one; `train.load`,
`generate`, `evaluate` and `export` stand on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

import data
from data.config import RECALL
from data.settings import ConfigError, build, override
from data.tokens import tokenizer as tokenizers
from data.tokens.pieces import MOST_IDS
from data.tokens.tokenizer import Tokenizer
from train.config import Config, read
from train.model.transformer import Model, check_settings, skeleton
from train.pretrained import adopt, weights
from train.pretrained import tokenizer as files
from train.pretrained.weights import Say, check, check_shape
from train.survival import manifest

SETTINGS, DESCRIPTION = "config.yaml", "config.json"
KINDS = "a run, or what `python -m train import`, `convert` or `export` wrote"


@dataclass(frozen=True)
class Stored:
    """A model in a folder; its tensors are still there.

    folder: the run's, or the one with the weights in it. source: where these lie: `folder`, or a
    checkpoint of the run. step: of the checkpoint; None if it is no run's. config: the settings,
    with the defaults where the folder has none. model: on `meta`, of which only names and shapes
    count. read: a parameter by its name, of that shape. has_data: whether `config.data` names
    what to train on. say: told what takes long.
    """

    folder: Path
    source: Path
    step: int | None
    config: Config
    model: Model
    read: Callable[[str], Tensor]
    has_data: bool
    say: Say

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; a model may have more than its tokenizer has pieces."""
        return self.model.embedding.num_embeddings

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with.

        Raises:
            ConfigError: it is missing or broken, has more pieces than the model has rows, or was
                trained on text that has changed.
        """
        config = self.config.data
        if config.source == RECALL and self.has_data:
            found = self.material.tokenizer
        elif config.tokenizer is None and self.has_data:
            self._check_text()
            found = self.material.tokenizer
        elif config.tokenizer is not None:
            found = tokenizers.load(Path(config.tokenizer))
        else:
            raise ConfigError(
                f"{self.folder} has no tokenizer that gives text back as it was "
                f"({' or '.join(files.FILES)}): put the model's there"
            )
        if found.vocab_size > self.vocab_size:
            raise ConfigError(
                f"{self.source} is of another model: it has {self.vocab_size} rows, the "
                f"tokenizer {found.vocab_size} pieces; see data.tokenizer and data.source"
            )
        return found

    def _check_text(self) -> None:
        """See that the text is that of the run: from another comes another tokenizer."""
        if self.step is None:
            return
        if manifest.read(self.source)["cursor"]["corpus"] != self.material.key:
            raise ConfigError(
                f"{self.source} was trained on another corpus than data.source is now, with a "
                "tokenizer made of it: restore the text and train.seed, name the old tokenizer as "
                f"data.tokenizer=FILE (in {self.config.data.root}), or add --text FILE to measure "
                "on another text"
            )

    @cached_property
    def material(self) -> data.Material:
        """What the model was trained on, prepared if it is text that was not.

        Raises:
            ConfigError: the folder names nothing, or it cannot be read.
        """
        if not self.has_data:
            raise ConfigError(f"{self.folder} has no data of its own")
        return data.material(self.config.data, self.config.train, self.say)


def find(
    folder: Path,
    overrides: Sequence[str] = (),
    step: int | None = None,
    say: Say = lambda line: None,
) -> Stored:
    """Open the model in `folder`.

    Args:
        folder: of a run, of one of its checkpoints, of an import, a conversion or an export; or
            a run's YAML file.
        overrides: settings that replace those of the folder, as `key=value`.
        step: of a run's checkpoint; None is the newest that verifies.
        say: told which checkpoints are passed over, and what is prepared.

    Raises:
        ConfigError: there is no such model, or one that is broken or not what its settings say.
    """
    if not folder.exists():
        raise ConfigError(f"{folder}: there is no such folder; name {KINDS}")
    settings = folder / SETTINGS
    if not folder.is_dir():
        config = read(folder, overrides)
        return _of_run(config.run_path, config, step, say)
    if (folder / manifest.MANIFEST).exists():
        return _of_run(*_run_of(folder, overrides, step), say)
    if not (folder / manifest.CHECKPOINTS).exists():
        if settings.exists() and any(folder.glob(f"{weights.OURS}*.safetensors")):
            _no_step(folder, step)
            return _of_ours(folder, read(settings, overrides), overrides, say)
        if (folder / DESCRIPTION).exists():
            _no_step(folder, step)
            return _of_description(folder, overrides, say)
    if not settings.exists():
        raise ConfigError(
            f"{folder} holds no model: there is neither {SETTINGS} nor {DESCRIPTION} in it; "
            f"name {KINDS}"
        )
    return _of_run(folder, read(settings, overrides), step, say)


def _of_run(run: Path, config: Config, step: int | None, say: Say) -> Stored:
    checkpoint = _checkpoint(run, step, say)
    model, tensors = _opened(config, checkpoint)
    found = manifest.step_of(checkpoint)
    return Stored(run, checkpoint, found, config, model, tensors.read, True, say)


def _of_ours(folder: Path, config: Config, overrides: Sequence[str], say: Say) -> Stored:
    model, tensors = _opened(config, folder)
    if config.data.tokenizer is not None:
        # Beside the weights, wherever the folder has been moved to.
        beside = folder / Path(config.data.tokenizer).name
        config.data.tokenizer = str(beside if beside.exists() else config.data.tokenizer)
    has_data = _names_data(overrides)
    return Stored(folder, folder, None, config, model, tensors.read, has_data, say)


def _of_description(folder: Path, overrides: Sequence[str], say: Say) -> Stored:
    found = adopt.read(folder)
    where = str(folder / DESCRIPTION)
    values: dict[str, tuple[Any, str]] = {
        f"model.{key}": (value, where) for key, value in asdict(found.config).items()
    }
    length = json.loads((folder / DESCRIPTION).read_text("utf-8")).get("max_position_embeddings")
    if isinstance(length, int) and length >= 2:
        values["train.seq_len"] = (length, where)
        values["train.batch_tokens"] = (max(length, Config().train.batch_tokens), where)
    values["run.name"] = (folder.resolve().name, where)
    rows = found.model.embedding.num_embeddings
    # Whether it has as many pieces as the model has rows, `Stored.tokenizer` sees.
    if (tokenizer := files.find(folder, MOST_IDS, lambda line: None)) is not None:
        values["data.tokenizer"] = (str(folder / tokenizer.file), where)
    override(Config, values, overrides)
    config = build(Config, values, where)
    check_settings(config.model)
    model = skeleton(config.model, rows)
    parameters = dict(model.kept_tensors())
    link_of = {name: link for link in found.links for name in link.ours}

    def read_ours(name: str) -> Tensor:
        if name not in link_of:
            raise ConfigError(f"{folder} is of another model: there is no {name} in it")
        tensor = dict(link_of[name].to_ours(found.tensors.read))[name]
        check_shape(name, parameters[name], list(tensor.shape), folder)
        return tensor

    return Stored(folder, folder, None, config, model, read_ours, _names_data(overrides), say)


def _opened(config: Config, folder: Path) -> tuple[Model, weights.Tensors]:
    """The model on `meta` and the tensors of a folder of ours, which are found to be its own."""
    check_settings(config.model)
    tensors = weights.of_ours(folder)
    if "embedding.weight" not in tensors:
        raise ConfigError(f"{folder} holds no model: there is no embedding.weight")
    model = skeleton(config.model, tensors.shape("embedding.weight")[0])
    check(model, {name: tensors.shape(name) for name in tensors.names}, folder)
    return model, tensors


def _checkpoint(run: Path, step: int | None, say: Say) -> Path:
    checkpoints = run / manifest.CHECKPOINTS
    if step is None:
        notes: list[str] = []
        found = manifest.newest(checkpoints, notes.append)
        if found is None:
            raise ConfigError("; ".join([f"{run} has no good checkpoint: train it first", *notes]))
        for note in notes:
            say(note)
        return found
    wanted = checkpoints / manifest.name(step)
    if wanted not in manifest.published(checkpoints):
        steps = ", ".join(str(manifest.step_of(path)) for path in manifest.published(checkpoints))
        raise ConfigError(f"--step is {step}; {run} has checkpoints of {steps or 'no step'}")
    wrong = manifest.fault(wanted)
    if wrong:
        raise ConfigError(f"{wanted}: {wrong}")
    return wanted


def _run_of(
    checkpoint: Path, overrides: Sequence[str], step: int | None
) -> tuple[Path, Config, int]:
    """The run that a checkpoint's folder lies in, its settings, and the step."""
    place = checkpoint.absolute()
    run = place.parent.parent
    settings = run / SETTINGS
    if place not in manifest.published(run / manifest.CHECKPOINTS) or not settings.exists():
        raise ConfigError(f"{checkpoint} lies in no run's folder; name {KINDS}")
    _no_step(checkpoint, step)
    return run, read(settings, overrides), manifest.step_of(place)


def _no_step(folder: Path, step: int | None) -> None:
    if step is not None:
        raise ConfigError(f"--step is {step}; {folder} is no run's folder and has no steps")


def _names_data(overrides: Sequence[str]) -> bool:
    return any(word.partition("=")[0].strip() == "data.source" for word in overrides)

"""Tensors by name in safetensors files: found without being read, seen to be those of a model, and
written in parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.settings import ConfigError
from train.engine import WEIGHT
from train.model.config import ModelConfig
from train.model.transformer import Model

Say = Callable[[str], None]  # told what is done, a line at a time

PART_BYTES = 4 << 30
THEIRS = "model"  # what such files are called in Hugging Face's format
OURS = "weights"  # and in a folder that a run starts from
# A checkpoint keeps more than the weight of each parameter; so does its naming.
_ENTRY = f"|{WEIGHT}"


class Tensors:
    """The tensors of some safetensors files; each is read when it is asked for.

    Args:
        files: the files.
        suffix: what the names of the wanted tensors end with; callers leave it out.

    Raises:
        ConfigError: a file is missing or broken.
    """

    def __init__(self, files: Iterable[Path], suffix: str = "") -> None:
        self._suffix = suffix
        self._where = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{file}: cannot be read ({error})") from None
            for entry in opened.keys():  # noqa: SIM118
                if entry.endswith(suffix):
                    self._where[entry.removesuffix(suffix)] = opened

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> list[int]:
        return self._where[name].get_slice(name + self._suffix).get_shape()

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name + self._suffix)
        return tensor


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
        check_shape(name, parameter, shapes.get(name), source)


def check_shape(name: str, parameter: Tensor, shape: list[int] | None, source: Path) -> None:
    """See that a tensor of this shape is the parameter; None is one that is not there.

    Raises:
        ConfigError: it is not.
    """
    if shape != list(parameter.shape):
        raise ConfigError(
            f"{source} is of another model: {name} is {shape} there and "
            f"{list(parameter.shape)} by the settings of model"
        )


def of_family(folder: Path) -> Tensors:
    """Those of a model in Hugging Face's format, in one file or many.

    Raises:
        ConfigError: there are none; pickled ones are not read.
    """
    index = folder / f"{THEIRS}.safetensors.index.json"
    if index.exists():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            raise ConfigError(f"{index}: is no index of safetensors files") from None
        return Tensors(folder / file for file in sorted(files))
    file = folder / f"{THEIRS}.safetensors"
    if not file.exists():
        raise ConfigError(
            f"{folder} holds no {file.name}; weights in other formats are not read, "
            "save them as safetensors"
        )
    return Tensors([file])


def of_ours(folder: Path) -> Tensors:
    """Those of a checkpoint of a run, or of a folder that `import` or `convert` wrote.

    Raises:
        ConfigError: there are none.
    """
    found = Tensors(sorted(folder.glob("*.safetensors")), _ENTRY)
    if not found.names:
        raise ConfigError(
            f"{folder} holds no weights; name a checkpoint of a run, or what "
            "`python -m train import` or `convert` wrote"
        )
    return found


def write(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, stem: str, most: int = PART_BYTES
) -> None:
    """Write tensors under `folder` as `stem`.safetensors, or in parts with an index.

    Only one part is in memory at a time. Ours are named as in a checkpoint.

    Args:
        most: bytes of a part, which a single larger tensor may exceed.
    """
    suffix = _ENTRY if stem == OURS else ""
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"{stem}-{len(parts) + 1:05d}.safetensors"
        save_file(held, path, {"format": "pt"})
        path.chmod(0o644)  # it is written for its owner alone
        parts.append(list(held))
        held.clear()

    for name, tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        if held and size + bytes_here > most:
            flush()
            size = 0
        held[name + suffix] = tensor.detach().contiguous()
        size, total = size + bytes_here, total + bytes_here
    flush()
    if len(parts) == 1:
        (folder / f"{stem}-00001.safetensors").rename(folder / f"{stem}.safetensors")
        return
    where: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"{stem}-{number:05d}.safetensors").rename(folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=1), encoding="utf-8")


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A folder to write in, that becomes `folder` when all is written.

    Raises:
        ConfigError: there is something, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; name another folder, or remove it")
    part = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise ConfigError(f"{error.filename or part}: {error.strerror or error}") from None

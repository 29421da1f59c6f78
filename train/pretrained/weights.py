"""Tensors by name in safetensors files: found without being read, seen to be those of a model, and
written in parts."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import regular
from data.settings import ConfigError
from data.tokens.beside import mapping, shown
from train.engine import WEIGHT
from train.model.transformer import Model

Say = Callable[[str], None]  # told what is done, a line at a time

PART_BYTES = 4 << 30
THEIRS = "model"  # what such files are called in Hugging Face's format
OURS = "weights"  # and in a folder that a run starts from
# A checkpoint keeps more than the weight of each parameter; so does its naming.
_ENTRY = f"|{WEIGHT}"
_FILE = re.compile(r"[^/\\]+\.safetensors")


class Tensors:
    """The tensors of some safetensors files; each is read when it is asked for.

    Args:
        files: the files.
        suffix: what the names of the wanted tensors end with; callers leave it out.

    Raises:
        ConfigError: a file is missing or broken, or two have a tensor of one name.
    """

    def __init__(self, files: Iterable[Path], suffix: str = "") -> None:
        self._suffix = suffix
        self._where: dict[str, Any] = {}
        for file in files:
            try:
                os.close(regular.opened(file))
                opened = safe_open(file, framework="pt")
            except (OSError, ValueError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(f"{file}: cannot be read ({reason})") from None
            for entry in opened.keys():  # noqa: SIM118
                if entry.endswith(suffix):
                    name = entry.removesuffix(suffix)
                    if name in self._where:
                        raise ConfigError(f"{file}: {shown(name)} is in another file already")
                    self._where[name] = opened

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> list[int]:
        shape: list[int] = self._where[name].get_slice(name + self._suffix).get_shape()
        return shape

    def dtype(self, name: str) -> str:
        """As safetensors names it: F32, BF16, …"""
        return str(self._where[name].get_slice(name + self._suffix).get_dtype())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._where[name].get_tensor(name + self._suffix)
        return tensor


def check(model: Model, shapes: dict[str, list[int]], source: Path) -> None:
    """See that these are the shapes of the model's parameters, and of the biases of its routers.

    Raises:
        ConfigError: naming the first that is not.
    """
    for name, parameter in model.kept_tensors():
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

    Links are followed: the hub's cache is made of them. What an index names is in the folder.

    Raises:
        ConfigError: there are none, or an index is malformed; pickled ones are not read.
    """
    index = folder / f"{THEIRS}.safetensors.index.json"
    if index.exists():
        return _indexed(index)
    file = folder / f"{THEIRS}.safetensors"
    if not file.exists():
        raise ConfigError(elsewhere(folder) or f"{folder} holds no {file.name}")
    return Tensors([file])


def elsewhere(folder: Path) -> str | None:
    """What to do about a folder whose model is in another format; None if it is in none."""
    if not folder.is_dir():
        return f"{folder} is no folder; name one with config.json and {THEIRS}.safetensors"
    load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}"
    for ends, kind, words in (
        (".gguf", "a GGUF file", ", gguf_file={!r}"),
        (".bin", "pickled weights, which can run code when they are opened", ""),
        (".pt", "pickled weights, which can run code when they are opened", None),
        (".pth", "pickled weights, which can run code when they are opened", None),
    ):
        found = sorted(path.name for path in folder.iterdir() if path.name.endswith(ends))
        if found and not any(path.suffix == ".safetensors" for path in folder.iterdir()):
            how = "save it as safetensors"
            if words is not None:
                how += f" with transformers: {load}{words.format(found[0])}).save_pretrained(DIR)"
            return f"{folder} holds only {found[0]}, {kind}; {how}"
    return None


def _indexed(index: Path) -> Tensors:
    try:
        where = mapping(regular.content(index), index).get("weight_map")
    except OSError as error:
        raise ConfigError(f"{index}: {error.strerror}") from None
    if not isinstance(where, dict) or not where:
        raise ConfigError(f"{index}: weight_map must be a mapping of tensors to files")
    for file in where.values():
        # A name with a separator would be another folder's.
        if not isinstance(file, str) or not _FILE.fullmatch(file) or not file.isprintable():
            raise ConfigError(
                f"{index}: {shown(file)} is no name of a safetensors file in its folder"
            )
    tensors = Tensors(index.parent / file for file in sorted(set(where.values())))
    for name, file in where.items():
        if name not in tensors:
            raise ConfigError(f"{index}: {shown(name)} is not in {shown(file)}, as it says")
    return tensors


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
def making(to: Path) -> Iterator[Path]:
    """A folder to write in, whose content is at `to` when all is written.

    It lies in a new folder of its own beside `to`, or inside of it where `to` is an empty folder
    already. That one is all that is ever removed, and only what is made here is in it.

    Raises:
        ConfigError: `to` is there already, or cannot be written.
    """
    folder = Path(os.path.abspath(to))  # of `.` and `..` too
    holder, parents, done = None, [], False
    try:
        inside = folder.is_dir()
        if os.path.lexists(folder) and not (inside and not any(folder.iterdir())):
            raise ConfigError(f"{folder} is there already; name another folder")
        parents = [parent for parent in folder.parents if not parent.exists()]
        above = folder.parents[len(parents)]
        if not above.is_dir():
            raise ConfigError(f"{above} is no folder; {folder} cannot be in it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = folder if inside else folder.parent
        holder = Path(tempfile.mkdtemp(prefix=".headrace-", suffix=".partial", dir=place))
        part = holder / "whole"  # with the permissions of any folder; its holder has fewer
        part.mkdir()
        yield part
        if inside:
            # A description says what a folder is: it comes when all else is there.
            for path in sorted(part.iterdir(), key=lambda path: path.stem == "config"):
                path.rename(folder / path.name)
        else:
            part.rename(folder)
        done = True
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror or error}") from None
    except SafetensorError as error:  # a full disk
        raise ConfigError(f"{folder}: cannot be written ({error})") from None
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)
        if not done:
            for parent in parents:
                with suppress(OSError):  # something else is in it by now
                    parent.rmdir()

"""A trained model in one line: `from train import load; model = load(FOLDER)`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.tokens.spelling import spell
from data.tokens.tokenizer import Tokenizer
from train.config import Config
from train.evaluation.generate import Decoder, encode, sample, write
from train.evaluation.sampling import Sampling
from train.model.transformer import Model, place, skeleton
from train.pretrained import folder as folders
from train.pretrained.folder import Stored
from train.pretrained.weights import Say


def load(
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    step: int | None = None,
    device: torch.device | str | None = None,
    say: Say = lambda line: None,
) -> Trained:
    """The model of a run, an import, a conversion or an export, ready to be asked.

    Args:
        folder: where it lies; a run's YAML file and the folder of one checkpoint will do too.
        overrides: settings that replace those of the folder, as `key=value`.
        step: of a run's checkpoint; None takes the newest that verifies.
        device: None takes the GPU if there is one.
        say: told, a line each, which checkpoints are passed over and what takes long.

    Returns:
        The model in evaluation mode, in the dtype that `train.dtype` says: fp32, or with `auto`
        bf16 on a GPU.

    Raises:
        ConfigError: there is no model, or one that is broken or not what its settings say; one
            line. Of the tokenizer, when it is first used.
    """
    stored = folders.find(Path(folder), overrides, step, say)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = stored.config.train.dtype
    low = dtype == "bf16" or (dtype == "auto" and chosen.type == "cuda")
    kind = torch.bfloat16 if low else torch.float32
    model = skeleton(stored.config.model, stored.vocab_size)

    def make(name: str, old: Tensor) -> Tensor:
        dtype = kind if isinstance(old, nn.Parameter) else old.dtype
        made = torch.empty(old.shape, dtype=dtype, device=chosen)
        return made.copy_(stored.read(name))  # which may be the file itself

    place(model, make)
    return Trained(stored, model.requires_grad_(False).eval())


class Trained:
    """A trained model on one device. Nothing here keeps a gradient.

    stored: where it is from. model: the module, in evaluation mode.
    """

    def __init__(self, stored: Stored, model: Model) -> None:
        self.stored, self.model = stored, model

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return f"<{self.stored.source}: {size:,} parameters on {self.device}>"

    @property
    def config(self) -> Config:
        """All settings by their keys, `config.model` among them; the defaults where the folder
        has none."""
        return self.stored.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: `encode(text)` and `decode(ids)`, `bos_id`, `end_ids`, `vocab_size`.

        Raises:
            ConfigError: it is missing, broken or of another model.
        """
        return self.stored.tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def logits(self, ids: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """The logits that follow each token of a sequence.

        Args:
            ids: (T,) integers from 0 to vocabulary − 1, as one sequence; training's begin with
                `tokenizer.bos_id`, and nothing is put before them here.

        Returns:
            (T, vocabulary) fp32 on the model's device. The vocabulary is the model's: it may have
            more rows than the tokenizer has pieces. What is held beside them does not grow with T
            in linear layers, and holds keys and values in the others.

        Raises:
            ValueError: `ids` is not of that shape or range.
        """
        sequence = self._checked(ids)
        out = torch.empty(len(sequence), self.stored.vocab_size, device=self.device)
        begin = 0
        for part in Decoder(self.model).logits(sequence):
            out[begin : begin + len(part)] = part
            begin += len(part)
        return out

    def losses(self, ids: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """−log p of every token but the first, given those before it.

        Returns:
            (T − 1,) fp32 nats, on the model's device. Logits are made a chunk at a time.

        Raises:
            ValueError: as `logits`.
        """
        sequence = self._checked(ids)
        return torch.cat(
            [torch.empty(0, device=self.device), *Decoder(self.model).losses(sequence)]
        )

    def nats(self, text: str) -> float:
        """−log p of a text: the sum over its pieces, as one sequence behind `bos_id`.

        The end of the text is not part of it. Text of any length is read as one sequence.

        Raises:
            ConfigError: `text` is not text that UTF-8 can hold, or as `tokenizer`.
        """
        return float(self.losses(self.encode(text)).double().sum())

    def bits_per_byte(self, text: str) -> float:
        """`nats` in bits, for each byte of `text` in UTF-8; compares across tokenizers.

        Raises:
            ValueError: `text` is empty.
            ConfigError: as `nats`.
        """
        if not text:
            raise ValueError("text is empty; bits per byte need a byte")
        return self.nats(text) / math.log(2) / len(text.encode())

    def generate(
        self, text: str = "", tokens: int = 200, temperature: float = 0.8, seed: int = 0
    ) -> Iterator[str]:
        """What comes after `text`, piece by piece while it is made.

        Args:
            text: to go on from; it is not given again. "" begins a text.
            tokens: most to make; the text ends before at one of `tokenizer.end_ids`.
            temperature: 0 takes the likeliest token.
            seed: from 0 to 2^64 − 1; the same gives the same text.

        Returns:
            Pieces of text, never empty, none with half a character. Joined they are the text of
            the tokens that were made.

        Raises:
            ConfigError: an argument is out of its range, at once; or as `nats`.
        """
        sampling = Sampling(tokens, temperature, seed)
        return write(Decoder(self.model), self.tokenizer, self.encode(text), sampling)

    def encode(self, text: str) -> list[int]:
        """`bos_id` and the pieces of `text`, as every document of training begins.

        Raises:
            ConfigError: as `nats`.
        """
        return encode(self.tokenizer, text)

    def _checked(self, ids: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        found = torch.as_tensor(ids)
        if found.numel() == 0 and found.dim() == 1:
            return found.to(self.device, torch.int64)
        if found.dim() != 1 or found.is_floating_point() or found.is_complex():
            raise ValueError(
                f"ids must be (T,) integers; they are {tuple(found.shape)} {found.dtype}"
            )
        rows = self.stored.vocab_size
        wrong = (found < 0) | (found >= rows)
        if wrong.any():
            raise ValueError(f"ids must be from 0 to {rows - 1}; got {int(found[wrong][0])}")
        return found.to(self.device, torch.int64)


def show(trained: Trained, prompt: str, sampling: Sampling) -> None:
    """Print `prompt` and, while it is made, what comes after it; on stderr, how fast it went."""
    decoder, ids = Decoder(trained.model), trained.encode(prompt)
    print(trained.tokenizer.decode(ids[1:]), end="", flush=True)
    made: list[int] = []

    def counted() -> Iterator[int]:
        for token in sample(decoder, trained.tokenizer, ids, sampling):
            made.append(token)
            yield token

    began = time.monotonic()
    for piece in spell(trained.tokenizer, ids, counted()):
        print(piece, end="", flush=True)
    seconds = time.monotonic() - began
    print(flush=True)
    print(
        f"\n{trained.stored.source}: {len(ids)} tokens in, {len(made)} out in {seconds:.1f} s; "
        f"the caches hold {decoder.memory / 1e6:.2f} MB after {decoder.seen} tokens",
        file=sys.stderr,
    )

"""Documents that a model is measured on: those a corpus holds out, or a text coded in memory."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path
from typing import Protocol

import numpy as np

from data.config import DataConfig
from data.settings import ConfigError
from data.sources import resolve
from data.storing.corpus import first_tokens
from data.tokens.tokenizer import Tokenizer


class HeldOutDocuments(Protocol):
    """Documents as [bos] + pieces + [eos]: a `Corpus`, or a `CodedText`."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def validation_spans(self, max_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the documents, the last one cut at `max_tokens`."""

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(lengths.sum(),) int64: the tokens of spans, each inside one document, end to end."""


class CodedText:
    """The documents of some files, coded in memory and all held out.

    name: of the source, as in a corpus.

    Args:
        path: a file, folder or glob, of any kind that `data.sources` reads.
        config: of which text_field and normalize count.
        max_tokens: reading ends with the document that reaches so many.

    Raises:
        ConfigError: no such file, or no text in it.
    """

    def __init__(
        self, path: str | Path, config: DataConfig, tokenizer: Tokenizer, max_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        coded: list[np.ndarray] = []
        problems: Counter[str] = Counter()
        left = max_tokens
        (source,) = resolve({"path": str(path)}, config.text_field)
        self.name = source.name
        for document in source.documents():
            if document.text is None:
                problems[document.problem] += 1
                continue
            text = document.text
            if config.normalize:
                text = unicodedata.normalize("NFC", text)
            ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
            coded.append(np.array(ids, dtype=np.int64))
            left -= len(ids)
            if left <= 0:
                break
        if not coded:
            why = ", ".join(f"{number} {kind}" for kind, number in problems.items())
            raise ConfigError(f"{path} holds no text" + (f" ({why})" if why else ""))
        self._tokens = np.concatenate(coded)
        self._lengths = np.array([len(ids) for ids in coded], dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths

    def validation_spans(self, max_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        return first_tokens(self._starts, self._lengths, max_tokens)

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        return np.concatenate([self._tokens[start:end] for start, end in spans])

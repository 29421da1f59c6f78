"""A prepared corpus: memory-mapped tokens, document offsets, and the index by length.

A corpus is a folder:

    manifest.json       counts, digests, the recipe; its presence says that all is whole
    tokenizer.model     the tokenizer that made the tokens
    tokens-00000.bin …  uint16 or uint32; a document is [bos] + pieces + [eos], in one shard
    offsets.bin         int64 (documents + 1,): where each document starts, over all shards
    by_length.bin       int64: the training documents, shortest first
    validation.bin      int64: the documents held out, in their fixed order
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.settings import ConfigError
from data.tokenizer import Tokenizer

MANIFEST = "manifest.json"


class Corpus:
    """The tokens of a prepared corpus; opening reads the manifest and maps the rest.

    Args:
        path: the corpus's folder.

    Raises:
        ConfigError: if it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
            self.fingerprint: str = self.manifest["fingerprint"]
            self.token_count: int = self.manifest["tokens"]
            self.document_count: int = self.manifest["documents"]
            shards = self.manifest["shards"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path} is no prepared corpus ({error})") from None
        dtype = np.dtype(self.manifest["dtype"])
        self._shards = [self._map(shard["file"], dtype, shard["tokens"]) for shard in shards]
        self._shard_starts = np.cumsum([0] + [shard["tokens"] for shard in shards])
        self.offsets = self._map("offsets.bin", np.dtype(np.int64), self.document_count + 1)
        held_out = self.manifest["validation_documents"]
        self.by_length = self._map(
            "by_length.bin", np.dtype(np.int64), self.document_count - held_out
        )
        self.validation = self._map("validation.bin", np.dtype(np.int64), held_out)
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer((self.path / "tokenizer.model").read_bytes())
        return self._tokenizer

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(lengths.sum(),) int64: the tokens of spans, each inside one shard, end to end."""
        shard = np.searchsorted(self._shard_starts, starts, side="right") - 1
        local = starts - self._shard_starts[shard]
        spans = zip(shard.tolist(), local.tolist(), (local + lengths).tolist(), strict=True)
        out = np.empty(int(lengths.sum()), dtype=np.int64)
        np.concatenate([self._shards[s][a:b] for s, a, b in spans], out=out)
        return out

    def document(self, index: int) -> str:
        """The text of one document."""
        start, end = self.offsets[index : index + 2]
        return self.tokenizer.decode(self.gather(start[None], (end - start)[None]).tolist())

    def validation_text(self, max_tokens: int | None = None) -> str:
        """The text of the validation documents, end to end, up to `max_tokens` of their tokens."""
        starts, lengths = self.validation_spans(max_tokens)
        return self.tokenizer.decode(self.gather(starts, lengths).tolist()) if len(starts) else ""

    def validation_spans(self, max_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the validation documents, the last one cut at `max_tokens`."""
        starts = self.offsets[self.validation]
        lengths = self.offsets[self.validation + 1] - starts
        if max_tokens is not None:
            before = np.cumsum(lengths) - lengths
            lengths = np.minimum(lengths, max_tokens - before)
            starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        return starts, lengths

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = self.path / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
        if size != count * dtype.itemsize:
            raise ConfigError(
                f"{path} has {size} bytes, its manifest says {count * dtype.itemsize}; "
                f"delete {self.path} and prepare it again"
            )
        if count == 0:
            return np.empty(0, dtype=dtype)
        # A plain array over the map: slicing np.memmap itself costs microseconds.
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)

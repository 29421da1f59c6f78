"""A prepared corpus: memory-mapped tokens, document offsets, and the index by length.

A corpus is a folder:

    manifest.json       counts, digests, the recipe; its presence says that all is whole
    tokenizer.model     the tokenizer that made the tokens (or tokenizer.json), and the files
                        that belong to it (data/tokens/beside.py)
    tokens-00000.bin …  uint16 or uint32; a document is [bos] + pieces + [eos], in one shard
    offsets.bin         int64 (documents + 1,): where each document starts, over all shards
    by_length.bin       int64: each source's training documents, shortest first
    validation.bin      int64: the documents held out, in their fixed order

Documents are stored source by source, so which source a document is from needs no list.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import regular
from data.settings import ConfigError
from data.storing.store import digest, digest_of, length_key
from data.tokens.tokenizer import Tokenizer, load

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class StoredSource:
    """One source of a corpus: its training documents are by_length[first:last]."""

    name: str
    first: int
    last: int
    tokens: int


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
            self.manifest: dict[str, Any] = json.loads(regular.content(path / MANIFEST))
            # Manifests of before had no digest of their own.
            if self.manifest.get("digest") not in (None, manifest_digest(self.manifest)):
                raise ValueError(f"{MANIFEST} is not what was written")
            self.fingerprint: str = self.manifest["fingerprint"]
            self.token_count: int = self.manifest["tokens"]
            self.document_count: int = self.manifest["documents"]
            shards = self.manifest["shards"]
            held_out = self.manifest["validation_documents"]
            stored = self.manifest["sources"]
            dtype = np.dtype(self.manifest["dtype"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} is no prepared corpus ({error}); delete it") from None
        self._shards = [self._map(shard["file"], dtype, shard["tokens"]) for shard in shards]
        self._shard_starts = np.cumsum([0] + [shard["tokens"] for shard in shards])
        self.offsets = self._map("offsets.bin", np.dtype(np.int64), self.document_count + 1)
        self.by_length = self._map(
            "by_length.bin", np.dtype(np.int64), self.document_count - held_out
        )
        self.validation = self._map("validation.bin", np.dtype(np.int64), held_out)
        lasts = np.cumsum([source["training_documents"] for source in stored]).tolist()
        self.sources = [
            StoredSource(
                source["name"],
                last - source["training_documents"],
                last,
                source["training_tokens"],
            )
            for source, last in zip(stored, lasts, strict=True)
        ]
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load(self.path / self.manifest["tokenizer"])
        return self._tokenizer

    def verify(self) -> None:
        """Read every file and compare its digest with the manifest's.

        Raises:
            ConfigError: naming the first file that differs.
        """
        for name, expected in self.manifest["digests"].items():
            try:
                found = digest(self.path / name)
            except OSError as error:
                raise ConfigError(f"{self.path / name}: {error.strerror}") from None
            if found != expected:
                raise ConfigError(
                    f"{self.path / name} is not what was written (digest {found}, the manifest "
                    f"says {expected}); delete {self.path} and prepare it again"
                )

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(lengths.sum(),) int64: the tokens of spans, each inside one shard, end to end."""
        shard = np.searchsorted(self._shard_starts, starts, side="right") - 1
        local = starts - self._shard_starts[shard]
        spans = zip(shard.tolist(), local.tolist(), (local + lengths).tolist(), strict=True)
        out = np.empty(int(lengths.sum()), dtype=np.int64)
        np.concatenate([self._shards[s][a:b] for s, a, b in spans], out=out)
        return out

    def document(self, number: int) -> str:
        """The text of one document, by its place in storage."""
        start, end = self.offsets[number : number + 2]
        return self.tokenizer.decode(self.gather(start[None], (end - start)[None]).tolist())

    def lengths(self, first: int, last: int) -> np.ndarray:
        """int64 (last − first,): tokens of the training documents by_length[first:last]."""
        ids = self.by_length[first:last]
        return self.offsets[ids + 1] - self.offsets[ids]

    def tokens_by_length(self, first: int, last: int) -> int:
        """Tokens of by_length[first:last]."""
        for source in self.sources:
            if (source.first, source.last) == (first, last):
                return source.tokens
        return sum(
            int(self.lengths(at, min(at + _CHUNK, last)).sum()) for at in range(first, last, _CHUNK)
        )

    def first_of_length(self, first: int, last: int, tokens: int) -> int:
        """The first place in by_length[first:last] of a document of `tokens` tokens or more.

        Lengths over 65,536 are sorted to a 64th of an octave, and so is this border.
        """
        border = int(length_key(np.array([tokens]))[0])
        return (
            bisect_right(
                range(first, last),
                border - 1,
                key=lambda place: int(length_key(self.lengths(place, place + 1))[0]),
            )
            + first
        )

    def validation_text(self, max_tokens: int | None = None) -> str:
        """The text of the validation documents, end to end, up to `max_tokens` of their tokens."""
        starts, lengths = self.validation_spans(max_tokens)
        return self.tokenizer.decode(self.gather(starts, lengths).tolist()) if len(starts) else ""

    def validation_spans(self, max_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of the validation documents, the last one cut at `max_tokens`."""
        starts = self.offsets[self.validation]
        return first_tokens(starts, self.offsets[self.validation + 1] - starts, max_tokens)

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = self.path / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror}; delete {self.path} and prepare it again"
            ) from None
        if size != count * dtype.itemsize:
            raise ConfigError(
                f"{path} has {size} bytes, its manifest says {count * dtype.itemsize}; "
                f"delete {self.path} and prepare it again"
            )
        if count == 0:
            return np.empty(0, dtype=dtype)
        # A plain array over the map: slicing np.memmap itself costs microseconds.
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def first_tokens(
    starts: np.ndarray, lengths: np.ndarray, max_tokens: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the first `max_tokens` tokens of some spans (None: of all)."""
    if max_tokens is not None:
        before = np.cumsum(lengths) - lengths
        lengths = np.minimum(lengths, max_tokens - before)
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    return starts, lengths


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Hexadecimal digest of what a manifest says, without its own digest."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return digest_of(json.dumps(content).encode())

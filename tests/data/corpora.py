"""Corpora for tests, written without a tokenizer: token number i of the storage is i."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.prepare import publish
from data.storing.corpus import Corpus
from data.storing.store import Piece, Writer
from data.tokens.tokenizer import SentencePiece, train

_TEXT = [f"The {n} quick brown foxes jump over {n * n} lazy dogs.\n" for n in range(300)]


def small_tokenizer() -> SentencePiece:
    """A tokenizer of some 500 pieces."""
    return train(_TEXT, 512)


def numbered(
    folder: Path,
    sources: dict[str, list[int]],
    validation: float = 0.0,
    tokenizer: SentencePiece | None = None,
) -> Corpus:
    """A corpus of documents with the given lengths, by source, whose tokens tell their place."""
    made = tokenizer or small_tokenizer()
    part = folder / "numbered.partial"
    part.mkdir(parents=True)
    writer = Writer(part, len(sources), np.dtype(np.uint32))
    place = 0
    for i, lengths in enumerate(sources.values()):
        total = sum(lengths)
        writer.append(
            Piece(
                source=i,
                read=len(lengths),
                tokens=np.arange(place, place + total, dtype=np.uint32),
                lengths=np.array(lengths, dtype=np.int64),
                hashes=np.random.default_rng(i).integers(0, 2**64, len(lengths), dtype=np.uint64),
                text_bytes=total,
                problems=[],
            )
        )
        place += total
    writer.commit()
    writer.close()
    (part / made.file).write_bytes(made.model)
    path = folder / "numbered"
    publish(part, path, made, np.dtype(np.uint32), writer.journal, list(sources), validation)
    return Corpus(path)

"""Tokens a second, of preparing and of serving, beside a plain `datasets` pipeline.

All run on the same text in the same process, one after the other:

- the tokenizer's library alone: its own encode of all documents at once, in its own
  threads, as many as there are workers. Nothing can prepare faster.
- headrace: the workers of `prepare` (which also hash and carry the text over), and the
  stream of `Batches`.
- datasets: the usual recipe, `map` to tokenise and `map` again to concatenate and cut into
  rows of seq_len, then rows read as numpy.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, StreamConfig
from data.sources import Source, resolve
from data.storing.corpus import Corpus
from data.storing.encode import pieces
from data.stream import Batches
from data.tokens.tokenizer import parse

_TEXT = 16 << 20  # characters that are prepared
_SERVED = 1 << 25  # tokens that are served, unless time is up
_SECONDS = 5.0


def bench(corpus: Corpus, stream: StreamConfig, data: DataConfig) -> list[tuple[str, str, float]]:
    """Rows of (what, by whom, tokens a second)."""
    workers = data.workers or len(os.sched_getaffinity(0))
    texts = _texts(resolve(data.source, data.text_field))
    alone = _alone(corpus, texts, workers)
    with tempfile.TemporaryDirectory() as folder:
        whole, steady = _prepared(corpus, texts, workers, Path(folder))
        peer_prepared, peer_served = _peer(corpus, stream, texts, workers, folder)
    return [
        ("preparing", f"the tokenizer's library alone, {workers} threads", alone),
        ("preparing", f"headrace, {workers} processes, once they run", steady),
        ("preparing", f"headrace, {workers} processes, with their start", whole),
        ("preparing", f"datasets map and group, {workers} processes", peer_prepared),
        ("serving", f"headrace, {data.packing}", _served(corpus, stream, data)),
        ("serving", "datasets, rows of seq_len", peer_served),
    ]


def _texts(sources: list[Source]) -> list[str]:
    texts: list[str] = []
    size = 0
    for source in sources:
        for document in source.documents():
            if document.text:
                texts.append(document.text)
                size += len(document.text)
            if size > _TEXT:
                return texts
    return texts


def _alone(corpus: Corpus, texts: list[str], threads: int) -> float:
    """The library's own encode of all documents at once, in its own threads."""
    if corpus.tokenizer.file == "tokenizer.json":
        import tokenizers

        os.environ["RAYON_NUM_THREADS"] = str(threads)
        of_library = tokenizers.Tokenizer.from_str(corpus.tokenizer.model.decode())
        started = time.perf_counter()
        tokens = sum(len(coded) for coded in of_library.encode_batch(texts))
    else:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_proto=corpus.tokenizer.model)
        started = time.perf_counter()
        tokens = sum(len(coded) for coded in model.encode(texts, num_threads=threads))
    return tokens / (time.perf_counter() - started)


def _prepared(corpus: Corpus, texts: list[str], workers: int, folder: Path) -> tuple[float, float]:
    """Tokens a second from the start on, and from the first piece on."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Source("bench", ((path.name, path),), "text")
    tokenizer = corpus.path / corpus.tokenizer.file
    started = time.perf_counter()
    made = pieces([source], [0], tokenizer, False, np.dtype(np.uint16), workers)
    first = len(next(made).tokens)
    began = time.perf_counter()
    rest = sum(len(piece.tokens) for piece in made)
    ended = time.perf_counter()
    return (first + rest) / (ended - started), rest / (ended - began)


def _served(corpus: Corpus, stream: StreamConfig, data: DataConfig) -> float:
    batches = Batches(corpus, stream, data)
    started = time.perf_counter()
    served, seconds = 0, 0.0
    while served < _SERVED and seconds < _SECONDS:
        served += len(next(batches).tokens)
        seconds = time.perf_counter() - started
    batches.close()
    return served / seconds


def _peer(
    corpus: Corpus, stream: StreamConfig, texts: list[str], workers: int, folder: str
) -> tuple[float, float]:
    """The same with `datasets`: tokens a second prepared, and served as numpy rows."""
    import datasets

    datasets.disable_progress_bars()
    model = corpus.tokenizer.model
    seq_len = stream.seq_len
    rows = datasets.Dataset.from_dict({"text": texts})
    started = time.perf_counter()
    coded = rows.map(
        _PeerTokenize(model, corpus.tokenizer.file),
        batched=True,
        batch_size=64,
        num_proc=workers,
        remove_columns=["text"],
        cache_file_name=f"{folder}/coded.arrow",
    )
    grouped = coded.map(
        _PeerGroup(seq_len), batched=True, num_proc=workers, cache_file_name=f"{folder}/rows.arrow"
    )
    prepared = len(grouped) * seq_len / (time.perf_counter() - started)
    size = max(1, stream.batch_tokens // seq_len)
    started = time.perf_counter()
    served = 0
    for batch in grouped.with_format("numpy").shuffle(seed=stream.seed).iter(batch_size=size):
        served += batch["input_ids"].size
    return prepared, served / (time.perf_counter() - started)


class _PeerTokenize:
    """One column of texts to one of tokens, with the same tokenizer."""

    def __init__(self, model: bytes, file: str) -> None:
        self.model = model
        self.file = file

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        tokenizer = parse(self.model, self.file)
        return {
            "input_ids": [
                [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                for text in batch["text"]
            ]
        }


class _PeerGroup:
    """Tokens end to end, cut into rows of seq_len; what is left over is dropped."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        tokens = list(chain.from_iterable(batch["input_ids"]))
        whole = len(tokens) // self.seq_len * self.seq_len
        return {"input_ids": [tokens[i : i + self.seq_len] for i in range(0, whole, self.seq_len)]}

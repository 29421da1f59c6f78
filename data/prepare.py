"""From sources to a prepared corpus: tokenizer, tokens, offsets, indices, manifest."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np

from data import tokenizer as tokenizers
from data.config import DataConfig
from data.corpus import MANIFEST, Corpus
from data.settings import ConfigError
from data.sources import documents, files

FORMAT = 1
_SAMPLE_BYTES = 4 << 20  # text the tokenizer is trained on
_TASK_CHARACTERS = 1 << 19  # text a worker is given at once

Log = Callable[[str], None]


def prepare(config: DataConfig, log: Log = lambda line: None) -> Corpus:
    """Open the corpus that `config` describes, preparing first what is missing.

    Any number of processes may call it at once: one works, the others wait.

    Args:
        config: the sources and the tokenizer.
        log: takes lines of progress.

    Raises:
        ConfigError: if a source cannot be read or holds no text.
    """
    name, named = files(config)
    path = Path(config.root) / f"{name}-{_recipe(config, named)}"
    if (path / MANIFEST).exists():
        return Corpus(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (path / MANIFEST).exists():
            _build(config, named, path, log)
    return Corpus(path)


def _recipe(config: DataConfig, named: list[tuple[str, Path]]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    digest.update(json.dumps([FORMAT, config.vocab_size, config.validation]).encode())
    for name, path in named:
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


def _build(config: DataConfig, named: list[tuple[str, Path]], path: Path, log: Log) -> None:
    part = path.with_name(path.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    log(f"training a tokenizer of {config.vocab_size} pieces")
    tokenizer = tokenizers.train(_sample(named), config.vocab_size)
    (part / "tokenizer.model").write_bytes(tokenizer.model)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    workers = config.workers or os.cpu_count() or 1
    log(f"tokenising {len(named)} documents in {workers} processes")
    lengths: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    digest = hashlib.blake2b(tokenizer.model, digest_size=16)
    with open(part / "tokens-00000.bin", "wb") as out:
        for tokens, counts, hashes in _encoded(named, tokenizer.model, dtype, workers):
            out.write(tokens.data)
            digest.update(tokens.data)
            digest.update(counts.data)
            lengths.append(counts)
            keys.append(hashes)
    if not lengths:
        raise ConfigError(f"data.source is {config.source}; it holds no text")
    counts = np.concatenate(lengths)
    hashes = np.concatenate(keys)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    held = hashes < np.uint64(int(config.validation * 2**64))
    validation = np.flatnonzero(held)
    offsets.tofile(part / "offsets.bin")
    training = np.flatnonzero(~held)
    training[np.argsort(counts[training], kind="stable")].astype(np.int64).tofile(
        part / "by_length.bin"
    )
    validation[np.argsort(hashes[validation], kind="stable")].astype(np.int64).tofile(
        part / "validation.bin"
    )
    manifest = {
        "format": FORMAT,
        "fingerprint": digest.hexdigest(),
        "tokens": int(offsets[-1]),
        "documents": len(counts),
        "validation_documents": len(validation),
        "dtype": dtype.name,
        "shards": [{"file": "tokens-00000.bin", "tokens": int(offsets[-1])}],
    }
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
    part.rename(path)
    log(f"{manifest['tokens']:,} tokens of {len(counts):,} documents in {path}")


def _sample(named: list[tuple[str, Path]]) -> Iterator[str]:
    """About _SAMPLE_BYTES of text, in slices from all over the corpus."""
    total = sum(path.stat().st_size for _, path in named)
    share = min(1.0, _SAMPLE_BYTES / max(total, 1))
    for document in documents(named):
        if document.text is None:
            continue
        size = 4096
        pieces = [document.text[i : i + size] for i in range(0, len(document.text), size)]
        for i, piece in enumerate(pieces):
            key = hashlib.blake2b(f"{document.name}\0{i}".encode(), digest_size=8).digest()
            if int.from_bytes(key, "little") < share * 2**64:
                yield piece


def _tasks(named: list[tuple[str, Path]]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents(named):
        if document.text is None:
            continue
        texts.append(document.text)
        size += len(document.text)
        if size >= _TASK_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


_Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]


def _encoded(
    named: list[tuple[str, Path]], model: bytes, dtype: np.dtype, workers: int
) -> Iterator[_Encoded]:
    """Tokens, lengths and content hashes of the documents, in order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (model,)) as pool:
        pending: deque[Future[_Encoded]] = deque()
        for texts in _tasks(named):
            pending.append(pool.submit(_encode, texts, dtype))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker_tokenizer: tokenizers.Tokenizer | None = None


def _start_worker(model: bytes) -> None:
    global _worker_tokenizer  # noqa: PLW0603  a worker process has one tokenizer
    _worker_tokenizer = tokenizers.Tokenizer(model)


def _encode(texts: list[str], dtype: np.dtype) -> _Encoded:
    assert _worker_tokenizer is not None
    tokenizer = _worker_tokenizer
    coded = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    hashes = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return (
        np.concatenate([np.array(tokens, dtype=dtype) for tokens in coded]),
        np.array([len(tokens) for tokens in coded], dtype=np.int64),
        np.frombuffer(b"".join(hashes), dtype=np.uint64),
    )

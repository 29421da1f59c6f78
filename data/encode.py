"""Coding documents in several processes, in order and with bounded memory."""

from __future__ import annotations

import hashlib
import multiprocessing
import unicodedata
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np

from data.sources import Document, Source
from data.store import Piece
from data.tokenizer import Tokenizer, load

_TASK_CHARACTERS = 1 << 19  # text a worker is given at once
_TASK_DOCUMENTS = 4096
_WAITING = 3  # tasks a worker that are under way or done and not yet taken


def pieces(
    sources: list[Source],
    first: list[int],
    tokenizer: Path,
    normalize: bool,
    dtype: np.dtype,
    workers: int,
) -> Iterator[Piece]:
    """All documents, coded, source by source in their order.

    Args:
        first: the document of each source to begin with.
        tokenizer: its file, which every worker loads.
    """
    # Spawned, not forked: the caller may have threads, and a fork with threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (tokenizer, normalize)) as pool:
        waiting: deque[Future[Piece]] = deque()
        try:
            for number, source in enumerate(sources):
                for task in _tasks(source, first[number]):
                    waiting.append(pool.submit(_encode, number, task, dtype))
                    if len(waiting) >= _WAITING * workers:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _tasks(source: Source, first: int) -> Iterator[list[Document]]:
    task: list[Document] = []
    size = 0
    for document in source.documents(first):
        task.append(document)
        size += len(document.text or "")
        if size >= _TASK_CHARACTERS or len(task) >= _TASK_DOCUMENTS:
            yield task
            task, size = [], 0
    if task:
        yield task


_tokenizer: Tokenizer | None = None
_normalize = False


def _start(tokenizer: Path, normalize: bool) -> None:
    global _tokenizer, _normalize  # one tokenizer a worker process
    _tokenizer, _normalize = load(tokenizer), normalize


def _encode(source: int, task: list[Document], dtype: np.dtype) -> Piece:
    assert _tokenizer is not None
    texts = [document.text for document in task if document.text is not None]
    if _normalize:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    coded = [
        np.array([_tokenizer.bos_id, *_tokenizer.encode(text), _tokenizer.eos_id], dtype=dtype)
        for text in texts
    ]
    spelled = [text.encode() for text in texts]
    hashes = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in spelled)
    return Piece(
        source,
        read=len(task),
        tokens=np.concatenate([np.empty(0, dtype=dtype), *coded]),
        lengths=np.array([len(tokens) for tokens in coded], dtype=np.int64),
        hashes=np.frombuffer(hashes, dtype=np.uint64),
        text_bytes=sum(map(len, spelled)),
        problems=[(document.name, document.problem) for document in task if document.text is None],
    )

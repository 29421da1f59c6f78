"""Coding documents in several processes, in order and with bounded memory."""

from __future__ import annotations

import hashlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import unicodedata
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.settings import ConfigError
from data.sources import Document, Source
from data.storing.store import Piece
from data.tokens.tokenizer import Tokenizer, load

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
    started = [_Worker(tokenizer, normalize, dtype) for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in started:
        idle.put(worker)

    def run(number: int, task: list[Document]) -> Piece:
        worker = idle.get()
        try:
            return worker.encode(number, task)
        finally:
            idle.put(worker)

    waiting: deque[Future[Piece]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for number, source in enumerate(sources):
            for task in _tasks(source, first[number]):
                waiting.append(pool.submit(run, number, task))
                if len(waiting) >= _WAITING * workers:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        for worker in started:
            worker.close()


class _Worker:
    """A process that codes what it is given.

    Not `multiprocessing`: that would run the caller's main script again in every worker,
    and a fork of a process with threads can hang.
    """

    def __init__(self, tokenizer: Path, normalize: bool, dtype: np.dtype) -> None:
        root = str(Path(__file__).resolve().parents[2])
        known = os.environ.get("PYTHONPATH")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from data.storing.encode import serve; serve()",
                str(tokenizer.resolve()),
                str(int(normalize)),
                dtype.name,
            ],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([root, known] if known else [root])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def encode(self, source: int, task: list[Document]) -> Piece:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((source, task), self._process.stdin)
            self._process.stdin.flush()
            made = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise ConfigError(
                f"a tokenising process ended unasked (exit status {self._process.wait()}); if it "
                "was killed for memory, lower data.workers; start again, it goes on from here"
            ) from None
        if isinstance(made, Exception):
            raise made
        return made

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def serve() -> None:
    """The life of a worker: tasks from standard input, pieces to standard output."""
    # Ctrl-C reaches the whole group; workers end when their input does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    path, normalize, dtype = Path(sys.argv[1]), sys.argv[2] == "1", np.dtype(sys.argv[3])
    tokenizer = None
    with suppress(EOFError, BrokenPipeError):
        while True:
            source, task = pickle.load(sys.stdin.buffer)
            made: Piece | ConfigError
            try:
                tokenizer = tokenizer or load(path)
                made = _encode(tokenizer, normalize, source, task, dtype)
            except ConfigError as error:
                made = error
            except MemoryError:
                made = ConfigError(
                    f"{task[0].name}: a tokenising process has no memory left; lower data.workers"
                )
            pickle.dump(made, sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()


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


def _encode(
    tokenizer: Tokenizer, normalize: bool, source: int, task: list[Document], dtype: np.dtype
) -> Piece:
    texts = [document.text for document in task if document.text is not None]
    if normalize:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    coded = [
        np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], dtype=dtype)
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

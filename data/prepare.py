"""From sources to a prepared corpus: tokenizer, tokens, indices, manifest.

    <root>/<name>-<recipe>/           a finished corpus, never touched again
    <root>/<name>-<recipe>.partial/   one in the making; whoever comes next goes on with it
    <root>/<name>-<recipe>.lock       held by the process that works, the others wait for it

The recipe is a digest of everything that the tokens depend on, the files' content among it:
a corpus with changed text or another tokenizer is another folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data import regular
from data.config import DataConfig
from data.settings import ConfigError
from data.sources import NO_TEXT, Source, resolve
from data.storing.corpus import MANIFEST, Corpus, manifest_digest
from data.storing.encode import pieces
from data.storing.store import (
    JOURNAL,
    Journal,
    Writer,
    count_problem,
    digest,
    digest_of,
    index,
    shard_name,
)
from data.tokens import beside
from data.tokens import tokenizer as tokenizers
from data.tokens.sample import sample

FORMAT = 4
_MOST_OF_NAME = 100  # bytes of a source's name in that of the corpus
_VERIFY_BYTES = 1 << 30  # a corpus up to this size is verified whenever it is opened
_REPORT_SECONDS = 10.0
_LOOKED_AT = 10_000  # documents of a source in which there must be one with text
_WORKERS_A_CPU = 8  # at most: each of them starts a Python and loads the tokenizer

Log = Callable[[str], None]


def prepare(config: DataConfig, log: Log = lambda line: None) -> Corpus:
    """Open the corpus that `config` describes, preparing first what is missing.

    Any number of processes may call it at once: one works, the others wait. Interrupted
    at any moment, the next call goes on and ends with the same bytes.

    Args:
        config: the sources and the tokenizer.
        log: takes lines of progress.

    Raises:
        ConfigError: if a source cannot be read, too much of it is broken, the disk is
            full, or a prepared corpus is damaged.
    """
    sources = resolve(config.source, config.text_field)
    config.check_names([source.name for source in sources])
    try:
        path = _place(config, sources)
        if not (path / MANIFEST).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(Path(f"{path}.lock"), log):
                if not (path / MANIFEST).exists():
                    _check_free(path)
                    _build(config, sources, path, log)
        corpus = Corpus(path)
        if corpus.manifest["bytes"] <= _VERIFY_BYTES:
            corpus.verify()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConfigError(
                f"{config.root}: {error.strerror}; make room and start again, "
                "it goes on from what is there"
            ) from None
        raise ConfigError(f"{error.filename or config.root}: {error.strerror}") from None
    return corpus


def prepared(config: DataConfig) -> Corpus | None:
    """The corpus that `config` describes, if it is prepared already; its files are not verified.

    Raises:
        ConfigError: a source cannot be read, or the corpus is damaged.
    """
    sources = resolve(config.source, config.text_field)
    config.check_names([source.name for source in sources])
    try:
        path = _place(config, sources)
        return Corpus(path) if (path / MANIFEST).exists() else None
    except OSError as error:
        raise ConfigError(f"{error.filename or config.root}: {error.strerror}") from None


def _place(config: DataConfig, sources: list[Source]) -> Path:
    """Where the corpus is, or will be."""
    name = sources[0].name.encode()[:_MOST_OF_NAME].decode(errors="ignore")
    if len(sources) > 1:
        name += f"-and-{len(sources) - 1}"
    return Path(config.root) / f"{name}-{_recipe(config, sources)}"


@contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    with open(regular.opened(path, os.O_RDWR | os.O_CREAT), "r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"another process prepares {path.stem}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recipe(config: DataConfig, sources: list[Source]) -> str:
    recipe = [FORMAT, config.validation, config.normalize, [s.recipe() for s in sources]]
    if config.tokenizer is None:
        weights = [source.weight for source in sources]
        recipe += [config.vocab_size, config.model_type, weights]
    else:
        path = Path(config.tokenizer)
        if not path.is_file():
            raise ConfigError(f"data.tokenizer is {path}; there is no such file")
        held = beside.gather(path.parent).items()
        marks = {name: hashlib.blake2b(content).hexdigest() for name, content in held}
        recipe += [digest(path), *([marks] if marks else [])]
    return hashlib.blake2b(json.dumps(recipe).encode(), digest_size=6).hexdigest()


def _check_free(path: Path) -> None:
    """Refuse to prepare for hours what could not be put in its place then."""
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(
            f"{path} has lost its {MANIFEST}, so nobody knows whether it is whole; delete that "
            "folder and start again"
        )
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is no folder; move it away and start again")


def _build(config: DataConfig, sources: list[Source], path: Path, log: Log) -> None:
    part = path.with_name(path.name + ".partial")
    part.mkdir(exist_ok=True)
    if not (part / JOURNAL).exists():
        for source in sources:
            _check_text(source)
    tokenizer = _tokenizer(config, sources, part, log)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writer = Writer(part, len(sources), dtype)
    try:
        known = writer.journal.digests.setdefault(tokenizer.file, digest_of(tokenizer.model))
        if known != digest_of(tokenizer.model):
            raise ConfigError(
                f"{part / tokenizer.file} is not what was written; delete {part} and start again"
            )
        _tokenize(config, sources, part / tokenizer.file, writer, log)
        writer.commit()
    finally:
        writer.close()
    journal = writer.journal
    _check_broken(config, sources, journal, log)
    names = [source.name for source in sources]
    manifest = publish(part, path, tokenizer, dtype, journal, names, config.validation)
    log(
        f"{manifest['tokens']:,} tokens of {manifest['documents']:,} documents "
        f"({journal.text_bytes / manifest['tokens']:.2f} bytes a token) in {path}"
    )
    if not manifest["validation_documents"]:
        log("no document is held out for validation")


def publish(
    part: Path,
    path: Path,
    tokenizer: tokenizers.Tokenizer,
    dtype: np.dtype,
    journal: Journal,
    sources: list[str],
    validation: float,
) -> dict[str, Any]:
    """Make the finished files in `part` a corpus at `path`: indices, digests, manifest, rename."""
    files = {tokenizer.file: tokenizer.model, **tokenizer.beside}
    written = journal.digests | {name: digest_of(content) for name, content in files.items()}
    for name, expected in written.items():
        if digest(part / name) != expected:
            raise ConfigError(
                f"{part / name} is not what was written; delete {part} and start again"
            )
    held, indices = index(part, journal.documents, validation)
    names = [shard_name(i) for i in range(len(journal.shards))]
    digests = {name: written[name] for name in (*names, *files)} | indices
    documents = sum(journal.documents)
    manifest = {
        "format": FORMAT,
        "fingerprint": hashlib.blake2b(json.dumps(digests).encode(), digest_size=16).hexdigest(),
        "tokenizer": tokenizer.file,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "tokens": sum(journal.shards),
        "documents": documents,
        "validation_documents": documents - sum(source["documents"] for source in held),
        "text_bytes": journal.text_bytes,
        "bytes": sum((part / name).stat().st_size for name in digests),
        "shards": [
            {"file": name, "tokens": tokens}
            for name, tokens in zip(names, journal.shards, strict=True)
        ],
        "sources": [
            {
                "name": name,
                "documents": journal.documents[i],
                "training_documents": held[i]["documents"],
                "training_tokens": held[i]["tokens"],
                "left_out": journal.problems[i],
            }
            for i, name in enumerate(sources)
        ],
        "left_out": journal.named,
        "digests": digests,
    }
    manifest["digest"] = manifest_digest(manifest)
    regular.replace(part / MANIFEST, json.dumps(manifest, indent=1).encode())
    for name in ("lengths.part", "hashes.part", JOURNAL):
        (part / name).unlink()
    part.rename(path)
    return manifest


def _tokenizer(
    config: DataConfig, sources: list[Source], part: Path, log: Log
) -> tokenizers.Tokenizer:
    """The tokenizer of a corpus in the making; trained or copied once."""
    for made in ("tokenizer.model", "tokenizer.json"):
        if (part / made).exists():
            return tokenizers.load(part / made)
    tokenizer: tokenizers.Tokenizer
    if config.tokenizer is not None:
        tokenizer = tokenizers.load(Path(config.tokenizer))
    else:
        log(f"training a tokenizer of {config.vocab_size} pieces")
        tokenizer = tokenizers.train(sample(sources), config.vocab_size, config.model_type)
    beside.write(tokenizer.beside, part)
    regular.replace(part / tokenizer.file, tokenizer.model)
    return tokenizer


def _tokenize(
    config: DataConfig, sources: list[Source], tokenizer: Path, writer: Writer, log: Log
) -> None:
    from tqdm import tqdm

    cpus = len(os.sched_getaffinity(0))
    workers = min(config.workers or cpus, _WORKERS_A_CPU * cpus)
    done = sum(writer.journal.shards)
    log(
        f"tokenising in {workers} processes" + (f", going on after {done:,} tokens" if done else "")
    )
    # The size of packed and hub sources is not known beforehand, so only counts are shown.
    bar = tqdm(
        initial=done, unit=" tokens", unit_scale=True, disable=not sys.stderr.isatty(), leave=False
    )
    reported = time.monotonic()
    made = pieces(sources, writer.journal.next, tokenizer, config.normalize, writer.dtype, workers)
    with bar:
        for piece in made:
            writer.append(piece)
            bar.update(len(piece.tokens))
            if bar.disable and time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                log(f"{sum(writer.journal.shards):,} tokens")


def _check_text(source: Source) -> None:
    """Refuse a source whose first documents, or all of them, hold no text.

    What comes after, a tokenizer above all, would only fail later and say something else.
    """
    kinds: dict[str, int] = {}
    first = ""
    read = 0
    for read, document in enumerate(source.documents(), 1):
        if document.text is not None:
            return
        count_problem(kinds, document.problem)
        first = first or f"{document.name}: {document.problem}"
        if read == _LOOKED_AT:
            break
    if read:
        raise ConfigError(f"{_left_out(source, kinds, read)}; the first is {first}")


def _left_out(source: Source, kinds: dict[str, int], read: int) -> str:
    """How many documents of a source are left out, and why."""
    count = sum(kinds.values())
    missing = f"{NO_TEXT} {source.text_field}"
    if list(kinds) == [missing]:
        line = f"{source.name}: {count} of {read} documents have {missing}"
    else:
        reasons = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        line = f"{source.name}: {count} of {read} documents left out: {reasons}"
    return f"{line}; set data.text_field" if kinds.get(missing, 0) > read // 2 else line


def _check_broken(config: DataConfig, sources: list[Source], journal: Journal, log: Log) -> None:
    """Say what was left out; refuse sources of which too much was."""
    for source, kinds, firsts, read in zip(
        sources, journal.problems, journal.firsts, journal.next, strict=True
    ):
        count = sum(kinds.values())
        if not count:
            continue
        line = _left_out(source, kinds, read)
        examples = "; ".join(firsts.values())
        if count > config.max_broken * read:
            raise ConfigError(
                f"{line}, more than data.max_broken = {config.max_broken} allows; the first is "
                f"{examples}"
            )
        log(f"{line}; the first are {examples}")
    if not sum(journal.documents):
        names = ", ".join(source.name for source in sources)
        raise ConfigError(f"data.source: {names} holds no text")

"""Preparing survives everything and ends with the same bytes; what is damaged is one clear line."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data import ConfigError, Corpus, DataConfig, prepare
from data.storing.store import length_key
from tests.data.corpora import numbered, small_tokenizer

LINES = [f"The {n} quick brown foxes jump over {n * n} lazy dogs.\n" for n in range(400)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "tokenizer.model").write_bytes(small_tokenizer().model)
    for i in range(60):
        (folder / f"{i:02}.txt").write_text("".join(LINES[i : i * 6 + 1]))
    return folder


def config(texts: Path, root: Path, **keys: object) -> DataConfig:
    given = {"tokenizer": str(texts / "tokenizer.model"), "workers": 1, "validation": 0.1} | keys
    return DataConfig(source=str(texts / "*.txt"), root=str(root), **given)  # type: ignore[arg-type]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_every_document_is_stored_and_comes_back(texts: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    corpus = prepare(config(texts, tmp_path, tokenizer=None, vocab_size=600), lines.append)
    wanted = [path.read_text() for path in sorted(texts.glob("*.txt"))]
    assert [corpus.document(i) for i in range(corpus.document_count)] == wanted
    tokenizer = corpus.tokenizer
    for i, text in enumerate(wanted):
        start, end = corpus.offsets[i : i + 2]
        stored = corpus.gather(np.array([start]), np.array([end - start]))
        assert stored[0] == tokenizer.bos_id
        assert stored[-1] == tokenizer.eos_id
        assert tokenizer.byte_lengths()[stored].sum() == len(text.encode())
    held = set(corpus.validation.tolist())
    assert held
    assert sorted([*corpus.by_length.tolist(), *held]) == list(range(60))
    assert (np.diff(corpus.lengths(0, len(corpus.by_length))) >= 0).all()
    assert corpus.validation_text() == "".join(wanted[i] for i in corpus.validation.tolist())
    assert lines[0] == "training a tokenizer of 600 pieces"
    assert f"{corpus.token_count:,} tokens of 60 documents" in lines[-1]


def test_neither_workers_nor_folder_change_a_byte(texts: Path, tmp_path: Path) -> None:
    one = prepare(config(texts, tmp_path / "one"))
    two = prepare(config(texts, tmp_path / "two", workers=3))
    assert contents(one.path) == contents(two.path)
    assert one.path.name == two.path.name


def test_a_finished_corpus_is_never_touched(texts: Path, tmp_path: Path) -> None:
    first = prepare(config(texts, tmp_path))
    before = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    assert prepare(config(texts, tmp_path)).fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == before


def test_changed_text_or_tokenizer_is_another_corpus(texts: Path, tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for path in texts.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    before = prepare(config(source, tmp_path))
    (source / "30.txt").write_text((source / "30.txt").read_text().replace("quick", "brisk", 1))
    after = prepare(config(source, tmp_path))
    assert before.path != after.path
    assert before.fingerprint != after.fingerprint
    third = prepare(config(source, tmp_path, tokenizer=None, vocab_size=520))
    assert third.path not in (before.path, after.path)


SLOWLY = """
import sys, time
from data import DataConfig, prepare
from data.storing import encode
from data.storing import store
encode._TASK_CHARACTERS = 2000
store._COMMIT_SECONDS = 0.0
append = store.Writer.append
def slow(writer, piece):
    time.sleep(0.03)
    append(writer, piece)
    print(sum(writer.journal.shards), flush=True)
store.Writer.append = slow
prepare(DataConfig(source=sys.argv[1], root=sys.argv[2], tokenizer=sys.argv[3], workers=1,
                   validation=0.1))
"""


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(
    texts: Path, tmp_path: Path
) -> None:
    whole = prepare(config(texts, tmp_path / "whole"))
    arguments = [str(texts / "*.txt"), str(tmp_path / "killed"), str(texts / "tokenizer.model")]
    reached = []
    for appended in (1, 5, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, *arguments], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(appended):
            reached.append(int(process.stdout.readline()))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        (partial,) = (tmp_path / "killed").glob("*.partial")
        # What a torn write leaves behind the last commit does not count.
        with open(partial / "tokens-00000.bin", "ab") as torn:
            torn.write(b"half")
    assert reached == sorted(reached)  # never back to the start
    again = prepare(config(texts, tmp_path / "killed"))
    assert contents(again.path) == contents(whole.path)
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_of_many_at_once_one_works_and_the_others_wait(texts: Path, tmp_path: Path) -> None:
    arguments = [str(texts / "*.txt"), str(tmp_path), str(texts / "tokenizer.model")]
    started = [
        subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sum(bool(out) for out in printed) == 1


def test_a_full_disk_is_one_line_and_nothing_is_lost(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(config(texts, tmp_path / "whole"))
    real = os.fsync
    calls = iter(range(100))

    def full(file: int) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr("data.storing.store._COMMIT_SECONDS", 0.0)
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left on device; make room and start again"):
            prepare(config(texts, tmp_path / "full"))
    assert contents(prepare(config(texts, tmp_path / "full")).path) == contents(whole.path)


def test_a_file_size_limit_is_reported_like_a_full_disk(texts: Path, tmp_path: Path) -> None:
    script = SLOWLY.replace("import sys, time", "import resource, signal, sys, time").replace(
        "append = store",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\nappend = store",
    )
    arguments = [str(texts / "*.txt"), str(tmp_path), str(texts / "tokenizer.model")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert "ConfigError" in done.stderr.splitlines()[-1]
    assert "make room and start again" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "name",
    ["tokens-00000.bin", "offsets.bin", "by_length.bin", "validation.bin", "tokenizer.model"],
)
def test_a_changed_or_shortened_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    corpus = numbered(tmp_path, {"all": [30] * 100}, validation=0.1)
    path = corpus.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is not what was written"):
        Corpus(corpus.path).verify()
    path.write_bytes(content[:-3])
    with pytest.raises(ConfigError, match=name) as raised:
        Corpus(corpus.path).verify()
    assert "prepare it again" in str(raised.value)
    assert "\n" not in str(raised.value)
    path.unlink()
    with pytest.raises(ConfigError, match=name):
        Corpus(corpus.path).verify()


def test_a_damaged_corpus_is_noticed_before_training(texts: Path, tmp_path: Path) -> None:
    corpus = prepare(config(texts, tmp_path))
    path = corpus.path / "tokens-00000.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokens-00000.bin is not what was written"):
        prepare(config(texts, tmp_path))
    (corpus.path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="no prepared corpus"):
        prepare(config(texts, tmp_path))


def test_a_partial_corpus_that_lost_committed_bytes_is_refused(texts: Path, tmp_path: Path) -> None:
    arguments = [str(texts / "*.txt"), str(tmp_path), str(texts / "tokenizer.model")]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (partial,) = tmp_path.glob("*.partial")
    os.truncate(partial / "tokens-00000.bin", 10)
    with pytest.raises(ConfigError, match="has 10 bytes where its journal counts on"):
        prepare(config(texts, tmp_path))


def test_documents_left_out_are_counted_and_named(tmp_path: Path) -> None:
    rows = [json.dumps({"text": line}) for line in LINES[:40]]
    rows[7:7] = ['{"text": ', '{"text": ""}', '{"txt": "x"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer().model)
    given = DataConfig(
        source=str(tmp_path / "rows.jsonl"),
        root=str(tmp_path / "root"),
        tokenizer=str(tmp_path / "tokenizer.model"),
        workers=1,
    )
    lines: list[str] = []
    corpus = prepare(given, lines.append)
    assert corpus.document_count == 40
    (source,) = corpus.manifest["sources"]
    assert source["left_out"] == {"not JSON": 1, "empty": 1, "no text in field text": 1}
    assert corpus.manifest["left_out"][0].endswith("rows.jsonl:8: not JSON")
    assert any("3 of 43 documents left out" in line for line in lines)
    given.max_broken = 0.05
    given.root = str(tmp_path / "strict")
    with pytest.raises(ConfigError, match=r"more than data.max_broken = 0.05 allows"):
        prepare(given)


def test_a_source_without_any_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer().model)
    given = DataConfig(
        source=str(tmp_path / "x.txt"),
        root=str(tmp_path / "root"),
        tokenizer=str(tmp_path / "tokenizer.model"),
        max_broken=0.99,
        workers=1,
    )
    with pytest.raises(ConfigError, match="1 of 1 documents left out: 1 empty"):
        prepare(given)


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.storing.encode._TASK_CHARACTERS", 1 << 14)
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer().model)
    peaks = []
    for megabytes in (1, 6):
        source = tmp_path / f"{megabytes}.jsonl"
        row = json.dumps({"text": "".join(LINES[:80])}) + "\n"
        source.write_text(row * (megabytes * 1_000_000 // len(row)))
        given = config(tmp_path, tmp_path / "root", workers=1)
        given.source = str(source)
        tracemalloc.start()
        prepare(given)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 1e5


def test_lengths_are_sorted_by_a_key_that_rises_with_them() -> None:
    lengths = np.concatenate([np.arange(1, 70000), 2 ** np.arange(17, 48)])
    assert (np.diff(length_key(lengths)) >= 0).all()
    assert (np.diff(length_key(np.arange(1, 65536))) == 1).all()


def test_opening_is_quick(texts: Path, tmp_path: Path) -> None:
    prepare(config(texts, tmp_path))
    started = time.perf_counter()
    prepare(config(texts, tmp_path))
    assert time.perf_counter() - started < 2

"""What is damaged, lost or full is one clear line, before hours are spent or wrong text is kept."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data import ConfigError, Corpus, DataConfig, prepare
from data.sources import Source
from data.storing import store
from data.storing.store import reserve
from data.tokens.sample import sample
from tests.data.corpora import numbered, small_tokenizer

ROWS = [
    json.dumps({"text": f"The {n} quick brown foxes jump over {n * n} lazy dogs.\n" * 3})
    for n in range(60)
]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer().model)
    (tmp_path / "rows.jsonl").write_text("\n".join(ROWS))
    return DataConfig(
        source=str(tmp_path / "rows.jsonl"),
        root=str(tmp_path / "root"),
        tokenizer=str(tmp_path / "tokenizer.model"),
        workers=1,
        validation=0.1,
    )


@pytest.fixture
def partial(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus whose making ended in the middle, after something was committed."""
    appended = iter(range(100))
    real = store.Writer.append

    def append(writer: store.Writer, piece: store.Piece) -> None:
        if next(appended) == 3:
            raise KeyboardInterrupt
        real(writer, piece)

    with monkeypatch.context() as patch:
        patch.setattr(store, "SHARD_TOKENS", 600)
        patch.setattr(store, "_COMMIT_SECONDS", 0.0)
        patch.setattr("data.storing.encode._TASK_DOCUMENTS", 10)
        patch.setattr(store.Writer, "append", append)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    (found,) = Path(config.root).glob("*.partial")
    return found


def test_one_that_ended_in_the_middle_goes_on_to_the_same_bytes(
    config: DataConfig, partial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (partial / "tokens-00001.bin").exists()
    monkeypatch.setattr(store, "SHARD_TOKENS", 600)
    monkeypatch.setattr("data.storing.encode._TASK_DOCUMENTS", 10)
    done = prepare(config)
    config.root = str(tmp_path / "whole")
    whole = prepare(config)
    assert done.manifest == whole.manifest
    whole.verify()
    done.verify()


@pytest.mark.parametrize(
    "name",
    [
        "tokens-00000.bin",
        "tokens-00001.bin",
        "lengths.part",
        "hashes.part",
        "tokenizer.model",
        "journal.json",
    ],
)
def test_a_flipped_bit_in_a_half_made_corpus_is_found_when_going_on(
    config: DataConfig, partial: Path, name: str
) -> None:
    content = bytearray((partial / name).read_bytes())
    for at in {0, len(content) // 3, len(content) - 1} if name != "tokenizer.model" else {4000}:
        damaged = content.copy()
        damaged[at] ^= 1
        (partial / name).write_bytes(damaged)
        with pytest.raises(ConfigError) as raised:
            prepare(config)
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)
    (partial / name).write_bytes(content)
    prepare(config).verify()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"3", b"null", b'{"journal": 3, "digest": ""}', b"\xff", b"{" * 10**5],
)
def test_a_damaged_journal_is_one_line(config: DataConfig, partial: Path, content: bytes) -> None:
    (partial / "journal.json").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"journal.json is damaged, .*; delete .*partial"
    ) as raised:
        prepare(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["shards", "next", "documents", "text_bytes"])
def test_a_journal_that_says_something_else_is_damaged(
    config: DataConfig, partial: Path, key: str
) -> None:
    """Numbers that a journal may well hold, but not those of its digest."""
    path = partial / "journal.json"
    saved = json.loads(path.read_text())
    value = saved["journal"][key]
    saved["journal"][key] = [value[0] - 1, *value[1:]] if isinstance(value, list) else value - 1
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match=r"journal\.json is damaged"):
        prepare(config)


def test_a_bit_that_flips_after_it_was_written_is_not_digested_as_good(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same run, between writing and the end."""
    real = store.Writer.close

    def close(writer: store.Writer) -> None:
        real(writer)
        path = writer.folder / "tokens-00000.bin"
        content = bytearray(path.read_bytes())
        content[100] ^= 4
        path.write_bytes(content)

    monkeypatch.setattr(store.Writer, "close", close)
    with pytest.raises(ConfigError, match=r"tokens-00000.bin is not what was written; delete"):
        prepare(config)


def test_a_lost_manifest_is_said_at_once(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = prepare(config)
    (corpus.path / "manifest.json").unlink()
    module = sys.modules["data.prepare"]  # data.prepare is the function
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("all is made again"))
    with pytest.raises(
        ConfigError, match=r"has lost its manifest.json.* delete that folder"
    ) as raised:
        prepare(config)
    assert str(corpus.path) in str(raised.value)
    for file in corpus.path.iterdir():
        file.unlink()
    corpus.path.rmdir()
    corpus.path.write_text("a file of the user's")
    with pytest.raises(ConfigError, match="is no folder; move it away"):
        prepare(config)
    assert corpus.path.read_text() == "a file of the user's"


def test_no_flipped_bit_of_a_manifest_is_accepted(tmp_path: Path) -> None:
    path = numbered(tmp_path, {"one": [30] * 10, "two": [50] * 3}, validation=0.1).path
    content = (path / "manifest.json").read_bytes()
    written = json.loads(content)
    del written["digest"]
    random = np.random.default_rng(0)
    for bit in random.permutation(8 * len(content))[:800].tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / "manifest.json").write_bytes(damaged)
        # A line end for a space says the same; so does the digest under another name.
        with suppress(ConfigError):
            read = Corpus(path).manifest
            assert {key: read.get(key) for key in written} == written
    for broken in (b"", b"[]", b"3", b"null", b'{"shards": 3}', content[:-20], b"[" * 10**5):
        (path / "manifest.json").write_bytes(broken)
        with pytest.raises(ConfigError, match="is no prepared corpus"):
            Corpus(path)


def test_a_manifest_of_before_it_had_a_digest_is_read(tmp_path: Path) -> None:
    corpus = numbered(tmp_path, {"one": [30] * 10})
    manifest = dict(corpus.manifest)
    del manifest["digest"]
    (corpus.path / "manifest.json").write_text(json.dumps(manifest))
    assert Corpus(corpus.path).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("way", ["fallocate", "writing"])
def test_room_is_reserved_before_a_file_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "writing":

        def unknown(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        monkeypatch.setattr(os, "posix_fallocate", unknown)
    path = tmp_path / "x"
    with open(path, "wb") as file:
        reserve(file, 3_000_001)
    assert path.stat().st_size == 3_000_001
    assert path.stat().st_blocks * 512 >= 3_000_001
    assert not any(path.read_bytes())


def test_no_room_for_an_index_is_one_line_and_nothing_is_lost(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ConfigError, match="No space left on device; make room and start again"):
            prepare(config)
    again = prepare(config)
    config.root = str(tmp_path / "whole")
    assert again.fingerprint == prepare(config).fingerprint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=128k"):
        pytest.skip("may not mount a file system")
    yield folder
    libc.umount2(str(folder).encode(), 2)


def test_on_a_full_disk_indexing_ends_with_a_line_not_with_a_signal(small_disk: Path) -> None:
    """Room for the lengths and the offsets, and none for the index by length."""
    script = """
import sys, pathlib, numpy as np
from data.storing import store
folder = pathlib.Path(sys.argv[1])
count = 4096
for name in ("lengths.part", "hashes.part"):
    np.arange(1, count + 1, dtype=np.int64).tofile(folder / name)
(folder / "filling").write_bytes(bytes(16384))
try:
    store.index(folder, [count], 0.0)
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(small_disk)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "No space left on device"), done.stderr


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            {"content": "x", "id": 3},
            r"200 of 200 documents have no text in field text; set data.text_field; .*content, id",
        ),
        ({"text": 3}, r"200 of 200 documents have no text in field text; .*of type int"),
        ({"text": None, "body": "x"}, r"200 of 200 documents have no text .*fields: body"),
        ({"text": ["x"]}, r"200 of 200 documents have no text .*of type list"),
        ({"text": ""}, r"200 of 200 documents left out: 200 empty"),
        ("\x00\x01", r"200 of 200 documents left out: 200 not JSON"),
        (None, r"200 of 200 documents have no text in field text; set data.text_field"),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_a_column_without_text_is_said_before_a_tokenizer_is_trained(
    config: DataConfig, tmp_path: Path, rows: object, line: str, trained: bool
) -> None:
    written = rows if isinstance(rows, str) else json.dumps(rows)
    (tmp_path / "rows.jsonl").write_text(f"{written}\n" * 200)
    if trained:
        config.tokenizer = None
    said: list[str] = []
    with pytest.raises(ConfigError, match=line) as raised:
        prepare(config, said.append)
    assert "vocab_size" not in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not said


def test_a_parquet_column_of_numbers_or_bytes_is_said(config: DataConfig, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    config.source = str(tmp_path / "rows.parquet")
    for column, kind in (([1, 2], "int"), ([b"x", b"y"], "bytes")):
        pq.write_table(pa.table({"text": column}), str(config.source))
        with pytest.raises(ConfigError, match=f"2 of 2 documents have no text .*of type {kind}"):
            prepare(config)


def test_files_that_are_all_binary_are_said(config: DataConfig, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(bytes([255, number]))
    config.source, config.tokenizer = str(tmp_path / "*.txt"), None
    with pytest.raises(ConfigError, match="3 of 3 documents left out: 3 not UTF-8; the first is"):
        prepare(config)


def test_the_first_of_what_is_left_out_is_of_that_source(
    config: DataConfig, tmp_path: Path
) -> None:
    (tmp_path / "good.jsonl").write_text("\n".join([*ROWS, "bad"]))
    (tmp_path / "poor.jsonl").write_text("\n".join([*ROWS[:3], '{"content": "x"}']))
    config.source = [str(tmp_path / "good.jsonl"), str(tmp_path / "poor.jsonl")]
    with pytest.raises(ConfigError, match=r"poor: 1 of 4 .*poor.jsonl:4: no text .*content"):
        prepare(config)


def test_a_tokenizer_that_cannot_be_loaded_by_a_worker_is_told_by_its_own_line(
    config: DataConfig, tmp_path: Path
) -> None:
    from data.sources import resolve
    from data.storing.encode import pieces

    broken = tmp_path / "broken.model"
    broken.write_bytes(b"nothing")
    made = pieces(resolve(config.source, "text"), [0], broken, False, np.dtype(np.uint16), 1)
    with pytest.raises(ConfigError, match=r"broken.model; it cannot be read"):
        next(made)
    made.close()


def test_a_stage_of_an_unknown_source_is_said_before_anything_is_prepared(
    config: DataConfig,
) -> None:
    config.stages = [{"step": 3, "weights": {"rows": 1, "row": 2}}]
    with pytest.raises(
        ConfigError, match=r"stages.0.: weight of row: no such source; they are rows"
    ):
        prepare(config)
    assert not Path(config.root).exists()


def test_however_many_sources_there_are_each_is_in_the_tokenizers_sample(tmp_path: Path) -> None:
    sources = []
    for number in range(1200):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"<{number}>")
        sources.append(Source(str(number), ((path.name, path),), "text", weight=1.0))
    assert set(sample(sources)) == {f"<{number}>" for number in range(1200)}


@pytest.mark.parametrize("journal", [True, False])
@pytest.mark.parametrize("name", ["lengths.part", "hashes.part", "tokens-00000.bin"])
def test_what_a_link_in_a_half_made_corpus_names_is_not_cut_back(
    config: DataConfig, partial: Path, tmp_path: Path, name: str, journal: bool
) -> None:
    """The file there is cut back to what counts; a longer one of the user's would be, too."""
    theirs = tmp_path / "theirs"
    theirs.write_bytes((partial / name).read_bytes() + b"precious")
    before = theirs.read_bytes()
    (partial / name).unlink()
    (partial / name).symlink_to(theirs)
    if not journal:
        (partial / store.JOURNAL).unlink()
    with pytest.raises(ConfigError, match=f"{name} is a link, which is not followed; delete"):
        prepare(config)
    assert theirs.read_bytes() == before


@pytest.mark.parametrize("name", ["journal.json.part", "manifest.json.part", "by_length.bin"])
def test_a_corpus_is_written_through_no_link(
    config: DataConfig, partial: Path, tmp_path: Path, name: str
) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"precious")
    (partial / name).symlink_to(theirs)
    prepare(config).verify()
    assert theirs.read_bytes() == b"precious"

"""What `xz -9` makes of the validation text: a number that makes sense, or none."""

from __future__ import annotations

import lzma
import sysconfig
from pathlib import Path

import pytest

from data import Corpus, DataConfig, StreamConfig, prepare
from data.material import Text
from tests.data.corpora import numbered, small_tokenizer

OS = (Path(sysconfig.get_path("stdlib")) / "os.py").read_text()


def bar(folder: Path, text: str) -> tuple[str, str, float] | None:
    (folder / "tokenizer.model").write_bytes(small_tokenizer().model)
    (folder / "a.jsonl").write_text('{"text": "held out by chance or not"}\n')
    data = DataConfig(
        source=str(folder / "a.jsonl"),
        root=str(folder / "root"),
        tokenizer=str(folder / "tokenizer.model"),
        workers=1,
    )
    corpus = prepare(data)
    corpus.validation_text = lambda most=None: text  # type: ignore[method-assign]
    return Text(corpus, StreamConfig(), data).bar(1 << 20)


def test_of_enough_text_it_is_what_xz_makes_of_it(tmp_path: Path) -> None:
    found = bar(tmp_path, OS)
    assert found is not None
    packed = lzma.compress(OS.encode(), preset=9)
    assert found[:2] == ("val_bpb", "xz -9")
    assert found[2] == pytest.approx(8 * (len(packed) - 60) / len(OS.encode()), abs=0.01)


def test_the_frame_is_no_part_of_it_and_too_little_text_has_none(tmp_path: Path) -> None:
    small = bar(tmp_path, OS[:1024])
    assert small is not None
    assert small[2] < 8 * len(lzma.compress(OS[:1024].encode(), preset=9)) / 1024 - 0.3
    assert bar(tmp_path, "abc") is None
    assert bar(tmp_path, "") is None


def test_without_validation_nothing_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus: Corpus = numbered(tmp_path, {"all": [20] * 10})
    monkeypatch.setattr(lzma, "compress", lambda *_, **__: pytest.fail("nothing is held out"))
    assert Text(corpus, StreamConfig(), DataConfig()).bar(1 << 20) is None

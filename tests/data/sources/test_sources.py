"""Every source gives its documents byte for byte, and names those it cannot give."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.settings import ConfigError
from data.sources import resolve

TEXTS = [
    "one\r\ntwo\r",
    "\n\n  indented\tand tabbed\n",
    "漢字 🙂 \u2028 \x85 \x0c",
    "x" * 5000,
    " ",
]


def packed(path: Path, content: bytes) -> str:
    """Write `content` as the suffix says, and give the path."""
    if path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as out:
            out.write(content)
    else:
        path.write_bytes(content)
    return str(path)


def texts(source: object, **keys: str) -> list[str]:
    found = resolve(source, keys.get("text_field", "text"))  # type: ignore[arg-type]
    return [doc.text for one in found for doc in one.documents() if doc.text is not None]


def problems(source: str) -> list[tuple[str, str]]:
    (one,) = resolve(source, "text")
    return [(doc.name, doc.problem) for doc in one.documents() if doc.text is None]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_files_come_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    for i, text in enumerate(TEXTS):
        packed(tmp_path / f"{i}.txt{suffix}", text.encode())
    assert texts(f"{tmp_path}/*.txt{suffix}") == TEXTS
    assert texts(str(tmp_path)) == TEXTS


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_gives_its_field_and_names_bad_lines(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": text, "other": 1}).encode() for text in TEXTS]
    lines[2:2] = [b'{"text": "half', b"", b"\xff\xfe", b'{"text": 3}', b"[]", b'{"text": ""}']
    lines.append(b'{"text": "\\ud800 alone"}')
    path = packed(tmp_path / f"some.jsonl{suffix}", b"\n".join(lines))
    assert texts(path) == TEXTS
    assert [(name.rpartition(":")[2], why) for name, why in problems(path)] == [
        ("3", "not JSON"),
        ("5", "not UTF-8"),
        ("6", "no text in field text (it is of type int)"),
        ("7", "no text in field text"),
        ("8", "empty"),
        ("12", "not UTF-8"),
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_parquet_gives_its_column(tmp_path: Path, suffix: str) -> None:
    plain = tmp_path / "plain"
    pq.write_table(
        pa.table({"content": [*TEXTS, None, ""], "n": range(7)}), plain, row_group_size=2
    )
    path = packed(tmp_path / f"some.parquet{suffix}", plain.read_bytes())
    assert texts({"path": path, "text_field": "content"}) == TEXTS
    with pytest.raises(ConfigError, match=r"no column text; .* must be one of content, n"):
        texts(path)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"abc" * 1000)[:-9])
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    found = problems(str(tmp_path))
    assert [name for name, _ in found] == ["a.txt", "b.txt", "c.txt.gz", "d.parquet"]
    assert [why for _, why in found[:2]] == ["empty", "not UTF-8"]
    assert all(why.startswith("unreadable") for _, why in found[2:])
    assert not any("\n" in why for _, why in found)


def test_a_very_long_text_is_several_documents_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.text._BLOCK", 100)
    for text in ("é漢🙂" * 300, "a line of text\n" * 50, "x" * 100, "x" * 201):
        (tmp_path / "long.txt").write_text(text)
        found = texts(str(tmp_path / "long.txt"))
        assert "".join(found) == text
        assert max(len(part.encode()) for part in found) <= 100


@pytest.mark.parametrize("name", ["a.txt", "some.jsonl", "b.parquet"])
def test_reading_can_begin_anywhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    rows = [json.dumps({"text": f"row {i}"}) for i in range(10)] + ["bad"]
    (tmp_path / "some.jsonl").write_text("\n".join(rows))
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(5)]}), tmp_path / "b.parquet")
    (one,) = resolve(str(tmp_path / "*"), "text")
    whole = list(one.documents())
    assert len(whole) == 17
    for first in range(18):
        assert list(one.documents(first)) == whole[first:]


def test_a_hub_data_set_is_read_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    real = datasets.load_dataset
    asked = []

    def local(name: str, config: str | None, **keys: object) -> object:
        asked.append((name, config, keys))
        keys.pop("revision")
        return real("json", data_files=str(tmp_path / "rows.jsonl"), **keys)

    monkeypatch.setattr(datasets, "load_dataset", local)
    for streaming in (True, False):
        source = {"hub": "owner/name", "config": "en", "split": "train", "streaming": streaming}
        assert texts(source) == TEXTS
        (one,) = resolve(source, "text")
        assert [document.text for document in one.documents(3)] == TEXTS[3:]
    assert asked[0][:2] == ("owner/name", "en")


def test_the_standard_library_is_there_and_in_a_fixed_order() -> None:
    (one,) = resolve("stdlib", "text")
    names = [name for name, _ in one.files]
    assert names == sorted(names)
    assert "os.py" in names
    assert not any("site-packages" in name for name in names)
    assert len(names) > 500


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("nowhere/*.txt", "no file matches"),
        ([], "empty list"),
        ([{"path": "stdlib", "wieght": 1}], "wieght: no such key"),
        ([{"weight": 1}], "one of path and hub"),
        ([{"path": "stdlib", "weight": -1}], "weight is -1"),
        ([{"path": "stdlib", "weight": 1}, "stdlib"], "have a weight and the others none"),
        ([{"path": "stdlib", "weight": float("inf")}], "weight is .inf; it must be a number"),
        ([{"path": "stdlib", "weight": float("nan")}], "weight is .nan; it must be a number"),
        ([{"path": "stdlib", "weight": True}], "weight is true; it must be a number"),
        ([{"path": "stdlib", "weight": "much"}], "weight is much; it must be a number"),
        ([{"path": "stdlib", "weight": 10**400}], "it must be a number"),
        ([{"path": "stdlib", "weight": 0}] * 2, "all weights are 0"),
        ([{"path": "stdlib", "name": "a"}] * 2, "2 sources are named a"),
        ([{"path": "stdlib", "name": "a/b"}], "name is a/b; it must be a word without /"),
        ([{"path": "stdlib", "name": 3}], "name is 3; it must be text"),
        ([{"path": ["a", "b"]}], "path is .a, b.; it must be text"),
        ([{"hub": "x", "streaming": "no"}], "streaming is 'no'; it must be true or false"),
        ([None], "null is no source"),
        ([3], "3 is no source"),
        ("", "'' is no source|no file|path is"),
    ],
)
def test_a_wrong_source_is_one_line(source: object, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as raised:
        resolve(source, "text")  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        (["x.txt"] * 14, ["x", *[f"x-{n}" for n in range(2, 15)]]),
        (["x.txt", "x-2.txt", "x.txt"], ["x", "x-2", "x-3"]),
        (["x-2.txt", "x.txt", "x.txt"], ["x-2", "x", "x-3"]),
        (["x.txt", "x.txt", "x-2.txt"], ["x", "x-2", "x-2-2"]),
        (["xab.txt", "x.txt"], ["xab", "x"]),
        (
            ["x.txt", "x-10.txt", *["x.txt"] * 9],
            ["x", "x-10", *[f"x-{n}" for n in range(2, 10)], "x-11"],
        ),
        ([("x.txt", "y"), "y.txt", ("y.txt", "x"), "x.txt"], ["y", "y-2", "x", "x-2"]),
    ],
)
def test_sources_of_one_name_are_told_apart(
    tmp_path: Path, entries: list[object], wanted: list[str]
) -> None:
    """The second has a 2, and so on; a name that was given is taken before all others."""
    listed = []
    for entry in entries:
        file, name = entry if isinstance(entry, tuple) else (entry, None)
        (tmp_path / str(file)).write_text("x")
        listed.append({"path": str(tmp_path / str(file))} | ({"name": name} if name else {}))
    found = resolve(listed, "text")
    assert [one.name for one in found] == wanted


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".GZ"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    packed(tmp_path / f"a.txt{suffix}", BOM + "one \ufeff two".encode())
    packed(tmp_path / f"b.txt{suffix}", BOM)
    packed(tmp_path / f"c.txt{suffix}", BOM[:2])
    rows = b'{"text": "first"}\n{"text": "second"}\n'
    packed(tmp_path / f"d.jsonl{suffix}", BOM + rows + BOM + rows)  # two files, joined
    assert texts(str(tmp_path)) == ["one \ufeff two", *["first", "second"] * 2]
    assert [why for _, why in problems(str(tmp_path))] == ["empty", "not UTF-8"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("coding", ["UTF-16", "UTF-32"])
def test_another_unicode_is_named(tmp_path: Path, name: str, coding: str) -> None:
    path = packed(tmp_path / name, '{"text": "x"}'.encode(coding))
    assert [why for _, why in problems(path)] == [
        f"not UTF-8 ({coding}; convert it: iconv -f {coding} -t UTF-8)"
    ]


def test_a_corpus_made_when_marks_were_text_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"text")
    assert resolve(str(path), "text")[0].recipe()[-1][0][2:] == []
    path.write_bytes(BOM + b"text")
    assert resolve(str(path), "text")[0].recipe()[-1][0][2:] == ["BOM"]


@pytest.mark.parametrize("content", ['[{"text": "x"}]', '[\n{"text": "x"},\n{"text": "y"}\n]'])
def test_a_json_array_deserves_its_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert [why for _, why in problems(str(tmp_path / "a.json"))] == [
        "a JSON array (JSONL is wanted, one object a line)"
    ]
    (tmp_path / "a.json").write_text(json.dumps({"text": "x"}, indent=1))
    assert [why for _, why in problems(str(tmp_path / "a.json"))] == [
        "a JSON object over several lines (JSONL is wanted, one object a line)"
    ]


def test_a_parquet_file_without_rows_is_not_broken(tmp_path: Path) -> None:
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    with pq.ParquetWriter(tmp_path / "c.parquet", empty.schema) as writer:
        for texts_of_group in ([], ["y"], []):
            writer.write_table(pa.table({"text": pa.array(texts_of_group, pa.string())}))
    assert texts(str(tmp_path)) == ["x", "y"]
    assert problems(str(tmp_path)) == []
    with pytest.raises(ConfigError, match="must be one of text"):
        texts(str(tmp_path / "a.parquet"), text_field="content")


@pytest.mark.parametrize(
    "kind", [".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".jsonl"]
)
def test_whatever_is_cut_short_is_named_or_given(tmp_path: Path, kind: str) -> None:
    plain = tmp_path / "plain"
    pq.write_table(pa.table({"text": ["x" * 50] * 20}), plain)
    content = plain.read_bytes() if kind == ".parquet" else b'{"text": "some words"}\n' * 50
    whole = Path(packed(tmp_path / f"whole{kind}", content)).read_bytes()
    for size in (0, 1, 3, 10, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"cut{kind}"
        path.write_bytes(whole[:size])
        (one,) = resolve(str(path), "text")
        for document in one.documents():
            assert (document.text is None) == bool(document.problem)
            assert "\n" not in document.problem


def test_the_recipe_changes_with_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a" * 1000)
    (before,) = resolve(str(path), "text")
    first = before.recipe()
    assert first == resolve(str(path), "text")[0].recipe()
    path.write_bytes(b"a" * 500 + b"b" + b"a" * 499)
    assert first != before.recipe()


def test_a_hub_that_is_not_reached_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    def tried(*_: object, **__: object) -> object:
        for attempt in range(5):
            logging.getLogger("huggingface_hub.utils._http").warning("retry %d", attempt)
        raise ConnectionError("no hub")

    monkeypatch.setattr(datasets, "load_dataset", tried)
    (one,) = resolve({"hub": "owner/name"}, "text")
    with pytest.raises(ConfigError, match="no data set that can be read"):
        next(one.documents())
    assert not caplog.records
    logging.getLogger("huggingface_hub.utils._http").warning("still said elsewhere")
    assert caplog.records

"""Which files a path names: those that are there, each once, whatever they are called."""

from __future__ import annotations

import glob
import os
import socket
from pathlib import Path

import pytest

from data.settings import ConfigError
from data.sources import resolve
from data.sources.paths import absolute, matches, printable


def names(pattern: object) -> list[str]:
    return [name for name, _ in matches(str(pattern))]


def found(pattern: object) -> list[str]:
    return sorted(str(path) for _, path in matches(str(pattern)))


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("a[1].txt", "a1.txt", "b?.txt", "bx.txt", "c*.txt", "cc.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d[12]").mkdir()
    (tmp_path / "d[12]" / "x.txt").write_text("inside")
    (tmp_path / "d1").mkdir()
    for name in ("a[1].txt", "b?.txt", "c*.txt"):
        (one,) = resolve(str(tmp_path / name), "text")
        assert [document.text for document in one.documents()] == [name]
    assert names(tmp_path / "d[12]") == ["x.txt"]
    assert found(tmp_path / "a[12].txt") == [f"{tmp_path}/a1.txt"]
    assert found(tmp_path / "a[[]1].txt") == [f"{tmp_path}/a[1].txt"]


def test_names_are_those_under_the_pattern_wherever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also once the path has been made absolute, and once more."""
    for name in ("d[1]/a/x.txt", "d[1]/b/y.txt", "d1/a/no.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    for pattern, wanted in (
        ("d[[]1]/*/*.txt", ["a/x.txt", "b/y.txt"]),
        ("d[1]", ["a/x.txt", "b/y.txt"]),
        ("d[1]/a/x.txt", ["x.txt"]),
        ("./d1/../d1/*/no.txt", ["a/no.txt"]),
        ("*/a/no.*", ["d1/a/no.txt"]),
    ):
        assert names(pattern) == wanted
        once = absolute(pattern)
        assert os.path.isabs(once)
        assert absolute(once) == once
        assert names(once) == wanted


@pytest.mark.parametrize(
    "pattern",
    ["*.txt", "**/*.txt", "**", "?/*", "a/**/x.*", "[ab]/*.txt", "**/b/**", ".h/*", "*/.y.txt"],
)
def test_patterns_match_what_glob_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    for name in (
        "x.txt",
        "a/x.txt",
        "a/b/x.txt",
        "b/y.txt",
        ".h/x.txt",
        "a/.y.txt",
        "a/b/c/d/z.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for base in (tmp_path, Path()):
        monkeypatch.chdir(tmp_path)
        wanted = [name for name in glob.glob(str(base / pattern), recursive=True)]
        assert found(base / pattern) == sorted({n for n in wanted if os.path.isfile(n)})


def test_loops_end_and_links_are_followed(tmp_path: Path) -> None:
    inside = tmp_path / "texts"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "x.txt").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.txt").write_text("y")
    (inside / "other").symlink_to(tmp_path / "elsewhere")
    for number in range(3):  # each way round would be doubled by the others
        (inside / "deep" / f"loop{number}").symlink_to(inside)
    (inside / "self").symlink_to(inside / "self")
    (inside / "gone.txt").symlink_to(inside / "nowhere")
    assert names(inside / "**" / "*.txt") == ["deep/x.txt", "other/y.txt"]
    assert names(inside) == ["deep/x.txt"]
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        matches(str(inside / "self"))


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.txt"))
    (tmp_path / "real.txt").write_text("text")
    assert names(tmp_path) == ["real.txt"]
    assert found(tmp_path / "*.txt") == [f"{tmp_path}/real.txt"]
    for name in ("pipe.txt", "s.txt"):
        with pytest.raises(ConfigError, match="neither a file nor a folder"):
            matches(str(tmp_path / name))
    with pytest.raises(ConfigError, match="no file matches"):
        matches(str(tmp_path / "x.txt"))


ODD = [b"caf\xe9.txt", b"two\nlines.txt", b"tab\t.txt", b"esc\x1b[31m.txt", "é漢.txt".encode()]


@pytest.mark.parametrize("name", ODD)
def test_any_file_name_is_one_line_that_can_be_printed(tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    Path(os.fsdecode(path)).write_bytes(b"\xff" if b"caf" in name else b"text")
    for given in (str(tmp_path), str(tmp_path / "*.txt"), os.fsdecode(path)):
        (one,) = resolve(given, "text")
        (document,) = one.documents()
        for said in (document.name, one.name):
            assert said.encode().decode("ascii" if name.isascii() else "utf-8") == said
            assert len(said.splitlines()) == 1
        assert one.recipe() == one.recipe()
    assert printable("a b é") == "a b é"


def test_a_file_that_may_not_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """root may read everything, so the refusal is played."""
    import builtins

    from data import DataConfig, prepare

    (tmp_path / "secret.txt").write_text("x")
    real = builtins.open

    def refusing(file: object, *rest: object, **keys: object) -> object:
        if str(file).endswith("secret.txt"):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *rest, **keys)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", refusing)
    with pytest.raises(ConfigError, match=r"secret.txt: Permission denied"):
        prepare(DataConfig(source=str(tmp_path / "secret.txt"), root=str(tmp_path / "root")))

"""What is no regular file is refused at once, wherever a file is read or added to."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from data import regular


@pytest.fixture(autouse=True)
def never_waits() -> Iterator[None]:
    """A wait for the other end of a pipe is a failure, not a test that never ends."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listener(path: Path) -> None:
    with chdir(path.parent), socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


def folder(path: Path) -> None:
    path.mkdir()


def itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [pipe, endless, listener, folder, itself])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "no-file"
    make(path)
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_APPEND | os.O_CREAT, os.O_WRONLY | os.O_CREAT):
        with pytest.raises(OSError, match="no-file") as refused:
            regular.opened(path, flags)
        assert refused.value.filename == str(path)
        assert refused.value.strerror
    with pytest.raises(OSError, match="no-file"):
        regular.content(path)


def test_a_file_is_read_and_made(tmp_path: Path) -> None:
    path = tmp_path / "file"
    os.close(regular.opened(path, os.O_WRONLY | os.O_CREAT))
    assert regular.content(path) == b""
    path.write_bytes(b"\0\xff\n" * 100_000)
    (tmp_path / "link").symlink_to(path)
    assert regular.content(tmp_path / "link") == path.read_bytes()


@pytest.mark.parametrize("name", ["file", "file.part"])
@pytest.mark.parametrize("make", [pipe, endless, listener, itself])
def test_a_file_takes_the_place_of_what_is_none(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    make(tmp_path / name)
    regular.replace(tmp_path / "file", b"new")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["file", "file.part"])
def test_a_file_is_written_through_no_link(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"precious")
    (tmp_path / name).symlink_to(theirs)
    regular.replace(tmp_path / "file", b"new")
    assert theirs.read_bytes() == b"precious"
    assert (tmp_path / "file").read_bytes() == b"new"

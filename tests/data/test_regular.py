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

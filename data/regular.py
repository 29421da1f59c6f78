"""Regular files: nothing waits for the other end of a pipe, nothing is written through a link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def opened(path: Path, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a regular file, opened without waiting; a new one has mode 0644.

    Raises:
        OSError: it cannot be opened, or is something else than a regular file.
    """
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return handle
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def content(path: Path) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: as `opened`.
    """
    with open(opened(path), "rb") as file:
        return file.read()


def replace(path: Path, content: bytes, partial: Path | None = None) -> None:
    """Write a file so that it is there whole or as it was; of a link only the link goes.

    Args:
        partial: what it is called until it is whole, `path` with `.part` behind it unless given.

    Raises:
        OSError: it cannot be written, or is a folder.
    """
    partial = path.with_name(path.name + ".part") if partial is None else partial
    partial.unlink(missing_ok=True)
    with open(partial, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

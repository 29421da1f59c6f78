"""Opening what must be a regular file: to open a pipe may wait for ever, to read a device too."""

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

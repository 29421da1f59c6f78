"""Where a command may write a picture."""

from __future__ import annotations

import os

_ENDINGS = (".png", ".pdf", ".svg", ".jpg")


def check(path: str) -> None:
    """See before minutes of work that a picture can be written to `path`.

    matplotlib would write elsewhere: to `fifo.png` for `fifo`.

    Raises:
        ValueError: it is no file of a kind that matplotlib draws, or there is no such folder.
    """
    folder, name = os.path.split(path)
    if os.path.splitext(name)[1].lower() not in _ENDINGS or os.path.isdir(path):
        raise ValueError(
            f"--figure is {path[:200]!r}; it must be a file whose name ends in one of "
            f"{', '.join(_ENDINGS)}"
        )
    if not os.path.isdir(folder or "."):
        raise ValueError(f"--figure is {path[:200]!r}; there is no folder {folder[:200]!r}")

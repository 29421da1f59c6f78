"""Files that a run adds lines to, metrics.jsonl and log.txt. Light: nothing here imports torch.

metrics.jsonl holds one JSON object a line: of a training step (`step`, `loss`, …) or of an
evaluation (`step`, `val_loss`, …).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data import regular

# What an evaluation tells, by the key of its row.
METRICS = {
    "val_loss": "validation loss",
    "val_bpb": "bits per byte",
    "val_accuracy": "accuracy",
}
_BEGIN = b'{"step": '  # of each row that a run writes


def rows(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of metrics.jsonl, with its end, and its row; None where it is no row.

    A row is a mapping with a whole number as its `step`.
    """
    for line in content.splitlines(keepends=True):
        row = _parse(line)
        yield line, row if isinstance(row, dict) and type(row.get("step")) is int else None


def evaluations(content: bytes) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that are evaluations; what they tell is a number each."""
    return [
        row
        for _, row in rows(content)
        if row is not None
        and "val_loss" in row
        and all(type(row[key]) in (int, float) for key in METRICS.keys() & row.keys())
    ]


class Lines:
    """A file of whole lines: what cannot be written now is written with the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._handle: int | None = None

    def add(self, line: str) -> None:
        """Add a line, which ends with a line end.

        Raises:
            OSError: it cannot be written now; it waits in memory.
        """
        self._waiting.append(line)
        if self._handle is None:
            self._handle = regular.opened(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        before = os.fstat(self._handle).st_size
        # The name of a file that is not UTF-8 must not keep back every line after it.
        block = "".join(self._waiting).encode(errors="backslashreplace")
        if before and os.pread(self._handle, 1, before - 1) != b"\n":
            block = b"\n" + block  # a line that was cut short stays by itself
        written = os.write(self._handle, block)
        if written < len(block):
            # No half lines: the disk took a part and has no room for the rest.
            os.ftruncate(self._handle, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._waiting.clear()

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class Rows(Lines):
    """metrics.jsonl: no row of a step stands in it twice.

    Rows of steps that will be made again are taken out first. Until that has worked, new rows
    wait in memory.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._last: int | None = None  # rows after this step are still to be taken out

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Take out the rows after `step`, and what a kill left of a row; keep what is no row.

        What cannot be taken out now is tried again before the next row is written.

        Returns:
            The evaluations up to `step`.

        Raises:
            OSError: the file cannot be read.
        """
        self.close()
        self._waiting = [
            line
            for line in self._waiting
            for _, row in rows(line.encode())
            if row is not None and row["step"] <= step
        ]
        self._last = step if self._last is None else min(step, self._last)
        kept = self._kept(self._content())
        with suppress(OSError):
            self._take_out()
        return evaluations(kept + "".join(self._waiting).encode())

    def add(self, line: str) -> None:
        if self._last is not None:
            try:
                self._take_out()
            except OSError:
                self._waiting.append(line)
                raise
        super().add(line)

    def _content(self) -> bytes:
        return regular.content(self.path) if self.path.exists() else b""

    def _kept(self, content: bytes) -> bytes:
        """What stays in the file."""
        assert self._last is not None
        kept = []
        for line, row in rows(content):
            cut_short = not line.endswith(b"\n") and line.startswith(_BEGIN) and row is None
            if not cut_short and (row is None or row["step"] <= self._last):
                kept.append(line)
        return b"".join(kept)

    def _take_out(self) -> None:
        content = self._content()
        kept = self._kept(content)
        if not content.startswith(kept):
            _replace(self.path.resolve(), kept)
        elif len(kept) < len(content):
            os.truncate(self.path, len(kept))  # which needs no room on the disk
        self._last = None


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def _replace(path: Path, content: bytes) -> None:
    """Write the new content of a file beside it, and put that in its place."""
    part = path.with_name(".metrics.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, "xb") as file:
            file.write(content)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise

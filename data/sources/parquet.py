"""Parquet files: each row is one document."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data.settings import ConfigError
from data.sources.document import Document, of_row
from data.sources.packed import PACKED, opened


def read(name: str, path: Path, text_field: str) -> Iterator[Document]:
    import datasets

    with tempfile.TemporaryDirectory() as folder:
        if path.suffix in PACKED:
            plain = Path(folder) / "plain.parquet"
            with opened(path) as stream, open(plain, "wb") as out:
                while block := stream.read(1 << 20):
                    out.write(block)
            path = plain
        # A path with glob characters of its own must not be read as a pattern.
        rows = datasets.load_dataset(
            "parquet", data_files=glob.escape(str(path)), split="train", streaming=True
        )
        columns = rows.column_names
        if columns is not None and text_field not in columns:
            raise ConfigError(
                f"{name} has no column {text_field}; data.text_field must be one of "
                f"{', '.join(columns)}"
            )
        for number, row in enumerate(rows.select_columns([text_field])):
            yield of_row(f"{name}:{number}", row, text_field)

"""Parquet files: each row is one document."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data.settings import ConfigError
from data.sources.document import Document, of_row
from data.sources.packed import PACKED, opened

# Read at once. Left to datasets, it is what the first row group has: that may be none.
_ROWS = 1000


def read(name: str, path: Path, text_field: str) -> Iterator[Document]:
    import datasets
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        if path.suffix in PACKED:
            plain = Path(folder) / "plain.parquet"
            with opened(path) as stream, open(plain, "wb") as out:
                while block := stream.read(1 << 20):
                    out.write(block)
            path = plain
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
        if text_field not in columns:
            raise ConfigError(
                f"{name} has no column {text_field}; data.text_field must be one of "
                f"{', '.join(columns)}"
            )
        # A path with glob characters of its own must not be read as a pattern.
        rows = datasets.load_dataset(
            "parquet",
            data_files=glob.escape(str(path)),
            split="train",
            streaming=True,
            batch_size=_ROWS,
        )
        for number, row in enumerate(rows.select_columns([text_field])):
            yield of_row(f"{name}:{number}", row, text_field)

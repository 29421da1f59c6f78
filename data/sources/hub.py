"""Data sets of a hub: each row is one document."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from data.settings import ConfigError
from data.sources.document import Document, of_row


def read(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    streaming: bool,
    text_field: str,
    first: int,
) -> Iterator[Document]:
    import datasets

    # A hub that is not reached is said once below, not at each of its tries.
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(
            name,
            config,
            split=split,
            revision=revision,
            streaming=streaming,
        )
        columns = rows.column_names
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"data.source is {name}; no file, and no data set that can be read ({reason})"
        ) from None
    finally:
        logger.setLevel(level)
    if columns is not None and text_field not in columns:
        raise ConfigError(
            f"{name} has no column {text_field}; data.text_field must be one of "
            f"{', '.join(columns)}"
        )
    for number, row in enumerate(rows.skip(first) if first else rows, first):
        yield of_row(f"{name}:{number}", row, text_field)

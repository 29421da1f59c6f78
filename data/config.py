"""The settings of the data room: what the corpus is, and how it becomes a stream."""

# ruff: noqa: RUF009  `setting` makes a field
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from data.settings import ConfigError, setting

Packing = Literal["balanced", "sequential", "best_fit"]


@dataclass
class DataConfig:
    """Which text, which tokenizer, where the prepared corpus lives (keys `data.*`)."""

    source: str | list[Any] | dict[str, Any] = setting(
        "stdlib", "stdlib, a file or glob, a hub data set, or a list of mappings with weights"
    )
    text_field: str = setting("text", "column of JSONL, Parquet and hub sources with the text")
    root: str = setting("corpora", "folder of prepared corpora, shared by all runs")
    tokenizer: str | None = setting(
        None, "a .model or tokenizer.json to use; null trains one on a sample of the corpus"
    )
    vocab_size: int = setting(6144, "pieces of a tokenizer trained here")
    workers: int = setting(0, "processes that tokenise; 0 is one a CPU")
    validation: float = setting(0.02, "share of documents held out, chosen by their content")
    packing: Packing = setting("balanced", "balanced, sequential or best_fit")

    def __post_init__(self) -> None:
        if self.vocab_size < 512:
            raise ConfigError(
                f"data.vocab_size is {self.vocab_size}; 256 bytes and the control pieces "
                "leave no room for words below 512"
            )
        if not 0 <= self.validation < 1:
            raise ConfigError(f"data.validation is {self.validation}; it must be in [0, 1)")
        if self.workers < 0:
            raise ConfigError(f"data.workers is {self.workers}; it must be 0 or more")


@dataclass
class StreamConfig:
    """The shape of the stream (keys `train.*`; the training room's settings inherit them)."""

    batch_tokens: int = setting(16384, "tokens of one batch, over all ranks")
    seq_len: int = setting(2048, "longest sequence in tokens; longer documents are cut")
    seed: int = setting(0, "seed of the order of documents and of the initial weights")

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ConfigError(f"train.seq_len is {self.seq_len}; it must be 2 or more")
        if self.batch_tokens < self.seq_len:
            raise ConfigError(
                f"train.batch_tokens is {self.batch_tokens}, less than train.seq_len = "
                f"{self.seq_len}; raise the one or lower the other"
            )

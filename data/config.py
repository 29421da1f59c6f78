"""The settings of the data room: what the corpus is, and how it becomes a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from data import sources
from data.settings import ConfigError, setting, with_absolute_paths
from data.sources.weight import shortened, weight

MOST_TOKENS = 1 << 30  # of a batch: kernels count its tokens in 32 bits
MOST_PIECES = 1 << 24  # of a vocabulary
RECALL = "recall"  # what `data.source` names the synthetic task
Packing = Literal["balanced", "sequential", "best_fit"]
_STAGE_KEYS = ("step", "seq_len", "weights", "long_weight")
_MOST = 1 << 40  # steps, tokens of a sequence


@dataclass
class RecallConfig:
    """The task of `data.source: recall` (keys `data.recall.*`)."""

    pairs: int = setting(32, "pairs of key and value that a sequence begins with", least=1)
    fewest: int | None = setting(
        None, "training: sequences have from so many pairs on (null: all have as many)", least=1
    )
    queries: int = setting(64, "queries after the pairs, each for any of them", least=1)
    keys: int = setting(64, "different keys", least=1, most=1 << 20)
    values: int = setting(64, "different values", least=2, most=1 << 20)
    power: float | None = setting(
        None,
        "asked soon: a query's place has probability place^(power − 1) (null: anywhere)",
        above=0,
        most=100,
    )

    def __post_init__(self) -> None:
        for key, most in (("pairs", "keys"), ("fewest", "pairs")):
            value, limit = getattr(self, key), getattr(self, most)
            if value is not None and not 1 <= value <= limit:
                raise ConfigError(
                    f"data.recall.{key} is {value}; it must be from 1 to data.recall.{most}, "
                    f"{limit}"
                )


@dataclass
class DataConfig:
    """Which text, which tokenizer, where the prepared corpus lives (keys `data.*`)."""

    source: str | list[Any] | dict[str, Any] = setting(
        "stdlib",
        "stdlib, a file, folder or glob, a hub data set, or a list of mappings: see data/; "
        "or recall, a synthetic task",
        path=True,
    )
    text_field: str = setting("text", "column of JSONL, Parquet and hub sources with the text")
    root: str = setting("corpora", "folder of prepared corpora, shared by all runs", path=True)
    tokenizer: str | None = setting(
        None,
        "a .model or tokenizer.json to use; null trains one on a sample of the corpus",
        path=True,
    )
    # 256 bytes and the control pieces leave no room for words in fewer.
    vocab_size: int = setting(
        6144, "pieces of a tokenizer trained here", least=512, most=MOST_PIECES
    )
    model_type: Literal["bpe", "unigram"] = setting(
        "bpe", "kind of SentencePiece model trained here: bpe or unigram"
    )
    normalize: bool = setting(False, "bring text to Unicode NFC first; decoding then gives that")
    workers: int = setting(0, "processes that tokenise; 0 is one a CPU", least=0, most=1024)
    max_broken: float = setting(
        0.1, "share of a source's documents that may be empty, not UTF-8 or broken", least=0, most=1
    )
    validation: float = setting(
        0.02, "share of documents held out, chosen by their content", least=0, below=1
    )
    packing: Packing = setting("balanced", "balanced, sequential or best_fit")
    long_tokens: int = setting(
        0, "documents of so many tokens or more count as long; 0 is none", least=0, most=MOST_TOKENS
    )
    long_weight: float = setting(
        1.0, "how much more often long documents are seen", least=0, most=1e6
    )
    stages: list[dict[str, Any]] = setting(
        [], "changes at a step: mappings of step, and seq_len, weights (by source) or long_weight"
    )
    recall: RecallConfig = field(default_factory=RecallConfig)

    def __post_init__(self) -> None:
        if self.long_weight != 1 and not self.long_tokens:
            raise ConfigError("data.long_weight needs data.long_tokens, which says what is long")
        self.stages = [
            _stage(f"data.stages[{number}]", stage) for number, stage in enumerate(self.stages)
        ]
        if any("long_weight" in stage for stage in self.stages) and not self.long_tokens:
            raise ConfigError("data.stages: long_weight needs data.long_tokens")
        if self.stages and self.source == RECALL:
            raise ConfigError("data.stages is given; with data.source: recall there are no stages")

    def to_dict(self) -> dict[str, Any]:
        """Every setting, with paths that mean the same in another working directory."""
        whole = with_absolute_paths(self)
        whole["source"] = self.source if self.source == RECALL else sources.absolute(self.source)
        return whole

    def weights(self) -> list[float] | None:
        """The weights of the sources in their order; None where they weigh what they hold."""
        entries = self.source if isinstance(self.source, list) else [self.source]
        found = [entry.get("weight") if isinstance(entry, dict) else None for entry in entries]
        if all(given is None for given in found):
            return None
        return [weight(given or 0, "data.source: weight") for given in found]

    def check_names(self, sources: list[str]) -> None:
        """Refuse a stage that weighs a source which there is not."""
        for number, stage in enumerate(self.stages):
            for name in stage.get("weights", {}):
                if name not in sources:
                    raise ConfigError(
                        f"data.stages[{number}]: weight of {name}: no such source; they are "
                        f"{', '.join(sources)}"
                    )


def _stage(where: str, stage: dict[str, Any]) -> dict[str, Any]:
    """A stage of `data.stages` with its values checked, and as the types that they are."""
    for key in stage:
        if key not in _STAGE_KEYS:
            raise ConfigError(f"{where}: {key}: no such key; {', '.join(_STAGE_KEYS)} are")
    if stage.get("step") is None:
        raise ConfigError(f"{where}: step must be given, 0 or more")
    made: dict[str, Any] = {}
    for key, value in stage.items():
        if key == "weights":
            made[key] = _weights(f"{where}: {key}", value)
        elif key == "long_weight":
            made[key] = weight(value, f"{where}: {key}")
        else:
            least = 0 if key == "step" else 2
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
                raise ConfigError(
                    f"{where}: {key} is {shortened(value)}; it must be a whole number, {least} "
                    "or more"
                )
            made[key] = value
    return made


def _weights(where: str, given: Any) -> dict[str, float]:
    if not isinstance(given, dict):
        raise ConfigError(f"{where} is {shortened(given)}; it must be a mapping of sources")
    found = {str(name): weight(value, f"{where}: {name}") for name, value in given.items()}
    if not any(found.values()):
        raise ConfigError(f"{where}: all weights are 0; give at least one source a weight above 0")
    return found


@dataclass
class StreamConfig:
    """The shape of the stream (keys `train.*`; the training room's settings inherit them)."""

    batch_tokens: int = setting(
        16384, "tokens of one batch, over all ranks", least=2, most=MOST_TOKENS
    )
    seq_len: int = setting(2048, "longest sequence in tokens; longer documents are cut", least=2)
    seed: int = setting(0, "seed of the order of documents and of the initial weights", least=0)
    accumulate: int = setting(1, "batches of one optimiser step", least=1, most=1 << 16)

    def __post_init__(self) -> None:
        if self.batch_tokens < self.seq_len:
            raise ConfigError(
                f"train.batch_tokens is {self.batch_tokens}, less than train.seq_len = "
                f"{self.seq_len}; raise the one or lower the other"
            )


def seq_len_at(data: DataConfig, stream: StreamConfig, step: int) -> int:
    """The longest sequence in tokens that optimiser step `step`, counted from 0, trains on."""
    begun = [stage for stage in data.stages if stage["step"] <= step and "seq_len" in stage]
    in_order = sorted(begun, key=lambda stage: stage["step"])
    return in_order[-1]["seq_len"] if begun else stream.seq_len


def longest_seq_len(data: DataConfig, stream: StreamConfig, steps: int | None = None) -> int:
    """The longest sequence in tokens of the first `steps` optimiser steps (None: of all)."""
    begins = [stage["step"] for stage in data.stages if steps is None or stage["step"] < steps]
    return max(seq_len_at(data, stream, step) for step in (0, *begins))

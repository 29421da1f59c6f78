"""Text to tokens to a stream of batches (DESIGN.md, "One cursor").

    corpus = prepare(DataConfig())                    # prepares what is missing
    for batch in Batches(corpus, StreamConfig(), DataConfig()): …

Files, in the order that text passes through them: `sources` reads documents, `tokenizer`
codes them, `prepare` stores them, `corpus` maps what is stored, `order` says which
document is next, `packing` which batch it lies in, `stream` gives out the batches.
"""

from data.config import DataConfig, StreamConfig
from data.corpus import Corpus
from data.prepare import prepare
from data.settings import ConfigError
from data.stream import Batch, Batches, Cursor, validation_batches

__all__ = [
    "Batch",
    "Batches",
    "ConfigError",
    "Corpus",
    "Cursor",
    "DataConfig",
    "StreamConfig",
    "prepare",
    "validation_batches",
]

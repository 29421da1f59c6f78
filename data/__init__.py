"""Text to tokens to a stream of batches (DESIGN.md, "One cursor").

    corpus = prepare(DataConfig())                    # prepares what is missing
    for batch in Batches(corpus, StreamConfig(), DataConfig()): …

The files, in the order that text passes through them: `sources` reads documents, `sample`
picks what the `tokenizer` learns from (one made elsewhere is `pieces` and what the files
`beside` it say), `encode` codes in many processes, `store` writes so
that nothing is lost, `prepare` runs these; `corpus` maps what is stored, `order` says
which document is next, `mixture` from which source, `packing` and `balance` which batch its
pieces lie in, `plan` and `stream` give out the batches. `recall` makes batches of a synthetic task
instead; `material` is whichever a run names. `held_out` is what a model is measured on, and
`spelling` turns tokens into text as they come. `python -m data` shows it at work.
"""

from data.batch import Batch, Cursor
from data.config import DataConfig, StreamConfig, longest_seq_len, seq_len_at
from data.corpus import Corpus
from data.held_out import CodedText
from data.material import HeldOut, HeldOutText, Material, material
from data.prepare import prepare
from data.settings import ConfigError
from data.stream import Batches, validation_batches

__all__ = [
    "Batch",
    "Batches",
    "CodedText",
    "ConfigError",
    "Corpus",
    "Cursor",
    "DataConfig",
    "HeldOut",
    "HeldOutText",
    "Material",
    "StreamConfig",
    "longest_seq_len",
    "material",
    "prepare",
    "seq_len_at",
    "validation_batches",
]

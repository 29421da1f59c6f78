"""Text to tokens to a stream of batches (DESIGN.md, "One cursor").

    corpus = prepare(DataConfig())                    # prepares what is missing
    for batch in Batches(corpus, StreamConfig(), DataConfig()): …

The rooms, in the order that text passes through them: `sources/` reads documents, `tokens/` codes
them, `storing/` keeps what is coded, `prepare` runs these; `ordering/` says which tokens come next,
and `stream` gives out the batches. `recall` makes batches of a synthetic task instead; `material`
is whichever a run names. `settings` fills the dataclasses of every room, `regular` opens and
replaces files. `python -m data` shows it at work.
"""

from data.batch import Batch, Cursor
from data.config import DataConfig, StreamConfig, longest_seq_len, seq_len_at
from data.material import HeldOut, HeldOutText, Material, material
from data.prepare import prepare
from data.settings import ConfigError
from data.storing.corpus import Corpus
from data.storing.held_out import CodedText
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

"""The report says what the stream does, stages included."""

from __future__ import annotations

from pathlib import Path

from data import DataConfig, StreamConfig, stats
from tests.data.corpora import numbered


def test_every_stage_is_told(tmp_path: Path) -> None:
    corpus = numbered(tmp_path, {"all": [300] * 40})
    stream = StreamConfig(batch_tokens=512, seq_len=128, accumulate=3)
    data = DataConfig(stages=[{"step": 6, "seq_len": 256}, {"step": 9, "seq_len": 64}])
    made = stats.report(corpus, stream, data)
    assert made["packing"]["seq_len"] == [
        {"step": 0, "seq_len": 128},
        {"step": 6, "seq_len": 256},
        {"step": 9, "seq_len": 64},
    ]
    assert "sequences of at most 128, from step 6 on 256, from step 9 on 64" in stats.text(made)

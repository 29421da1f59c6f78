"""What the settings of the data room mean, and which of them are refused."""

from __future__ import annotations

from data import DataConfig, StreamConfig, longest_seq_len, seq_len_at

STREAM = StreamConfig(batch_tokens=4096, seq_len=128)


def test_a_stage_says_how_long_sequences_are_from_its_step_on() -> None:
    stages = [{"step": 9, "seq_len": 256}, {"step": 4, "seq_len": 512}, {"step": 6}]
    data = DataConfig(stages=stages)
    lengths = [seq_len_at(data, STREAM, step) for step in range(12)]
    assert lengths == [128] * 4 + [512] * 5 + [256] * 3
    for steps in range(1, 13):
        assert longest_seq_len(data, STREAM, steps) == max(lengths[:steps])
    assert longest_seq_len(data, STREAM) == 512
    assert longest_seq_len(DataConfig(), STREAM) == 128


def test_of_two_stages_at_one_step_the_later_one_holds() -> None:
    data = DataConfig(stages=[{"step": 4, "seq_len": 512}, {"step": 4, "seq_len": 256}])
    assert seq_len_at(data, STREAM, 4) == longest_seq_len(data, STREAM) == 256
    assert longest_seq_len(DataConfig(stages=[{"step": 0, "seq_len": 64}]), STREAM) == 64

"""Associative recall: a function of the number of the batch, with answers that can be looked up."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Batch, ConfigError, Cursor, DataConfig, StreamConfig, material
from data.__main__ import Settings, main
from data.config import RecallConfig
from data.recall import Recall, sequences, shortest
from data.settings import build

STREAM = StreamConfig(batch_tokens=4 * 61, seq_len=61, seed=3)
TASK = RecallConfig(pairs=7, queries=20, keys=9, values=5)


def given_as(word: str) -> Settings:
    """The settings that a word behind `data.recall.` makes."""
    key, _, value = word.partition("=")
    return build(Settings, {f"data.recall.{key}": (float(value), "here")}, "here")


def looked_up(tokens: np.ndarray, keys: int) -> list[int]:
    """What a reader of one sequence would answer, token by token; −100 where nothing is asked."""
    known: dict[int, int] = {}
    answers, at = [-100] * len(tokens), 0
    while at < len(tokens):
        token = int(tokens[at])
        if token in known:
            answers[at] = known[token]
        elif 1 <= token <= keys:
            known[token] = int(tokens[at + 1])
            at += 1
        at += 1
    return answers


def rows(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    cuts = batch.cu_seqlens[1:-1]
    return list(zip(np.split(batch.tokens, cuts), np.split(batch.labels, cuts), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    pairs=st.integers(1, 9),
    queries=st.integers(1, 30),
    spare=st.integers(0, 40),
    power=st.sampled_from([None, 0.01, 0.5]),
    fewest=st.sampled_from([None, 1]),
    seed=st.integers(0, 99),
)
def test_every_label_is_the_value_that_was_shown(
    pairs: int, queries: int, spare: int, power: float | None, fewest: int | None, seed: int
) -> None:
    length = shortest(pairs, queries) + spare
    keys, values = np.arange(1, 10), np.arange(10, 16)
    random = np.random.default_rng(seed)
    tokens, labels = sequences(random, 3, length, pairs, queries, keys, values, 0, power, fewest)
    assert tokens.shape == labels.shape == (3, length)
    for sequence, asked in zip(tokens, labels, strict=True):
        assert asked.tolist() == looked_up(sequence, 9)
        assert (asked != -100).sum() == queries
        if fewest is None:
            assert np.isin(sequence, values).sum() == pairs


def test_a_small_power_asks_soon() -> None:
    def mean_place(power: float | None) -> float:
        random = np.random.default_rng(0)
        keys, values = np.arange(1, 9), np.arange(9, 12)
        labels = sequences(random, 200, 217, 8, 4, keys, values, 0, power)[1]
        return float(np.nonzero(labels != -100)[1].mean()) - 17

    assert abs(mean_place(None) - 99.5) < 5
    assert mean_place(0.01) < 50


def test_a_batch_is_a_function_of_its_number_whatever_was_read_before() -> None:
    task = Recall(TASK, STREAM)
    stream = task.batches(Cursor())
    made = list(islice(stream, 6))
    assert stream.peek().digest == task.batch(6).digest
    assert len({batch.digest for batch in made}) == 6
    for number in (1, 4):
        onward = task.batches(made[number - 1].cursor)
        again = next(onward)
        assert again.digest == made[number].digest
        assert again.cursor == made[number].cursor
        assert np.array_equal(again.labels, made[number].labels)
    for batch in made:
        assert batch.targets == 4 * 20
        assert batch.cu_seqlens.tolist() == [0, 61, 122, 183, 244]
        for tokens, labels in rows(batch):
            assert labels.tolist() == looked_up(tokens, 9)


def test_the_validation_set_is_held_out_and_the_same_for_every_seed() -> None:
    task = Recall(TASK, STREAM)
    other = Recall(TASK, StreamConfig(batch_tokens=4 * 61, seq_len=61, seed=4))
    held = list(task.validation(10 * 61))
    assert [len(batch.tokens) // 61 for batch in held] == [4, 4, 2]
    assert [b.digest for b in held] == [b.digest for b in other.validation(10 * 61)]
    assert task.batch(0).digest != other.batch(0).digest
    seen = {tokens.tobytes() for n in range(200) for tokens, _ in rows(task.batch(n))}
    assert not seen & {tokens.tobytes() for batch in held for tokens, _ in rows(batch)}
    (longer,) = task.validation(2 * 122, seq_len=122)
    assert np.diff(longer.cu_seqlens).tolist() == [122, 122]


@pytest.mark.parametrize("change", [{"pairs": 6}, {"keys": 12}, {"fewest": 2}])
def test_a_cursor_of_other_settings_is_refused(change: dict[str, int]) -> None:
    cursor = Recall(TASK, STREAM).batch(2).cursor
    other = RecallConfig(**{**vars(TASK), **change})
    with pytest.raises(ConfigError, match=r"belongs to another stream: restore data\.recall"):
        Recall(other, STREAM).batches(cursor)
    with pytest.raises(ConfigError, match="another stream"):
        Recall(TASK, StreamConfig(batch_tokens=2 * 61, seq_len=61, seed=3)).batches(cursor)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecallConfig(pairs=9, keys=8), "data.recall.pairs is 9; it must be from 1 to"),
        (lambda: given_as("fewest=0"), "data.recall.fewest is 0; it must be at least 1"),
        (lambda: given_as("queries=0"), "data.recall.queries is 0; it must be at least 1"),
        (lambda: given_as("values=1"), "data.recall.values is 1; it must be at least 2"),
        (lambda: given_as("power=0.0"), "data.recall.power is 0.0; it must be above 0"),
        (lambda: Recall(TASK, StreamConfig(batch_tokens=100, seq_len=61)), "a multiple of train"),
        (
            lambda: Recall(TASK, StreamConfig(batch_tokens=60, seq_len=30)),
            "train.seq_len is 30; 7 pairs and 20 queries (data.recall.*) need at least 35",
        ),
    ],
)
def test_what_does_not_fit_says_which_number_to_change(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tokens_are_numbers_in_text() -> None:
    tokenizer = material(DataConfig(source="recall", recall=TASK), STREAM).tokenizer
    assert tokenizer.vocab_size == 1 + 9 + 5
    assert tokenizer.encode("3 14  0") == [3, 14, 0]
    assert tokenizer.decode([3, 14, 0]) == "3 14 0"
    for wrong in ("15", "-1", "three"):
        with pytest.raises(ConfigError, match="the numbers from 0 to 14"):
            tokenizer.encode(f"1 {wrong}")


def test_probes_ask_for_what_was_shown() -> None:
    task, random = Recall(TASK, STREAM), np.random.default_rng(0)
    made = task.recall_probe(random, 5, 40, 9, 10)
    assert made is not None
    for tokens, labels in zip(*made, strict=True):
        assert labels.tolist() == looked_up(tokens, 9)
    assert task.recall_probe(random, 5, 40, 10, 10) is None  # there are but nine keys
    for depth, pair in ((0.0, 0), (0.5, 3), (1.0, 6)):
        made = task.needle_probe(random, 5, 40, depth)
        assert made is not None
        tokens, labels = made
        assert (labels[:, :-1] == -100).all()
        assert np.array_equal(tokens[:, -1], tokens[:, 1 + 2 * pair])
        assert np.array_equal(labels[:, -1], tokens[:, 2 + 2 * pair])
    assert task.needle_probe(random, 5, 15, 0.0) is None


def test_the_data_commands_say_that_there_is_nothing_to_prepare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {source: recall}\n", encoding="utf-8")
    assert main(["prepare", str(path)]) == 2
    assert "nothing needs preparing" in capsys.readouterr().err

"""The stream: every token once an epoch, the same from any cursor, whatever the settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import (
    Batch,
    Batches,
    ConfigError,
    Corpus,
    Cursor,
    DataConfig,
    StreamConfig,
    prepare,
    validation_batches,
)
from data.ordering.plan import Plan
from tests.data.corpora import numbered, small_tokenizer

LENGTHS = np.random.default_rng(5).lognormal(4, 1.3, 120).astype(int).clip(3, 3000).tolist()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return numbered(tmp_path_factory.mktemp("one"), {"all": LENGTHS}, validation=0.1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    sources = {"code": LENGTHS, "prose": [700] * 40, "web": [30] * 500}
    return numbered(tmp_path_factory.mktemp("three"), sources)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Documents that are cut without a rest."""
    return numbered(tmp_path_factory.mktemp("even"), {"all": [4096] * 10})


def weighted(packing: str = "balanced", **keys: Any) -> DataConfig:
    return DataConfig(packing=packing, **keys)  # type: ignore[arg-type]


def read(
    corpus: Corpus, stream: StreamConfig, data: DataConfig, count: int, start: Cursor | None = None
) -> list[Batch]:
    batches = Batches(corpus, stream, data, start)
    made = list(islice(batches, count))
    batches.close()
    return made


def same(one: Batch, other: Batch) -> bool:
    return (
        np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.cu_seqlens, other.cu_seqlens)
        and one.cursor == other.cursor
    )


@pytest.mark.parametrize("packing", ["balanced", "best_fit", "sequential"])
@pytest.mark.parametrize(("size", "seq_len"), [(512, 128), (1000, 999), (4096, 64), (137, 20)])
def test_every_token_is_used_once_an_epoch(
    corpus: Corpus, packing: str, size: int, seq_len: int
) -> None:
    epoch = corpus.sources[0].tokens
    stream = StreamConfig(batch_tokens=size, seq_len=seq_len)
    count = 3 * epoch // size + 1
    made = read(corpus, stream, weighted(packing), count)
    used = np.bincount(
        np.concatenate([batch.tokens for batch in made]), minlength=corpus.token_count
    )
    held = np.zeros(corpus.token_count, dtype=bool)
    for document in corpus.validation:
        held[corpus.offsets[document] : corpus.offsets[document + 1]] = True
    assert (used[held] == 0).all()
    # Three epochs and a batch more, in windows of an epoch at most.
    assert (used[~held] >= 2).all()
    assert (used[~held] <= 4).all()
    assert used.sum() == count * size


@pytest.mark.parametrize("packing", ["balanced", "best_fit", "sequential"])
def test_a_window_that_ends_an_epoch_has_used_all_of_it(tmp_path: Path, packing: str) -> None:
    corpus = numbered(tmp_path, {"all": [50, 14, 64, 128, 200, 56]})
    made = read(corpus, StreamConfig(batch_tokens=64, seq_len=32), weighted(packing), 8 * 3)
    for epoch in range(3):
        tokens = np.concatenate([batch.tokens for batch in made[8 * epoch : 8 * epoch + 8]])
        assert np.array_equal(np.sort(tokens), np.arange(512))


@pytest.mark.parametrize("packing", ["balanced", "best_fit", "sequential"])
def test_sequences_are_documents_or_pieces_in_order(corpus: Corpus, packing: str) -> None:
    stream = StreamConfig(batch_tokens=700, seq_len=100)
    made = read(corpus, stream, weighted(packing), corpus.sources[0].tokens // 2 // 700)
    edges = set(corpus.offsets.tolist())
    reached: dict[int, int] = {}
    for batch in made:
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == 700
        for first, last in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            tokens, labels = batch.tokens[first:last], batch.labels[first:last]
            assert 1 <= len(tokens) <= 100
            assert (np.diff(tokens) == 1).all()  # one run of the storage …
            assert not edges & set(tokens[1:].tolist())  # … inside one document
            assert labels[-1] == -100
            assert np.array_equal(labels[:-1], tokens[1:])
            document = int(np.searchsorted(corpus.offsets, tokens[0], side="right"))
            assert reached.get(document, 0) <= tokens[0]
            reached[document] = int(tokens[-1])
        assert batch.targets == (batch.labels != -100).sum()


@pytest.mark.parametrize("packing", ["balanced", "best_fit", "sequential"])
def test_every_cursor_goes_on_with_the_very_next_batch(corpus: Corpus, packing: str) -> None:
    stream = StreamConfig(batch_tokens=512, seq_len=128, seed=3)
    data = weighted(packing)
    whole = read(corpus, stream, data, 3 * corpus.sources[0].tokens // 512)
    for i, batch in enumerate(whole[:-1]):
        saved = json.loads(json.dumps(batch.cursor.to_dict()))
        cursor = Cursor.from_dict(saved)
        assert cursor == batch.cursor
        assert same(read(corpus, stream, data, 1, cursor)[0], whole[i + 1])


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_stopping_anywhere_any_number_of_times_changes_nothing(
    mixed: Corpus, data: st.DataObject
) -> None:
    stream = StreamConfig(
        batch_tokens=data.draw(st.integers(150, 900)), seq_len=20, seed=data.draw(st.integers(0, 9))
    )
    stages = [
        {"step": 3, "seq_len": 17},
        {"step": 11, "long_weight": 4.0, "weights": {"code": 1, "prose": 1, "web": 0.5}},
        {"step": 20, "seq_len": 24, "long_weight": 0.5},
    ]
    config = DataConfig(stages=stages, long_tokens=200)
    whole = read(mixed, stream, config, 30)
    cursor = Cursor()
    found: list[Batch] = []
    while len(found) < 30:
        found += read(mixed, stream, config, data.draw(st.integers(1, 9)), cursor)
        cursor = found[-1].cursor
    assert all(same(one, other) for one, other in zip(whole, found, strict=False))


def test_peeking_takes_nothing(corpus: Corpus) -> None:
    stream = StreamConfig(batch_tokens=512, seq_len=128)
    batches = Batches(corpus, stream, DataConfig())
    first = batches.peek()
    assert batches.peek() is first
    assert batches.cursor == Cursor()
    assert next(batches) is first
    assert batches.cursor == first.cursor
    assert batches.peek().digest != first.digest
    batches.close()


@pytest.mark.parametrize("ahead", [1, 50])
def test_how_far_is_read_ahead_changes_nothing(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    stream = StreamConfig(batch_tokens=512, seq_len=128)
    wanted = read(corpus, stream, DataConfig(), 40)
    monkeypatch.setattr("data.stream._AHEAD", ahead)
    found = read(corpus, stream, DataConfig(), 40)
    assert all(same(one, other) for one, other in zip(wanted, found, strict=True))


def test_seed_epoch_and_corpus_decide_the_order(corpus: Corpus) -> None:
    stream = StreamConfig(batch_tokens=512, seq_len=128)
    other = dataclasses.replace(stream, seed=1)
    assert read(corpus, stream, DataConfig(), 1)[0].digest == (
        read(corpus, stream, DataConfig(), 1)[0].digest
    )
    assert read(corpus, stream, DataConfig(), 1)[0].digest != (
        read(corpus, other, DataConfig(), 1)[0].digest
    )


def test_another_corpus_seed_or_shape_is_refused_with_one_line(
    corpus: Corpus, mixed: Corpus
) -> None:
    stream = StreamConfig(batch_tokens=512, seq_len=128)
    cursor = read(corpus, stream, DataConfig(), 3)[-1].cursor
    with pytest.raises(ConfigError, match="another stream"):
        Batches(mixed, stream, DataConfig(), cursor)
    with pytest.raises(ConfigError, match="another stream"):
        Batches(corpus, dataclasses.replace(stream, seed=1), DataConfig(), cursor)
    for changed in ({"batch_tokens": 600}, {"seq_len": 64}):
        with pytest.raises(ConfigError, match="inside a window"):
            Batches(corpus, dataclasses.replace(stream, **changed), DataConfig(), cursor)
    with pytest.raises(ConfigError, match="inside a window"):
        Batches(corpus, stream, DataConfig(packing="sequential"), cursor)


@pytest.mark.parametrize("step", [4, 3, 1, 79, 200])
def test_a_stage_added_later_begins_at_its_step(corpus: Corpus, step: int) -> None:
    """At once if that is over; what is left of the window that it ends is passed over."""
    stream = StreamConfig(batch_tokens=512, seq_len=128)
    whole = read(corpus, stream, DataConfig(), 100)
    cursor = whole[2].cursor
    later = DataConfig(stages=[{"step": step, "seq_len": 32}])
    found = read(corpus, stream, later, 97, cursor)
    first = max(step, 3)
    for old, new in zip(whole[3 : min(first, cursor.window)], found, strict=False):
        assert old.digest == new.digest
    assert all(np.diff(batch.cu_seqlens).max() <= 32 for batch in found[first - 3 :])
    batches = Batches(corpus, stream, later, cursor)
    left = [batch for batch in whole if first <= batch.cursor.batches - 1 < cursor.window]
    assert batches.passed_over == 512 * len(left)
    assert batches.promised == whole[3].digest
    assert (batches.peek().digest == batches.promised) == (step > 3)
    batches.close()


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_stage_keeps_its_step_whatever_becomes_of_accumulate(
    even: Corpus, data: st.DataObject
) -> None:
    """Runs of some steps each, as a resumed run has them, each with an `accumulate` of its own."""
    steps = sorted(data.draw(st.sets(st.integers(1, 30), min_size=1, max_size=3)))
    lengths = dict(zip([0, *steps], [16, 64, 32, 128], strict=False))
    config = weighted("sequential")
    config.stages = [{"step": step, "seq_len": lengths[step]} for step in steps]
    cursor, done = Cursor(), 0
    while done < 34:
        accumulate = data.draw(st.integers(1, 5))
        run = data.draw(st.integers(1, 12))
        stream = StreamConfig(batch_tokens=256, seq_len=16, accumulate=accumulate)
        made = read(even, stream, config, run * accumulate, cursor)
        for batch, number in zip(made, range(run * accumulate), strict=True):
            step = done + number // accumulate
            wanted = lengths[max(first for first in lengths if first <= step)]
            assert (np.diff(batch.cu_seqlens) == wanted).all()
        done += run
        cursor = Cursor.from_dict(json.loads(json.dumps(made[-1].cursor.to_dict())))
        assert cursor.batches >= done == cursor.steps


def test_a_cursor_from_before_steps_were_counted_goes_on(corpus: Corpus) -> None:
    stream = StreamConfig(batch_tokens=512, seq_len=64, accumulate=2)
    data = DataConfig(stages=[{"step": 8, "seq_len": 128}])
    whole = read(corpus, stream, data, 24)
    for place in (3, 7, 15):
        saved = whole[place].cursor.to_dict()
        del saved["steps"], saved["part"]
        if not saved["batch"]:  # it did not know of the next window
            saved["window"] = saved["shape"] = 0
        cursor = Cursor.from_dict(saved)
        assert same(read(corpus, stream, data, 1, cursor)[0], whole[place + 1])
    changed = dataclasses.replace(stream, accumulate=4)
    (first, second) = (read(corpus, changed, data, 30, whole[at].cursor) for at in (3, 15))
    longest = [int(np.diff(batch.cu_seqlens).max()) > 64 for batch in first]
    assert longest == [False] * 24 + [True] * 6  # six steps more of four batches
    assert all(np.diff(batch.cu_seqlens).max() > 64 for batch in second)


def test_stages_begin_at_their_step(corpus: Corpus) -> None:
    stream = StreamConfig(batch_tokens=512, seq_len=32, accumulate=2)
    data = DataConfig(stages=[{"step": 5, "seq_len": 128}, {"step": 8, "seq_len": 512}])
    made = read(corpus, stream, data, 24)
    longest = [int(np.diff(batch.cu_seqlens).max()) for batch in made]
    assert max(longest[:10]) <= 32
    assert 32 < max(longest[10:16]) <= 128
    assert 128 < max(longest[16:]) <= 512


def source_of(corpus: Corpus, batches: list[Batch]) -> np.ndarray:
    """Tokens of each source in the batches."""
    counts = [source["documents"] for source in corpus.manifest["sources"]]
    edges = corpus.offsets[np.cumsum(counts)]
    tokens = np.concatenate([batch.tokens for batch in batches])
    return np.bincount(np.searchsorted(edges, tokens, side="right"), minlength=len(counts))


def test_the_mixture_is_the_one_asked_for(mixed: Corpus) -> None:
    stream = StreamConfig(batch_tokens=1000, seq_len=100)
    found = source_of(mixed, read(mixed, stream, DataConfig(), 60))
    held = np.array([source.tokens for source in mixed.sources])
    assert found / found.sum() == pytest.approx(held / held.sum(), abs=0.03)
    stages = [{"step": 0, "weights": {"code": 1, "prose": 2, "web": 5}}]
    found = source_of(mixed, read(mixed, stream, DataConfig(stages=stages), 64))
    assert found / found.sum() == pytest.approx([0.125, 0.25, 0.625], abs=0.03)
    stages = [{"step": 0, "weights": {"prose": 1}}]
    found = source_of(mixed, read(mixed, stream, DataConfig(stages=stages), 64))
    assert found.tolist() == [0, 64000, 0]


def test_long_documents_are_seen_as_often_as_asked(tmp_path: Path) -> None:
    corpus = numbered(tmp_path, {"all": [100] * 300 + [1000] * 30})
    stream = StreamConfig(batch_tokens=1000, seq_len=500)
    made = read(corpus, stream, DataConfig(long_tokens=1000, long_weight=3.0), 60)
    tokens = np.concatenate([batch.tokens for batch in made])
    assert (tokens >= 30_000).mean() == pytest.approx(0.75, abs=0.01)


def test_the_number_of_the_document_in_a_cursor_may_pass_32_bits(corpus: Corpus) -> None:
    stream = StreamConfig(batch_tokens=512, seq_len=128)
    far = dataclasses.replace(
        read(corpus, stream, DataConfig(), 1)[0].cursor,
        batches=10**12,
        batch=0,
        window=0,
        positions=(2**40,),
        shape=0,
    )
    made = read(corpus, stream, DataConfig(), 5, far)
    assert made[-1].cursor.batches == 10**12 + 5


def test_validation_is_the_same_for_every_seed_and_never_trained_on(corpus: Corpus) -> None:
    made = list(validation_batches(corpus, StreamConfig(batch_tokens=512, seq_len=64, seed=1)))
    again = list(validation_batches(corpus, StreamConfig(batch_tokens=512, seq_len=64, seed=2)))
    assert [batch.digest for batch in made] == [batch.digest for batch in again]
    tokens = np.concatenate([batch.tokens for batch in made])
    held = np.concatenate(
        [np.arange(corpus.offsets[d], corpus.offsets[d + 1]) for d in corpus.validation]
    )
    assert np.array_equal(tokens, held)
    assert all(len(batch.tokens) == 512 for batch in made[:-1])
    assert all(np.diff(batch.cu_seqlens).max() <= 64 for batch in made)
    short = list(validation_batches(corpus, StreamConfig(batch_tokens=512, seq_len=64), 700))
    assert np.array_equal(np.concatenate([batch.tokens for batch in short]), tokens[:700])


def test_an_error_while_reading_ahead_reaches_the_reader(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Iterator[Batch]:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Corpus, "gather", broken)
    batches = Batches(corpus, StreamConfig(batch_tokens=512, seq_len=128), DataConfig())
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
    batches.close()


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ({"step": 1, "seqlen": 4}, "seqlen: no such key"),
        ({"seq_len": 4}, "step must be given"),
        ({"step": 1, "seq_len": "4"}, "must be a whole number, 2 or more"),
        ({"step": 1, "long_weight": 4}, "needs data.long_tokens"),
        ({"step": -1}, "step is -1; it must be a whole number, 0 or more"),
        ({"step": True}, "step is true; it must be a whole number"),
        ({"step": None}, "step must be given"),
        ({"step": 10**400}, "step is .*; it must be a whole number"),
        ({"step": 1, "seq_len": 1}, "seq_len is 1; it must be a whole number, 2 or more"),
        ({"step": 1, "seq_len": 2.5}, "seq_len is 2.5; it must be a whole number"),
        ({"step": 1, "long_weight": -1}, "long_weight is -1; it must be a number"),
        ({"step": 1, "weights": [1]}, "weights is .1.; it must be a mapping of sources"),
        ({"step": 1, "weights": {}}, "all weights are 0"),
        ({"step": 1, "weights": {"a": 0, "b": "0"}}, "all weights are 0"),
        *[
            ({"step": 1, "weights": {"a": 1, "b": bad}}, "weights: b is .*; it must be a number")
            for bad in (-1, "much", float("inf"), float("nan"), True, None, [1], 10**400, 1e300)
        ],
    ],
)
def test_a_wrong_stage_is_named(stage: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as raised:
        DataConfig(stages=[stage])
    assert len(str(raised.value)) < 300
    assert "\n" not in str(raised.value)


def test_stages_of_recall_are_refused_not_passed_over() -> None:
    with pytest.raises(ConfigError, match=r"with data.source: recall there are no stages"):
        DataConfig(source="recall", stages=[{"step": 1, "seq_len": 64}])


def test_a_dozen_sources_of_one_file_name_have_the_weights_asked_for(tmp_path: Path) -> None:
    """The last of 12 at 7: seven eighteenths of the tokens."""
    paths = []
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        paths.append(tmp_path / str(number) / "train.txt")
        paths[-1].write_text(f"{number} " * 400)
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer().model)
    entries = [{"path": str(path), "weight": 7 if path == paths[-1] else 1} for path in paths]
    data = DataConfig(
        source=entries,
        root=str(tmp_path / "corpora"),
        tokenizer=str(tmp_path / "tokenizer.model"),
        validation=0,
        workers=1,
    )
    corpus = prepare(data)
    names = [source.name for source in corpus.sources]
    assert len(set(names)) == 12
    stream = StreamConfig(batch_tokens=512, seq_len=128)
    plan = Plan(corpus, stream, data)
    assert len({deck.key for deck in plan.decks}) == 12
    window = plan.window(Cursor())
    tokens = np.bincount(window.deck, window.documents.length)
    # Each share is rounded to whole tokens.
    wanted = tokens.sum() * np.array([1] * 11 + [7]) / 18
    assert tokens == pytest.approx(wanted, abs=12)
    # Another stage turns it round, by these names.
    later = [{"step": 0, "weights": {names[-1]: 1, names[0]: 3}}]
    plan = Plan(corpus, stream, dataclasses.replace(data, stages=later))
    window = plan.window(Cursor())
    tokens = np.bincount(window.deck, window.documents.length, 12)
    assert tokens == pytest.approx(tokens.sum() * np.array([3] + [0] * 10 + [1]) / 4, abs=1)


def test_a_stage_with_an_unknown_source_or_too_long_sequences_is_named(corpus: Corpus) -> None:
    stream = StreamConfig(batch_tokens=512, seq_len=128)
    for stage, line in (
        ({"step": 1, "weights": {"alll": 1}}, "no such source; they are all"),
        ({"step": 1, "weights": {"all": 0}}, "all weights are 0"),
        ({"step": 1, "seq_len": 513}, "seq_len is 513"),
    ):
        with pytest.raises(ConfigError, match=line):
            Batches(corpus, stream, DataConfig(stages=[stage]))


def test_a_corpus_without_training_documents_is_refused(tmp_path: Path) -> None:
    corpus = numbered(tmp_path, {"all": [10, 10]}, 0.999999999, small_tokenizer())
    with pytest.raises(ConfigError, match="no training documents"):
        Batches(corpus, StreamConfig(), DataConfig())

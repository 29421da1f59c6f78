"""Probes of a text model: made of words of its tokenizer and held-out text, with right answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.probes import TextProbes
from data.storing.corpus import Corpus
from tests.data.corpora import numbered


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return numbered(tmp_path_factory.mktemp("probes"), {"all": [90] * 60}, validation=0.5)


def test_keys_and_values_are_different_words(corpus: Corpus) -> None:
    probes = TextProbes(corpus)
    words = [corpus.tokenizer.decode([t]).strip() for t in [*probes.keys, *probes.values]]
    assert len(words) == len(set([*probes.keys.tolist(), *probes.values.tolist()])) > 8
    assert all(word.isalpha() for word in words)


def test_pairs_come_first_then_held_out_text_then_the_questions(corpus: Corpus) -> None:
    probes = TextProbes(corpus)
    made = probes.recall(np.random.default_rng(0), 6, 70, 4, 3)
    assert made is not None
    held = set(probes.text.tolist())
    for tokens, labels in zip(*made, strict=True):
        known = dict(zip(tokens[1:9:2].tolist(), tokens[2:9:2].tolist(), strict=True))
        assert len(known) == 4
        assert tokens[0] == corpus.tokenizer.bos_id
        assert set(tokens[9:64].tolist()) <= held
        assert np.flatnonzero(labels != -100).tolist() == [64, 66, 68]
        for at in (64, 66, 68):
            assert labels[at] == known[int(tokens[at])] == tokens[at + 1]
    assert probes.recall(np.random.default_rng(0), 6, 14, 4, 3) is None


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_lies_at_its_depth_and_is_asked_for_at_the_end(
    corpus: Corpus, depth: float
) -> None:
    made = TextProbes(corpus).needle(np.random.default_rng(1), 5, 100, depth)
    assert made is not None
    begin = 1 + round(depth * (100 - 1 - 8 - 7))
    for tokens, labels in zip(*made, strict=True):
        needle = tokens[begin : begin + 8].tolist()
        assert tokens[93:].tolist() == needle[:7]
        assert labels[96:].tolist() == needle[4:]
        assert (labels[:96] == -100).all()


def test_without_held_out_text_there_is_no_probe(tmp_path: Path) -> None:
    probes = TextProbes(numbered(tmp_path, {"all": [90] * 10}))
    assert probes.recall(np.random.default_rng(0), 1, 60, 2, 2) is None
    assert probes.needle(np.random.default_rng(0), 1, 60, 0.5) is None

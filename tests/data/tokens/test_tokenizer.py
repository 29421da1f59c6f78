"""Encoding then decoding gives the very text, whatever the text and wherever the model is from."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.settings import ConfigError
from data.tokens.tokenizer import INDENT, NEWLINE, SentencePiece, Tokenizer, load, train
from tests.data.corpora import small_tokenizer

HERE = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
ALL_OF_UNICODE = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
AWKWARD = st.text(
    st.sampled_from(["\n", " ", "\t", "\r", "\0", "▁", "▅", NEWLINE, INDENT, "a", "0", "é", "🙂"])
    | st.characters(exclude_categories=["Cs"])
)


def elsewhere(**options: Any) -> bytes:
    """A model as others train them: normalising, with a dummy prefix."""
    model = io.BytesIO()
    lines = [line for text in HERE for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=700, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=["here", "elsewhere", "tokenizer.json"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "here":
        return train(HERE, 700)
    if request.param == "elsewhere":
        (folder / "given.model").write_bytes(elsewhere(byte_fallback=True))
        return load(folder / "given.model")
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Made(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=letters
    )
    made.train_from_iterator(HERE, trainer)
    made.save(str(folder / "tokenizer.json"))
    return load(folder / "tokenizer.json")


def check(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.byte_lengths()[tokens].sum() == len(text.encode())


@settings(max_examples=150, deadline=None)
@given(text=AWKWARD)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    check(tokenizer, text)


def test_all_of_unicode_comes_back(tokenizer: Tokenizer) -> None:
    check(tokenizer, ALL_OF_UNICODE)
    check(tokenizer, "".join(HERE) * 3)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_text_that_looks_binary_comes_back(content: bytes) -> None:
    tokenizer = small_tokenizer_once()
    check(tokenizer, content.decode("latin-1"))
    check(tokenizer, content.decode("utf-8", "replace"))


def small_tokenizer_once(made: list[SentencePiece] = []) -> SentencePiece:  # noqa: B006
    if not made:
        made.append(small_tokenizer())
    return made[0]


def test_control_pieces_are_never_made_from_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.byte_lengths()[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    controls = {tokenizer.bos_id, tokenizer.eos_id}
    assert not controls & set(tokenizer.encode("<s> </s> <unk> <0x41> <pad> <|endoftext|>"))


def test_digits_are_single_pieces_and_indents_are_not() -> None:
    tokenizer = train(HERE, 700)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("x = 2024\n")]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == ["2", "0", "2", "4"]
    assert len(tokenizer.encode("\n        ")) <= 2


def test_training_is_repeatable() -> None:
    assert train(HERE, 600).model == train(HERE, 600).model
    assert train(HERE, 600, "unigram").model == train(HERE, 600, "unigram").model


def test_a_model_that_loses_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lossy.model").write_bytes(elsewhere(byte_fallback=False))
    with pytest.raises(ConfigError, match="does not give text back"):
        load(tmp_path / "lossy.model")


def test_a_tokenizer_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "</s>"])}
    made = Made(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    (tmp_path / "tokenizer.json").write_text("\ufeff" + made.to_str(), encoding="utf-8")
    check(load(tmp_path / "tokenizer.json"), "a b\n")


@pytest.mark.parametrize("name", ["broken.model", "broken.json", "absent.model"])
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"no tokenizer at all")
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        load(tmp_path / name)
    assert "\n" not in str(raised.value)


DRAW = random.Random(0)
PLAIN = {
    "DNA": ["".join(DRAW.choices("ACGT", k=2000)) for _ in range(20)],
    "proteins": ["".join(DRAW.choices("ACDEFGHIKLMNPQRSTVWY", k=400)) for _ in range(50)],
    "words": [f"w{number}" for number in range(500)],
    "digits": ["".join(DRAW.choices("0123456789", k=300)) for _ in range(20)],
    "line ends": ["\n" * 100] * 50,
    "spaces": [" " * 100] * 50,
    "CR LF": ["\r\n" * 5] * 50,
    "tabs": ["\t" * 50] * 50,
    "NUL": ["\0" * 30] * 30,
    "a letter": ["a"],
    "one letter": ["a" * 1000] * 20,
    "emoji": ["🙂👩‍👩‍👧🇩🇪"] * 50,
    "漢字": ["漢字仮名"] * 30,
    "reserved": ["▁▁"] * 10,
    "nothing": [],
}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", PLAIN)
def test_text_of_any_kind_makes_a_tokenizer(name: str, kind: str) -> None:
    """Whatever a text lacks, spaces above all, the model can spell."""
    made = train(PLAIN[name], 600, kind)
    for text in (*PLAIN[name], *HERE[:2], "\n\n    a b\t漢 ▁ \r\n"):
        check(made, text)


def test_too_few_pieces_for_the_letters_say_how_many_are_needed() -> None:
    letters = "".join(chr(0x4E00 + number) for number in range(700))
    with pytest.raises(ConfigError, match=r"letters alone are 9\d\d pieces: raise it"):
        train([letters] * 20, 512)


def test_what_is_raised_while_text_is_read_comes_out_as_it_was():
    def texts():
        yield "some text " * 100
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(texts(), 600)

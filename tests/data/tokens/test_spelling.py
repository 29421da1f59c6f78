"""Text from tokens as they come: whole characters, each piece at once, and all of it in the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data.recall import Numbers
from data.tokens import tokenizer as tokenizers
from data.tokens.spelling import spell
from data.tokens.tokenizer import HuggingFace, Tokenizer

TEXT = "def f(x):\n    return '漢字🙂 é' + \"\t\U0010fffd\"  # 12\n\n"


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: pieces of letters, `<0x0A>` for bytes, a word begun by a space."""
    letters = sorted({letter for letter in TEXT if ord(letter) < 128 and letter != " "})
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    model = {
        "type": "BPE",
        "vocab": {name: token for token, name in enumerate(names)},
        "merges": [],
        "unk_token": "<unk>",
        "byte_fallback": True,
        "fuse_unk": True,
    }
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    whole = {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": names[token], "special": True, **special} for token in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }
    return tokenizers.parse(json.dumps(whole).encode(), "tokenizer.json")


def byte_level() -> HuggingFace:
    """As GPT-2 has it: every letter of a piece is a byte."""
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = Made(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return HuggingFace(made.to_str().encode())


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    return tokenizers.train([Path(__file__).read_text(encoding="utf-8")], 600)


@pytest.fixture(params=["sentencepiece", "byte fallback", "byte level"])
def tokenizer(request: pytest.FixtureRequest, pieces: Tokenizer) -> Tokenizer:
    makers = {"byte fallback": byte_fallback, "byte level": byte_level}
    return makers[request.param]() if request.param in makers else pieces


def test_a_text_comes_in_many_pieces_of_whole_characters(tokenizer: Tokenizer) -> None:
    before, tokens = [tokenizer.bos_id, *tokenizer.encode("so ")], tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    parts = list(spell(tokenizer, before, tokens))
    assert "".join(parts) == tokenizer.decode([*before, *tokens]).removeprefix("so ")
    assert all(parts)
    assert "\ufffd" not in "".join(parts)
    assert len(parts) > 12


def test_any_tokens_are_spelled_as_they_are_decoded(tokenizer: Tokenizer) -> None:
    """Also those of a model that has learned nothing: halves of characters, control pieces."""
    random = np.random.default_rng(0)
    for length in (1, 2, 7, 60):
        for _ in range(40):
            tokens = random.integers(0, tokenizer.vocab_size, length).tolist()
            parts = list(spell(tokenizer, [tokenizer.bos_id], tokens))
            assert "".join(parts) == tokenizer.decode([tokenizer.bos_id, *tokens])


def test_a_piece_is_given_before_the_next_token_is_asked_for(pieces: Tokenizer) -> None:
    asked = []

    def tokens() -> Iterator[int]:
        for token in pieces.encode("one two three"):
            asked.append(token)
            yield token

    parts = spell(pieces, [], tokens())
    for count in (1, 2, 3):
        next(parts)
        assert len(asked) == count


def test_numbers_keep_their_spaces() -> None:
    numbers = Numbers(20)
    assert list(spell(numbers, [0, 3], [4, 15])) == [" 4", " 15"]

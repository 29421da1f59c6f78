"""Texts that are coded in windows have the ids that the tokenizer gives to the whole text."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Made

from data.tokens.tokenizer import INDENT, NEWLINE, Tokenizer, load, train
from data.tokens.windows import WINDOW, encode_long

STDLIB = [
    path.read_text(encoding="utf-8", errors="replace")
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
]
SAMPLE = [text[:4000] for text in STDLIB[::4]]
# The patterns of GPT-2, GPT-4 and Llama 3, and one that groups digits from the right.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


class Coder(NamedTuple):
    """A tokenizer, and what its library makes of a whole text at once."""

    kind: str
    ours: Tokenizer
    whole: Callable[[str], list[int]]


def pattern(text: str) -> Made:
    """Byte-level BPE behind a pattern."""
    made = Made(models.BPE())
    split = pre_tokenizers.Split(Regex(text), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<|endoftext|>"], initial_alphabet=letters
    )
    made.train_from_iterator(SAMPLE, trainer)
    return made


def like_llama() -> Made:
    """BPE over the text as one word, what it does not know as bytes; Llama 2 but for the ▁."""
    made = Made(models.BPE(byte_fallback=True, fuse_unk=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pre = Regex(r"\S+|\s+")
    made.pre_tokenizer = pre_tokenizers.Split(pre, "isolated")  # learning wants words
    special = ["<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special)
    made.train_from_iterator(SAMPLE, trainer)
    content: dict[str, Any] = json.loads(made.to_str())
    content["pre_tokenizer"] = None
    content["added_tokens"] = [added for added in content["added_tokens"] if added["id"] < 2]
    return Made.from_str(json.dumps(content))


@pytest.fixture(scope="module", params=["bpe", "unigram", "gpt2", "llama3", "right", "llama"])
def coder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Coder:
    kind = request.param
    if kind in ("bpe", "unigram"):
        ours = train(SAMPLE, 1200, kind)

        def folded(text: str) -> list[int]:
            lines = text.split("\n")
            indents = [len(line) - len(line.lstrip(" ")) for line in lines]
            rest = [
                NEWLINE + INDENT * n + line[n:]
                for n, line in zip(indents[1:], lines[1:], strict=True)
            ]
            ids: list[int] = ours._pieces.encode("".join([lines[0], *rest]))
            return ids

        return Coder(kind, ours, folded)
    patterns = {"gpt2": GPT2, "llama3": LLAMA3, "right": RIGHT}
    made = pattern(patterns[kind]) if kind in patterns else like_llama()
    path = tmp_path_factory.mktemp(kind) / "tokenizer.json"
    made.save(str(path))
    made.encode_special_tokens = True
    return Coder(kind, load(path), lambda text: made.encode(text, add_special_tokens=False).ids)


def test_the_sources_of_the_standard_library(coder: Coder) -> None:
    _, ours, whole = coder
    assert all(ours.encode(text) == whole(text) for text in STDLIB[:15])
    text = "".join(STDLIB[15:])[: 1 << 17]  # many cuts, the files' own beginnings among them
    assert ours.encode(text) == whole(text)


def odd_texts() -> dict[str, str]:
    draw = random.Random(0)

    def of(letters: str, count: int = 50_000) -> str:
        return "".join(draw.choices(letters, k=count))

    return {
        "no whitespace": of("ACGT", 100_000),
        "letters": of("abcdefghijklmnopqrstuvwxyz"),
        "spaces": " " * 50_000,
        "line ends": "\n" * 50_000,
        "spaces then a letter": " " * 50_000 + "x",
        "an indent": "\n" + " " * 50_000 + "x",
        "indents": "".join("\n" + " " * n + "x = 1" for n in range(300)),
        "tabs": "\t" * 50_000,
        "whitespace": of(" \n\t\r"),
        "one letter": "a" * 50_000,
        "digits": of("0123456789"),
        "numbers": " ".join(of("0123456789", n) for n in range(300)),
        "CR LF": "".join(draw.choices(["if a:\r\n", "    b()\r", "\n\n", "\r\n\r\n"], k=9000)),
        "blank lines": "".join(
            draw.choices(["\n\n    ", "x)", " ", "  \n", "'s", "..."], k=15_000)
        ),
        "漢字": of("漢字仮名交じり文、。", 20_000),
        "emoji": of("🙂👩‍👩‍👧🇩🇪é", 20_000),
    }


@pytest.mark.parametrize("name", odd_texts())
def test_odd_texts(coder: Coder, name: str) -> None:
    kind, ours, whole = coder
    text = odd_texts()[name]
    if kind == "right" and name == "digits":
        pytest.skip("looks ahead to the end of all digits: time grows with the square")
    found = ours.encode(text)
    assert found == whole(text)
    assert ours.decode(found) == text


def test_ids_that_do_not_tell_their_place_are_made_of_the_whole_text() -> None:
    asked: list[int] = []

    def encode(text: str) -> list[int]:
        asked.append(len(text))
        return [0] * (len(text) // 2)

    assert encode_long("a" * 50_000, encode, np.array([1])) == [0] * 25_000
    assert asked[-1] == 50_000


def test_no_more_is_coded_at_once_than_must_be(coder: Coder) -> None:
    sizes: list[int] = []

    def encode(text: str) -> list[int]:
        sizes.append(len(text))
        return coder.whole(text)

    text = "".join(STDLIB)[: 1 << 17]
    encode_long(text, encode, coder.ours.byte_lengths())
    assert max(sizes) <= 2 * WINDOW
    assert sum(sizes) < 1.3 * len(text)

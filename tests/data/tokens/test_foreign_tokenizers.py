"""A tokenizer.json of any kind: bytes that add up, ids with holes, what the files beside say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Made

from data.config import DataConfig
from data.prepare import prepare
from data.settings import ConfigError
from data.tokens import tokenizer as tokenizers
from data.tokens.beside import gather
from data.tokens.tokenizer import HuggingFace, Tokenizer, load, parse
from train.pretrained import tokenizer as exported

TEXTS = {
    "CJK": "知識は力なり。天地玄黃,宇宙洪荒 — 한국어 ",
    "Cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю\n",
    "emoji": "🙂👩‍👩‍👧 ok 🇩🇪 e\u0301\ufffd",
    "code": "def f(x):\n    return [\n\tx,  # two  spaces\r\n\n    ]\x00\n",
    "awkward": " ▁ <0xE4> </s><s>[EOS] <|im_end|> <tool> ▁▁a",
    "none": "",
}
HERE = Path(__file__).read_text(encoding="utf-8")
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(**options: Any) -> Made:
    """As GPT-2, Llama 3 and Qwen have it."""
    made = Made(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_end|>"]
    train(made, vocab_size=600, special_tokens=special, initial_alphabet=letters)
    made.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("  ", normalized=False)])
    return made


def composed() -> Made:
    """As Qwen 2 has it: text is brought to NFC first, which is not the text."""
    made = byte_level()
    made.normalizer = normalizers.NFC()
    return made


def byte_fallback() -> Made:
    """As Gemma has it: spaces are ▁, whatever has no piece is spelled in bytes."""
    made = Made(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps)
    train(made, vocab_size=560, special_tokens=[*SPECIAL, *BYTES])
    return unspecial(made)


def with_dummy_prefix() -> Made:
    """As Llama 2 and Mistral have it: a space before every text, taken away again."""
    made = byte_fallback()
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return made


def metaspace() -> Made:
    """Words that begin with ▁, as later Llama 2 conversions have them."""
    made = byte_fallback()
    made.normalizer = None
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    made.decoder = decoders.Sequence([steps[0], steps[1], decoders.Fuse()])
    return made


def train(made: Made, **options: Any) -> None:
    made.train_from_iterator([HERE, *TEXTS.values()], trainers.BpeTrainer(**options))


def unspecial(made: Made) -> Made:
    """Pieces of bytes are no special ones: a trainer alone makes them such."""
    content = json.loads(made.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in SPECIAL]
    return Made.from_str(json.dumps(content))


KINDS = {
    "byte-level": byte_level,
    "NFC": composed,
    "byte fallback": byte_fallback,
    "dummy prefix": with_dummy_prefix,
    "metaspace": metaspace,
}


@pytest.fixture(scope="module", params=[*KINDS, "our export", "a hole"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("kind")
    if request.param == "our export":
        exported.write(tokenizers.train([HERE], 560), folder, print)
    elif request.param == "a hole":
        content = json.loads(byte_fallback().to_str())
        vocabulary = content["model"]["vocab"]
        last = max(vocabulary, key=lambda name: int(vocabulary[name]))
        vocabulary[last] += 50
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        KINDS[request.param]().save(str(folder / "tokenizer.json"))
    return load(folder / "tokenizer.json")


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_pieces_add_up_to_those_of_the_text(kind: Tokenizer, text: str) -> None:
    tokens = kind.encode(TEXTS[text])
    assert kind.byte_lengths()[tokens].sum() == len(TEXTS[text].encode())
    assert kind.decode(tokens) == TEXTS[text]
    assert not {kind.bos_id, kind.eos_id} & set(tokens)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_stays_what_it_was(name: str, tmp_path: Path) -> None:
    """Whatever is switched off while it is used: what is exported is what was imported."""
    KINDS[name]().save(str(tmp_path / "tokenizer.json"))
    content = (tmp_path / "tokenizer.json").read_bytes()
    assert load(tmp_path / "tokenizer.json").model == content


def test_every_kind_of_piece_counts_for_what_it_is(kind: Tokenizer) -> None:
    lengths = kind.byte_lengths()
    ids = json.loads(kind.model)["model"]["vocab"]
    assert len(lengths) == kind.vocab_size > max(ids.values())
    bytes_alone = [ids[name] for name in BYTES if name in ids]
    assert (lengths[bytes_alone] == 1).all()
    assert (lengths[[kind.bos_id, kind.eos_id]] == 0).all()
    assert (lengths[sorted(set(range(kind.vocab_size)) - set(ids.values()))] <= len("<tool>")).all()
    # Rows that a model has beyond the pieces are nothing.
    assert kind.decode([kind.vocab_size, kind.vocab_size + 7]) == ""


def with_last(token: int) -> bytes:
    """A tokenizer whose last special piece has a higher id than there are pieces."""
    content = json.loads(byte_level().to_str())
    vocabulary, added = content["model"]["vocab"], content["added_tokens"]
    added.append(added[0] | {"id": token, "content": "[EOS]"})
    vocabulary["[EOS]"] = token
    return json.dumps(content).encode()


def test_a_hole_in_the_ids_is_rows_without_text() -> None:
    made = parse(with_last(749), "tokenizer.json")
    assert made.vocab_size == 750
    assert not made.byte_lengths()[603:].any()
    assert made.byte_lengths().shape == (750,)
    content = json.loads(made.model)
    ids = [*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])]
    assert len(set(ids)) < 700 < max(ids)


def test_ids_too_high_for_a_table_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(with_last(4_000_000_000))
    with pytest.raises(ConfigError, match="ids up to 4000000000; the limit is 16777216"):
        load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("names", "bos", "eos"),
    [
        (["[BOS]", "[EOS]"], "[BOS]", "[EOS]"),
        (["[CLS]", "[SEP]"], "[CLS]", "[SEP]"),
        (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>"),
        (["<s>", "<|end_of_text|>"], "<s>", "<|end_of_text|>"),
    ],
)
def test_names_tell_where_nothing_else_does(names: list[str], bos: str, eos: str) -> None:
    """Ordinary pieces of such names, which HTML makes of itself, are passed over."""
    content = json.loads(byte_level().to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["special"]]
    vocabulary = content["model"]["vocab"]
    for name in ["</s>", "<s>", "<bos>", *names]:
        vocabulary.setdefault(name, len(vocabulary) + 10)
    like = content["added_tokens"][0]
    content["added_tokens"] += [
        like | {"id": vocabulary[name], "content": name, "special": True} for name in names
    ]
    content["added_tokens"].sort(key=lambda token: int(token["id"]))
    made = HuggingFace(json.dumps(content).encode())
    assert (made.bos_id, made.eos_id) == (vocabulary[bos], vocabulary[eos])
    assert made.end_ids == {vocabulary[eos]}


@pytest.fixture(scope="module")
def plain() -> bytes:
    """Special pieces: <|endoftext|> is 0, <|im_end|> is 1."""
    return byte_level().to_str().encode()


def beside(folder: Path, model: bytes, files: dict[str, Any]) -> Path:
    (folder / "tokenizer.json").write_bytes(model)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "tokenizer.json"


CONFIG, GENERATION, MODEL = "tokenizer_config.json", "generation_config.json", "config.json"


@pytest.mark.parametrize(
    ("files", "bos", "eos", "pad", "ends"),
    [
        ({}, 0, 0, None, {0}),
        ({CONFIG: {"eos_token": "<|im_end|>"}}, 1, 1, None, {1}),
        ({CONFIG: {"bos_token": {"content": "<|im_end|>", "lstrip": False}}}, 1, 0, None, {0}),
        ({CONFIG: {"bos_token": None, "eos_token": None}}, 0, 0, None, {0}),
        ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, 1, 1, None, {1}),
        ({GENERATION: {"eos_token_id": [1, 0], "pad_token_id": 0}}, 1, 1, 0, {0, 1}),
        ({GENERATION: {"eos_token_id": []}, MODEL: {"bos_token_id": 1}}, 1, 0, None, {0}),
        ({MODEL: {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}}, 0, 1, None, {1}),
        # The generation config has the last word among ids, the tokenizer's above all of them.
        ({GENERATION: {"eos_token_id": 0}, MODEL: {"eos_token_id": 1}}, 0, 0, None, {0}),
        (
            {CONFIG: {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}}
            | {GENERATION: {"eos_token_id": [0]}},
            *(1, 1, 0, {0, 1}),
        ),
        # No padding is made here: a pad beyond the pieces is the model's own affair.
        ({GENERATION: {"pad_token_id": 5000, "eos_token_id": 1}}, 1, 1, None, {1}),
    ],
)
def test_the_files_beside_say_what_begins_and_ends_a_text(
    files: dict[str, Any],
    bos: int,
    eos: int,
    pad: int | None,
    ends: set[int],
    plain: bytes,
    tmp_path: Path,
) -> None:
    made = load(beside(tmp_path, plain, files))
    assert (made.bos_id, made.eos_id, made.pad_id) == (bos, eos, pad)
    assert made.end_ids == ends
    # What belongs to it is all that another folder needs.
    (tmp_path / "other").mkdir()
    copied = {name: text.decode() for name, text in made.beside.items()}
    other = load(beside(tmp_path / "other", plain, copied))
    assert (other.bos_id, other.eos_id, other.pad_id) == (bos, eos, pad)
    assert other.end_ids == ends
    assert gather(tmp_path / "other") == made.beside


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({CONFIG: "{"}, "tokenizer_config.json: cannot be read as JSON"),
        ({CONFIG: "[" * 100_000}, "tokenizer_config.json: cannot be read as JSON"),
        ({CONFIG: []}, "tokenizer_config.json: must be a mapping of keys; it is list"),
        ({CONFIG: {"eos_token": 7}}, "eos_token is 7"),
        ({CONFIG: {"eos_token": {"contents": "x"}}}, 'eos_token is {"contents": "x"}'),
        ({CONFIG: {"eos_token": "<|eot|>"}}, 'eos_token is "<|eot|>", which is no piece'),
        ({GENERATION: {"eos_token_id": "1"}}, 'eos_token_id is "1"'),
        ({GENERATION: {"eos_token_id": [1, True]}}, "eos_token_id is [1, true]"),
        ({GENERATION: {"eos_token_id": [[1]]}}, "eos_token_id is [[1]]"),
        ({GENERATION: {"bos_token_id": 10**30}}, "the tokenizer's ids end at"),
        ({MODEL: {"eos_token_id": 1.5}}, "eos_token_id is 1.5"),
        ({MODEL: "NaN"}, "config.json: must be a mapping"),
        ({"special_tokens_map.json": "null"}, "special_tokens_map.json: must be a mapping"),
    ],
)
def test_malformed_files_beside_get_one_line(
    files: dict[str, Any], said: str, plain: bytes, tmp_path: Path
) -> None:
    path = beside(tmp_path, plain, files)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sentencepiece_model_hears_the_files_beside_too(tmp_path: Path) -> None:
    made = tokenizers.train([HERE], 560)
    (tmp_path / "tokenizer.model").write_bytes(made.model)
    (tmp_path / GENERATION).write_text(json.dumps({"eos_token_id": [2, 300]}))
    (tmp_path / CONFIG).write_text(json.dumps({"bos_token": "</s>"}))
    found = load(tmp_path / "tokenizer.model")
    assert (found.bos_id, found.eos_id) == (2, 2)
    assert found.end_ids == {2, 300}
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token": "<|eot|>"}))
    with pytest.raises(ConfigError, match="no piece of the tokenizer"):
        load(tmp_path / "tokenizer.model")


def test_a_corpus_keeps_what_its_tokenizer_was_said_to_be(plain: bytes, tmp_path: Path) -> None:
    """And is another corpus where a file beside says something else."""
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} {TEXTS['code']}")
    (tmp_path / "hf").mkdir()
    settings = DataConfig(
        source=str(tmp_path / "text"),
        root=str(tmp_path / "corpora"),
        tokenizer=str(beside(tmp_path / "hf", plain, {GENERATION: {"eos_token_id": [1, 0]}})),
        workers=1,
    )
    corpus = prepare(settings)
    corpus.verify()
    assert corpus.tokenizer.eos_id == 1
    assert corpus.tokenizer.end_ids == {0, 1}
    assert corpus.gather(corpus.offsets[1:2] - 1, corpus.offsets[1:2] * 0 + 1).tolist() == [1]
    beside(tmp_path / "hf", plain, {GENERATION: {"eos_token_id": 0}})
    assert prepare(settings).tokenizer.end_ids == {0}
    (corpus.path / GENERATION).write_text("{}")
    with pytest.raises(ConfigError, match="is not what was written"):
        corpus.verify()

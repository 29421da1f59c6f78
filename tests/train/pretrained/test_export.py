"""Models to Hugging Face's format and back: the same logits there, the same bits here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data.settings import ConfigError
from data.tokens import tokenizer as tokenizers
from parallel import shard
from tests.train.pretrained.shapes import (
    GDN,
    HYBRID,
    PLAIN,
    SHAPES,
    VOCABULARY,
    attention,
    config,
    export,
    ids,
    make,
)
from tests.train.runs import rows
from train.__main__ import main
from train.config import read
from train.model import mixers
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.pretrained import adopt, weights
from train.pretrained import export as exported
from train.pretrained import tokenizer as files
from train.pretrained.folder import find
from train.survival import manifest

pytestmark = pytest.mark.usefixtures("torch_code")

# These reach a family by another way to write the same norms.
CHANGED = {"qwen3_next-nope", "qwen3_next-full", "qwen3_next-mup", "olmo_hybrid-rotary"}


def transformed(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    made, told = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(told.values()), told
    return made.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_what_is_exported_and_gives_the_same_logits(
    name: str, tmp_path: Path
) -> None:
    model = make(SHAPES[name])
    export(model, tmp_path / "hf")
    theirs = transformed(tmp_path / "hf")
    assert theirs.config.model_type == name.partition("-")[0]
    lengths = (37, 1, 90)
    with torch.no_grad():
        ours = model(ids(128), None, shard(lengths, "cpu"))
        for alone, packed in zip(ids(128).split(lengths), ours.split(lengths), strict=True):
            logits = theirs(alone.unsqueeze(0)).logits[0]
            scale = float(logits.abs().max())
            torch.testing.assert_close(packed, logits, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("name", SHAPES)
def test_import_gives_back_the_model_and_every_bit_of_theirs(name: str, tmp_path: Path) -> None:
    model = make(SHAPES[name])
    export(model, tmp_path / "hf")
    adopt.adopt(tmp_path / "hf", tmp_path / "back", lambda line: None)
    settings = read(tmp_path / "back" / "config.yaml")
    assert settings.run.start_from == str(tmp_path / "back")
    back = Model(settings.model, VOCABULARY)
    held = weights.of_ours(tmp_path / "back")
    with torch.no_grad():
        for label, parameter in back.named_parameters():
            parameter.copy_(held.read(label))
        before, after = (one(ids(70), None, shard((70,), "cpu")) for one in (model, back))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    # Else norms are centred, or scaled, as the family has them.
    if name not in CHANGED:
        for label, parameter in model.named_parameters():
            assert torch.equal(held.read(label), parameter), label
        assert layers(settings.model) == layers(model.config)
    # What is exported once more has the bits of the first export.
    exported.export(find(tmp_path / "back"), tmp_path / "again", "auto", "fp32", print)
    first, second = (weights.of_family(tmp_path / folder) for folder in ("hf", "again"))
    assert first.names == second.names
    assert all(torch.equal(first.read(label), second.read(label)) for label in first.names)


def layers(settings: ModelConfig) -> list[tuple[object, Any]]:
    return [mixers.resolve(name, settings) for name in settings.blocks]


def test_a_model_that_transformers_has_not_goes_through_our_own_format(tmp_path: Path) -> None:
    model = make(config(["hgrn2", "attention"], {"hgrn2": {"heads": 2}, "attention": attention()}))
    said = export(model, tmp_path / "hf")
    assert any("'hgrn2'" in line for line in said)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "headrace"
    adopt.adopt(tmp_path / "hf", tmp_path / "back", lambda line: None)
    assert read(tmp_path / "back" / "config.yaml").model == model.config
    held = weights.of_ours(tmp_path / "back")
    assert all(torch.equal(held.read(label), p) for label, p in model.named_parameters())


@pytest.mark.parametrize(
    ("style", "settings", "key"),
    [
        ("llama", config(["attention"], {"attention": attention()}), "attention.qk_norm is true"),
        (
            "llama",
            config(["attention"], {"attention": attention(**PLAIN, rotary_fraction=0.5)}),
            "attention.rotary_fraction is 0.5",
        ),
        (
            "qwen3_next",
            config(HYBRID, {"gated_deltanet": GDN | {"conv_size": 0}, "attention": attention()}),
            "gated_deltanet.conv_size is 0",
        ),
        (
            "qwen3",
            config(["attention"], {"attention": attention(output_gate=False, conv_size=4)}),
            "model.mixers.attention.conv_size is 4",
        ),
        (
            "qwen3_next",
            config(["gated_deltanet", "kda"], {"gated_deltanet": GDN}),
            "model.pattern names 'kda'",
        ),
        (
            "qwen3",
            config(
                ["attention", "other"],
                {
                    "attention": attention(output_gate=False),
                    "other": attention(kind="attention", output_gate=False, kv_heads=4),
                },
            ),
            "model.mixers.other.kv_heads is 4 and model.mixers.attention.kv_heads 2",
        ),
        ("olmo_hybrid", SHAPES["qwen3_next"], "gated_deltanet.norm_eps is 1.0e-06"),
        ("gpt2", SHAPES["llama"], "--as is 'gpt2'"),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_the_setting(
    style: str, settings: ModelConfig, key: str
) -> None:
    with pytest.raises(ConfigError) as error:
        exported.choose(settings, style, print)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stem", "read_back"), [("model", weights.of_family), ("weights", weights.of_ours)]
)
def test_large_weights_are_written_in_parts(stem: str, read_back: Any, tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((n + 1, 25), float(n)) for n in reversed(range(7))}
    weights.write(tensors.items(), tmp_path, stem, most=600)
    files_there = sorted(tmp_path.glob("*.safetensors"))
    # Of 100 bytes a row: 7 rows, more than a part should be, then 6, 5, 4, and 3 + 2 + 1 rows.
    assert [file.name for file in files_there] == [
        f"{stem}-{n:05d}-of-00005.safetensors" for n in range(1, 6)
    ]
    index = json.loads((tmp_path / f"{stem}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2800
    found = read_back(tmp_path)
    assert found.names == set(tensors)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())


TEXTS = [
    "def f(x):\n    return [\n        x,  # two  spaces\n\n\t]\n",
    "▁ \ue00a \ue020 </s><s> <unk> <0x41> 漢字🙂 \r\n é\u0301",
    "  \n  \n\n   x",
    "",
]


def test_auto_tokenizer_has_the_same_pieces_and_loses_nothing(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    pieces = tokenizers.train(sources, 1200)
    files.write(pieces, tmp_path, print)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_next"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (pieces.bos_id, pieces.eos_id)
    for text in [*TEXTS, *sources]:
        begun = theirs(text)["input_ids"]
        assert begun[0] == pieces.bos_id
        assert theirs.decode(begun[1:]) == text
        # Ours never joins what lies on two sides of a cut that it makes in long texts.
        for start in range(0, len(text), 4000):
            part = text[start : start + 4000]
            assert theirs(part, add_special_tokens=False)["input_ids"] == pieces.encode(part)


def test_a_tokenizer_json_goes_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    pieces = tokenizers.train([Path(__file__).read_text(encoding="utf-8")], 600)
    for name in ("made", "once", "again"):
        (tmp_path / name).mkdir()
    files.write(pieces, tmp_path / "made", print)
    shutil.copy(tmp_path / "made" / "tokenizer.json", tmp_path / "once")
    found = files.find(tmp_path / "once", 600, print)
    assert found is not None
    assert found.file == "tokenizer.json"
    files.write(found, tmp_path / "again", print)
    once = (tmp_path / "once" / "tokenizer.json").read_bytes()
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == once
    (tmp_path / "again" / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (pieces.bos_id, pieces.eos_id)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_a_unigram_tokenizer_goes_along_with_a_word_of_why(tmp_path: Path) -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    said: list[str] = []
    files.write(tokenizers.train(sources, 800, "unigram"), tmp_path, said.append)
    assert "unigram" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_a_run_exported_imported_and_trained_on_begins_where_it_ended(
    config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """And so does one from the checkpoint itself."""
    hf, ours = tmp_path / "hf", tmp_path / "ours"
    assert main(["export", str(undisturbed), "--to", str(hf)]) == 0
    assert json.loads((hf / "config.json").read_text())["model_type"] == "qwen3_next"
    assert main(["import", str(hf), "--to", str(ours)]) == 0
    checkpoint = manifest.published(undisturbed / manifest.CHECKPOINTS)[0]
    there = read(config)
    same = [f"data.{key}={getattr(there.data, key)}" for key in ("source", "root", "validation")]
    same += [f"train.{key}={getattr(there.train, key)}" for key in ("batch_tokens", "seq_len")]
    for file, words in (
        (ours / "config.yaml", [*same, f"eval.tokens={there.eval.tokens}"]),
        (config, [f"run.start_from={checkpoint}", "zero.stage=3"]),
    ):
        root = tmp_path / file.stem
        few = ["train.steps=1", "run.name=again", f"run.root={root}", "eval.sample_tokens=0"]
        assert main([str(file), *words, *few]) == 0
        begun = rows(root / "again")[0]["val_loss"]
        assert begun == pytest.approx(rows(undisturbed)[-1]["val_loss"], abs=1e-5)


def test_one_step_of_a_run_or_none_that_is_there(undisturbed: Path, tmp_path: Path) -> None:
    assert main(["export", str(undisturbed), "--to", str(tmp_path / "a"), "--step", "2"]) == 0
    held = weights.of_family(tmp_path / "a").read("model.embed_tokens.weight")
    step = manifest.published(undisturbed / manifest.CHECKPOINTS)[-1]
    assert manifest.step_of(step) == 2
    assert torch.equal(held, weights.of_ours(step).read("embedding.weight"))
    assert main(["export", str(undisturbed), "--to", str(tmp_path / "b"), "--step", "3"]) == 2

"""Models to Hugging Face's format and back: the same logits there, the same bits here."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from data import tokenizer as tokenizers
from data.settings import ConfigError
from parallel import shard
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

VOCABULARY = 600
PLAIN = {"qk_norm": False, "output_gate": False}
OLMO = {"qk_norm_over": "heads", "output_gate": False, "head_dim": 8}
GDN = {"heads": 2, "value_heads": 4, "head_dim": 6, "value_head_dim": 10}
HYBRID = ["gated_deltanet", "gated_deltanet", "attention"]


pytestmark = pytest.mark.usefixtures("torch_code")


def attention(**changes: Any) -> dict[str, Any]:
    return {"heads": 4, "kv_heads": 2, "head_dim": 6, **changes}


def config(pattern: list[str], mixers: dict[str, Any], **changes: Any) -> ModelConfig:
    settings = {"layers": 5, "dim": 32, "mlp_dim": 44, "init_std": 0.2, **changes}
    return ModelConfig(pattern=pattern, mixers=mixers, **settings)


# Every family, in more than one shape.
SHAPES: dict[str, ModelConfig] = {
    "llama": config(["attention"], {"attention": attention(**PLAIN, rotary_theta=5e5)}),
    "llama-untied": config(
        ["attention"], {"attention": attention(kv_heads=4, **PLAIN)}, tie_embeddings=False
    ),
    "llama-one-kv": config(
        ["attention"], {"attention": attention(kv_heads=1, head_dim=10, **PLAIN)}, norm_eps=1e-3
    ),
    "mistral": config(["attention"], {"attention": attention(**PLAIN, window=7)}),
    "qwen2": config(["attention"], {"attention": attention(**PLAIN, qkv_bias=True)}),
    "qwen3": config(["attention"], {"attention": attention(output_gate=False)}),
    "qwen3-windows": config(
        ["local", "local", "attention"],
        {
            "local": attention(kind="attention", output_gate=False, window=9),
            "attention": attention(output_gate=False),
        },
    ),
    "olmo2": config(["attention"], {"attention": attention(**OLMO)}, post_norm=["attention"]),
    "qwen3_next": config(
        HYBRID,
        {"gated_deltanet": GDN, "attention": attention(rotary_fraction=0.25, head_dim=16)},
        zero_centered_norms=True,
        tie_embeddings=False,
    ),
    "qwen3_next-nope": config(
        HYBRID,
        {"gated_deltanet": GDN | {"conv_size": 3}, "attention": attention(rotary_fraction=0.0)},
    ),
    "qwen3_next-full": config(["attention"], {"attention": attention()}, norm_eps=1e-5),
    "qwen3_next-mup": config(
        HYBRID, {"gated_deltanet": GDN, "attention": attention()}, mup_base_dim=8
    ),
    "olmo_hybrid": config(
        HYBRID,
        {
            "gated_deltanet": GDN | {"negative_eigenvalues": True, "norm_eps": 1e-5},
            "attention": attention(**OLMO, rotary_fraction=0.0),
        },
        post_norm=["attention"],
        tie_embeddings=False,
    ),
    "olmo_hybrid-rotary": config(
        HYBRID,
        {"gated_deltanet": GDN | {"value_heads": 2}, "attention": attention(**OLMO)},
        post_norm=["attention"],
        zero_centered_norms=True,
        norm_eps=1e-5,
    ),
}


# These reach a family by another way to write the same norms.
CHANGED = {"qwen3_next-nope", "qwen3_next-full", "qwen3_next-mup", "olmo_hybrid-rotary"}


def make(settings: ModelConfig) -> Model:
    """A model whose every parameter has its say: no norm or bias is left at 0 or 1."""
    torch.manual_seed(2)
    model = Model(settings, VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def save(model: Model, folder: Path, tokenizer: Path | None = None) -> Path:
    """A folder as `import` leaves it."""
    folder.mkdir()
    weights.write(model.named_parameters(), folder, weights.OURS)
    sections = {"model": asdict(model.config)}
    if tokenizer:
        sections["data"] = {"tokenizer": str(tokenizer)}
    (folder / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    return folder


def export(model: Model, folder: Path, style: str = "auto", dtype: str = "fp32") -> list[str]:
    """What `export` says, of a folder with the model's weights."""
    pieces = tokenizers.train([Path(__file__).read_text(encoding="utf-8")], VOCABULARY)
    run = folder.with_name(f"{folder.name}-run")
    save(model, run, run / pieces.file)
    (run / pieces.file).write_bytes(pieces.model)
    said: list[str] = []
    exported.export(find(run), folder, style, dtype, said.append)
    return said


def transformed(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    made, told = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    return made.eval()


def ids(length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(4))


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


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3NextForCausalLM"])
def test_a_model_saved_by_transformers_in_parts_is_imported(name: str, tmp_path: Path) -> None:
    """And in bf16: the dtype stays, bit by bit."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "tie_word_embeddings": name == "Qwen3ForCausalLM",
    }
    if name == "Qwen3NextForCausalLM":
        sizes |= {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
        sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "num_experts": 0}
    architecture = getattr(transformers, name)
    torch.manual_seed(3)
    theirs = architecture(architecture.config_class(**sizes)).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    adopt.adopt(tmp_path / "hf", tmp_path / "ours", lambda line: None)

    settings = read(tmp_path / "ours" / "config.yaml")
    held = weights.of_ours(tmp_path / "ours")
    ours = Model(settings.model, VOCABULARY)
    with torch.no_grad():
        for label, parameter in ours.named_parameters():
            assert held.read(label).dtype == torch.bfloat16
            parameter.copy_(held.read(label))
        theirs = architecture.from_pretrained(tmp_path / "hf", dtype=torch.float32)
        wanted = theirs(ids(41).unsqueeze(0)).logits[0]
        got = ours(ids(41), None, shard((41,), "cpu"))
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


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
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is yarn"),
        ({"num_hidden_layers": 6}, "there is no tensor model.layers.5."),
        ({"num_hidden_layers": 4}, "model.layers.4."),
        ({"tie_word_embeddings": False}, "there is no tensor lm_head.weight"),
        ({"intermediate_size": 48}, "is of another model: blocks.0.mlp"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_the_key(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(make(SHAPES["llama"]), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "back")]) == 2
    heard = capsys.readouterr().err.strip()
    assert said in heard
    assert "\n" not in heard
    assert not (tmp_path / "back").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    model = make(SHAPES["llama"])
    export(model, tmp_path / "hf")
    with pytest.raises(ConfigError, match="is there already"):
        adopt.adopt(tmp_path / "hf", tmp_path / "hf-run", print)


@pytest.mark.parametrize(
    ("stem", "read_back"), [("model", weights.of_family), ("weights", weights.of_ours)]
)
def test_large_weights_are_written_in_parts(stem: str, read_back: Any, tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((n + 1, 25), float(n)) for n in range(7)}
    weights.write(tensors.items(), tmp_path, stem, most=600)
    files_there = sorted(tmp_path.glob("*.safetensors"))
    # Of 100 bytes a row: rows 1 + 2 + 3, 4, 5, 6, and 7, which is more than a part should be.
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
    found = files.find(tmp_path / "once")
    assert found == tmp_path / "once" / "tokenizer.json"
    files.write(tokenizers.load(found), tmp_path / "again", print)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == found.read_bytes()
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

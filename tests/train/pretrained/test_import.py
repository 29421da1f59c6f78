"""What transformers saves becomes a model of ours; what is malformed gets one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data.settings import ConfigError
from parallel import shard
from tests.train.pretrained.shapes import SHAPES, VOCABULARY, export, ids, make
from train.__main__ import main
from train.config import read
from train.model.transformer import Model
from train.pretrained import adopt, families, weights

pytestmark = pytest.mark.usefixtures("torch_code")

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 77,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
# Of every family, in more than one shape: its settings besides SIZES.
SAVED: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama-tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3, "head_dim": 10},
    "mistral": {"sliding_window": 7},
    "mistral-full": {"sliding_window": None, "num_key_value_heads": 1},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 6, "tie_word_embeddings": True},
    "qwen3-windows": {
        "head_dim": 12,
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "olmo2": {"rms_norm_eps": 1e-5},
    "qwen3_next": {"num_experts": 0, "head_dim": 16, **LINEAR},
    "qwen3_next-interval": {
        **{"num_experts": 8, "mlp_only_layers": [0, 1, 2, 3], "full_attention_interval": 2},
        **{"head_dim": 16, "rms_norm_eps": 1e-4, **LINEAR, "linear_conv_kernel_dim": 3},
    },
    "qwen3_next-experts": {
        **{"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 9},
        **{"shared_expert_intermediate_size": 7, "head_dim": 16, **LINEAR},
    },
    "qwen3_next-sparse": {
        **{"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 8},
        **{"shared_expert_intermediate_size": 8, "norm_topk_prob": False, "head_dim": 16},
        **{"decoder_sparse_step": 2, "mlp_only_layers": [3], **LINEAR},
    },
    "olmo_hybrid": LINEAR,
    # Heads of v twice as wide: transformers saves the convolution in equal parts all the same.
    "olmo_hybrid-wide": {
        **{"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 5},
        **{"linear_value_head_dim": 10, "linear_allow_neg_eigval": False, "rms_norm_eps": 1e-5},
        **{"layer_types": ["full_attention", "linear_attention"] * 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": None},
    },
}


def saved(name: str, folder: Path, **how: Any) -> nn.Module:
    """A model as transformers saves it; every parameter has its say."""
    import transformers

    kind = name.partition("-")[0]
    family = families.named(kind)
    assert family is not None
    architecture = getattr(transformers, family.architecture)
    torch.manual_seed(3)
    theirs: nn.Module = architecture(architecture.config_class(**SIZES | SAVED[name])).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.set_experts_implementation("eager")  # others refuse odd widths
    theirs.to(how.pop("dtype", torch.float32))
    theirs.save_pretrained(folder, **how)  # type: ignore[operator]
    return theirs


def test_every_family_is_among_what_transformers_saves() -> None:
    assert {name.partition("-")[0] for name in SAVED} == {one.name for one in families.FAMILIES}


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saves_gives_its_logits_here(name: str, tmp_path: Path) -> None:
    """And what is exported again is in the files that transformers reads, with its logits."""
    theirs = saved(name, tmp_path / "hf")
    adopt.adopt(tmp_path / "hf", tmp_path / "ours", lambda line: None)
    settings = read(tmp_path / "ours" / "config.yaml")
    held = weights.of_ours(tmp_path / "ours")
    ours = Model(settings.model, VOCABULARY)
    with torch.no_grad():
        for label, parameter in ours.named_parameters():
            parameter.copy_(held.read(label))
        wanted = theirs(ids(41).unsqueeze(0), use_cache=False).logits[0]
        got = ours(ids(41), None, shard((41,), "cpu"))
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert settings.model.max_positions == 77

    from transformers import AutoModelForCausalLM

    export(ours, tmp_path / "again")
    back, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    assert back.config.max_position_embeddings == 77
    there = {label: tensor for label, tensor in theirs.named_parameters()}
    for label, tensor in back.named_parameters():
        assert torch.equal(tensor, there[label]), label


def test_one_saved_in_parts_and_in_bf16_keeps_its_dtype_and_bits(tmp_path: Path) -> None:
    theirs = saved("qwen3_next", tmp_path / "hf", dtype=torch.bfloat16, max_shard_size="30KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    adopt.adopt(tmp_path / "hf", tmp_path / "ours", lambda line: None)
    held = weights.of_ours(tmp_path / "ours")
    assert {held.dtype(name) for name in held.names} == {"BF16"}
    wanted = dict(theirs.named_parameters())["model.layers.3.mlp.down_proj.weight"]
    assert torch.equal(held.read("blocks.3.mlp.out.weight"), wanted)


@pytest.mark.parametrize("conv", ["by width", "equal parts", "one"])
def test_olmo_hybrid_is_read_by_every_spelling_of_its_files(conv: str, tmp_path: Path) -> None:
    """Those of its authors, of transformers, and of transformers' own modules."""
    theirs = saved("olmo_hybrid-wide", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    adopt.adopt(tmp_path / "hf", tmp_path / "saved", lambda line: None)
    if conv != "equal parts":
        tensors = {name: t for name, t in tensors.items() if "conv1d" not in name}
        for name, tensor in theirs.named_parameters():
            if "conv1d" in name and conv == "one":
                tensors[name] = tensor.detach()
            elif "conv1d" in name:
                for letter, rows in zip("qkv", tensor.detach().split([15, 15, 30]), strict=True):
                    tensors[name.replace("conv1d", f"{letter}_conv1d")] = rows.contiguous()
    if conv == "one":  # and norms by the names that the modules have
        names = {id(p): name for name, p in theirs.named_parameters()}
        tensors = {name: t for name, t in tensors.items() if "norm" not in name}
        for parameter in theirs.parameters():
            if "norm" in names[id(parameter)]:
                tensors[names[id(parameter)]] = parameter.detach()
    save_file(tensors, path, {"format": "pt"})
    adopt.adopt(tmp_path / "hf", tmp_path / "ours", lambda line: None)
    one, other = weights.of_ours(tmp_path / "saved"), weights.of_ours(tmp_path / "ours")
    assert one.names == other.names
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, 'model_type is "gpt2"'),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, 'rope_type is "yarn"'),
        ({"num_hidden_layers": 6}, "there is no tensor model.layers.5."),
        ({"num_hidden_layers": 4}, "model.layers.4."),
        ({"tie_word_embeddings": False}, "there is no tensor lm_head.weight"),
        ({"intermediate_size": 48}, "is of another model: model.layers.0.mlp"),
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


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which a command is refused."""
    assert main([str(word) for word in words]) == 2
    heard = capsys.readouterr().err.strip()
    assert heard
    assert "\n" not in heard
    return heard


def listing(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("", "--to is empty"),
        ("  ", "--to is empty"),
        (".", "is there already"),
        ("..", "is there already"),
        ("/", "is there already"),
        ("file", "is there already"),
        ("dangling", "is there already"),
        ("full", "is there already"),
        ("full/", "is there already"),
        ("hf", "is there already"),
        ("file/below", "is no folder"),
        ("file/below/deep", "is no folder"),
        ("n" * 300, "File name too long"),
        ("locked/below", "Read-only file system"),
    ],
)
def test_where_nothing_can_be_written_one_line_says_so(
    to: str,
    said: str,
    hf: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And nothing that was there is touched, whatever it is called."""
    shutil.copytree(hf, tmp_path / "hf")
    for name in ("full", "full.partial", "x.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to("nowhere")
    if "locked" in to:
        to = "/proc/locked/below"
        said = "/proc"
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    assert said in refused(capsys, "import", "hf", "--to", to)
    assert said in refused(capsys, "convert", "hf", "--to", to, "--pattern", "liger")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("to", ["x", "./a/b/../x", "deep/er/x", "empty", "linked", "hf/inside"])
def test_a_folder_is_written_beside_what_is_there(
    to: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(hf, tmp_path / "hf")
    for name in ("empty", "elsewhere", "x.partial", "empty.partial", "a"):
        (tmp_path / name).mkdir()
    for name in ("x.partial", "empty.partial"):
        (tmp_path / name / "mine").write_text("precious")
    (tmp_path / "linked").symlink_to("elsewhere")
    monkeypatch.chdir(tmp_path)
    before, inode = listing(tmp_path), (tmp_path / "empty").stat().st_ino
    assert main(["import", "hf", "--to", to]) == 0
    made = Path(os.path.abspath(to))
    after = listing(tmp_path)
    assert {name: after[name] for name in before} == before
    assert (tmp_path / "empty").stat().st_ino == inode
    assert "config.yaml" in {path.name for path in made.iterdir()}
    assert not list(tmp_path.rglob(".headrace-*"))
    assert made.stat().st_mode & 0o777 == (tmp_path / "empty").stat().st_mode & 0o777
    # What it names is found from any other folder.
    monkeypatch.chdir("/")
    settings = read(made / "config.yaml")
    assert settings.run.start_from == str(made)
    assert Path(str(settings.data.tokenizer)).is_file()


def test_an_import_that_fails_leaves_nothing(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(hf, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"nothing")
    before = listing(tmp_path)
    refused(capsys, "import", tmp_path / "hf", "--to", tmp_path / "new" / "er" / "x")
    (tmp_path / "empty").mkdir()
    refused(capsys, "import", tmp_path / "hf", "--to", tmp_path / "empty")
    (tmp_path / "empty").rmdir()
    assert listing(tmp_path) == before


def test_the_command_to_train_on_has_a_rate_for_weights_that_have_learned(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(hf), "--to", str(tmp_path / "my model")]) == 0
    said = capsys.readouterr().out
    assert f"python -m train '{tmp_path}/my model/config.yaml'" in said
    assert "optim.lr=3e-05 is a tenth of the peak" in said
    words = ["convert", str(hf), "--to", str(tmp_path / "y"), "--pattern", "[liger, attention]"]
    assert main(words) == 0
    assert "optim.lr=0.0001 is a third of the peak" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["model.gguf", "config.json"], "holds only model.gguf, a GGUF file; save it"),
        (["q4.gguf"], "gguf_file='q4.gguf').save_pretrained(DIR)"),
        (["pytorch_model.bin", "config.json"], "holds only pytorch_model.bin, pickled weights"),
        (["consolidated.00.pth"], "holds only consolidated.00.pth, pickled weights"),
        (["config.json"], "holds no model.safetensors"),
        ([], "config.json: there is no such file"),
    ],
)
def test_weights_in_other_formats_are_named(
    files: list[str], said: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hf").mkdir()
    for name in files:
        (tmp_path / "hf" / name).write_bytes(b"GGUF")
    if "config.json" in files:
        shutil.copy(hf / "config.json", tmp_path / "hf")
    assert said in refused(capsys, "import", tmp_path / "hf", "--to", tmp_path / "x")


def test_what_is_no_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for name in ("a.gguf", "none"):
        assert "is no folder" in refused(capsys, "import", tmp_path / name, "--to", tmp_path / "x")


# What a key of a JSON file may hold where something else is wanted.

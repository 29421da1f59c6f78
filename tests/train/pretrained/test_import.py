"""What transformers saves becomes a model of ours; what is malformed gets one line."""

from __future__ import annotations

import json
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

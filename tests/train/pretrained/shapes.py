"""Models of every family, small enough to write out and to compare."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from data.tokens import tokenizer as tokenizers
from data.tokens.tokenizer import Tokenizer
from train.model.config import ModelConfig
from train.model.transformer import Model
from train.pretrained import export as exported
from train.pretrained import weights
from train.pretrained.folder import find

VOCABULARY = 600
PLAIN = {"qk_norm": False, "output_gate": False}
OLMO = {"qk_norm_over": "heads", "output_gate": False, "head_dim": 8}
GDN = {"heads": 2, "value_heads": 4, "head_dim": 6, "value_head_dim": 10}
EXPERTS = {"experts": 6, "chosen": 2, "dim": 14, "shared_dim": 10, "shared_gate": True}
HYBRID = ["gated_deltanet", "gated_deltanet", "attention"]


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
    "qwen3_next-experts": config(
        HYBRID,
        {"gated_deltanet": GDN, "attention": attention(rotary_fraction=0.25, head_dim=16)},
        zero_centered_norms=True,
        tie_embeddings=False,
        mlp_pattern=["experts"],
        mlps={"experts": EXPERTS},
    ),
    "qwen3_next-some-experts": config(
        HYBRID,
        {"gated_deltanet": GDN, "attention": attention()},
        zero_centered_norms=True,
        mlp_first=["swiglu"],
        mlp_pattern=["experts", "swiglu"],
        mlps={"experts": EXPERTS | {"normalise": False, "dim": None}},
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


def make(settings: ModelConfig, vocabulary: int = VOCABULARY) -> Model:
    """A model whose every parameter has its say: no norm or bias is left at 0 or 1."""
    torch.manual_seed(2)
    model = Model(settings, vocabulary, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def save(model: Model, folder: Path, tokenizer: Tokenizer) -> Path:
    """A folder as `import` leaves it."""
    folder.mkdir()
    weights.write(model.named_parameters(), folder, weights.OURS)
    (folder / tokenizer.file).write_bytes(tokenizer.model)
    sections = {
        "model": asdict(model.config),
        "data": {"tokenizer": str(folder / tokenizer.file)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
    return folder


def export(model: Model, folder: Path, style: str = "auto", dtype: str = "fp32") -> list[str]:
    """What `export` says, of a folder with the model's weights."""
    pieces = tokenizers.train([Path(__file__).read_text(encoding="utf-8")], 600)
    run = save(model, folder.with_name(f"{folder.name}-run"), pieces)
    said: list[str] = []
    exported.export(find(run), folder, style, dtype, said.append)
    return said


def ids(length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(4))

"""Mixers and whole models against the torch code of transformers: outputs and gradients.

Our parameters are written as functions of theirs, so that the gradients of theirs can be taken
through either model. fp32: to 1e-4 of the largest number of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from parallel import shard
from train.model import mixers
from train.model.config import ModelConfig
from train.model.transformer import Model

pytestmark = pytest.mark.usefixtures("torch_code")
TOKENS = 70
Weights = dict[str, Tensor]


def parts(module: nn.Module) -> Weights:
    return dict(module.named_parameters())


def fill(module: nn.Module) -> None:
    """Every parameter has its say: none is left at 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() == 1 and ("norm" in name or name == "D")
            parameter.copy_(1 + 0.2 * noise if norm else 0.1 * noise)


def compare(
    theirs: Callable[[Tensor], Tensor],
    ours: Callable[[Tensor], Tensor],
    x: Tensor,
    weights: Weights,
) -> None:
    """Outputs, and the gradients of `weights` and of x if it has one."""
    inputs = {"x": x, **weights} if x.requires_grad else weights
    wanted, got = theirs(x), ours(x)
    close("output", got, wanted)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5))
    over = list(inputs.values())
    right = torch.autograd.grad(wanted, over, direction)
    for name, one, gradient in zip(
        inputs, right, torch.autograd.grad(got, over, direction), strict=True
    ):
        close(name, gradient, one)


def close(name: str, got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape, name
    scale = float(wanted.detach().abs().max())
    assert scale > 0, name
    assert float((got - wanted).detach().abs().max()) < 1e-4 * scale, name


def hidden(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, TOKENS, dim, generator=generator).requires_grad_()


def check_mixer(
    name: str, model: ModelConfig, layer: int, theirs: nn.Module, weights: Weights
) -> None:
    """`weights` are those of our mixer, made of the parameters of theirs."""
    ours = mixers.make(name, model, layer)
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in weights.items()
    }

    def run_theirs(x: Tensor) -> Tensor:
        out = theirs(x)
        return out[0] if isinstance(out, tuple) else out

    def run_ours(x: Tensor) -> Tensor:
        return functional_call(ours, weights, (x, shard([TOKENS], "cpu")))

    compare(run_theirs, run_ours, hidden(model.dim), parts(theirs))


def test_mamba2() -> None:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=24,
            num_heads=6,
            head_dim=8,
            state_size=5,
            n_groups=2,
            conv_kernel=4,
            chunk_size=16,
            num_hidden_layers=1,
            layer_norm_epsilon=1e-5,
        ),
        0,
    )
    fill(theirs)
    w = parts(theirs)
    gate, x, B, C, dt = w["in_proj.weight"].split([48, 48, 10, 10, 6])

    def order(rows: Tensor) -> Tensor:  # theirs are x, B, C
        x, B, C = rows.split([48, 10, 10])
        return torch.cat([C, B, x])

    settings = {"heads": 6, "head_dim": 8, "groups": 2, "state_dim": 5}
    model = ModelConfig(
        pattern=["mamba2"], layers=1, dim=24, norm_eps=1e-5, mixers={"mamba2": settings}
    )
    ours = {
        "qkv.weight": torch.cat([C, B, x]),
        "conv": order(w["conv1d.weight"].squeeze(1)),
        "conv_bias": order(w["conv1d.bias"]),
        "dt.weight": dt,
        "gate.weight": gate,
        "A_log": w["A_log"],
        "dt_bias": w["dt_bias"],
        "D": w["D"],
        "norm": w["norm.weight"],
        "out.weight": w["out_proj.weight"],
    }
    check_mixer("mamba2", model, 0, theirs, ours)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_lightning_attention_of_minimax(layer: int) -> None:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    class Theirs(MiniMaxLightningAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, None, None)[0]

    theirs = Theirs(
        MiniMaxConfig(
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=8,
            num_hidden_layers=4,
            block_size=16,
            layer_types=["linear_attention"] * 4,
        ),
        layer,
    )
    fill(theirs)
    w = parts(theirs)
    by_head = w["qkv_proj.weight"].unflatten(0, (3, 3, 8))  # head, then q, k, v
    # norm_eps is of the blocks: the norm inside has an epsilon of its own.
    model = ModelConfig(
        pattern=["lightning"],
        layers=4,
        dim=24,
        norm_eps=0.1,
        mixers={"lightning": {"heads": 3, "head_dim": 8}},
    )
    ours = {
        "qkv.weight": by_head.transpose(0, 1).flatten(0, 2),
        "gate.weight": w["output_gate.weight"],
        "norm.weight": w["norm.weight"],
        "out.weight": w["out_proj.weight"],
    }
    check_mixer("lightning", model, layer, theirs, ours)


@pytest.mark.parametrize("layers", [1, 2, 8, 80])
def test_lightning_slopes_are_those_of_minimax_in_every_layer(layers: int) -> None:
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    sizes = {"hidden_size": 24, "num_attention_heads": 3, "head_dim": 8, "block_size": 2}
    kinds = ["linear_attention"] * layers
    published = MiniMaxConfig(num_hidden_layers=layers, layer_types=kinds, **sizes)
    settings = {"lightning": {"heads": 3, "head_dim": 8}}
    model = ModelConfig(pattern=["lightning"], layers=layers, dim=24, mixers=settings)
    for layer in {0, layers // 2, layers - 1}:
        wanted = MiniMaxLightningAttention(published, layer).slope_rate.flatten()
        ours: Any = mixers.make("lightning", model, layer)
        torch.testing.assert_close(ours.slopes(torch.zeros(1)), wanted, rtol=2e-6, atol=0)


def test_kimi_delta_attention() -> None:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    theirs = KimiLinearDeltaAttention(
        KimiLinearConfig(
            hidden_size=24, linear_head_dim=8, linear_num_heads=3, num_hidden_layers=2
        ),
        0,
    )
    fill(theirs)
    w = parts(theirs)
    model = ModelConfig(
        pattern=["kda"],
        layers=2,
        dim=24,
        norm_eps=1e-5,
        mixers={"kda": {"heads": 3, "head_dim": 8}},
    )
    ours = {
        "qkv.weight": torch.cat([w[f"{part}_proj.weight"] for part in "qkv"]),
        "conv": w["conv1d.weight"].squeeze(1),
        "beta.weight": w["b_proj.weight"],
        "decay.down.weight": w["forget_gate.f_a_proj.weight"],
        "decay.up.weight": w["forget_gate.f_b_proj.weight"],
        "gate.down.weight": w["g_a_proj.weight"],
        "gate.up.weight": w["g_b_proj.weight"],
        "A_log": w["forget_gate.A_log"].flatten(),
        "dt_bias": w["forget_gate.dt_bias"],
        "norm.weight": w["o_norm.weight"],
        "out.weight": w["o_proj.weight"],
    }
    check_mixer("kda", model, 0, theirs, ours)


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
HYBRID = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]


def llama() -> tuple[nn.Module, ModelConfig, Weights]:
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-5))
    fill(theirs)
    w = parts(theirs)
    ours = outside(w)
    for i in range(4):
        ours |= block(w, i)
        ours[f"blocks.{i}.mixer.qkv.weight"] = joined(w, f"model.layers.{i}.self_attn", "qkv")
        ours[f"blocks.{i}.mixer.out.weight"] = w[f"model.layers.{i}.self_attn.o_proj.weight"]
    settings = {"heads": 4, "kv_heads": 2, "head_dim": 6, "qk_norm": False, "output_gate": False}
    config = ModelConfig(
        pattern=["attention"],
        layers=4,
        dim=24,
        mlp_dim=40,
        tie_embeddings=False,
        norm_eps=1e-5,
        mixers={"attention": settings},
    )
    return theirs, config, ours


def qwen3_next() -> tuple[nn.Module, ModelConfig, Weights]:
    """Its dense form: no experts."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    theirs = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES,
            head_dim=8,
            layer_types=HYBRID,
            mlp_only_layers=[0, 1, 2, 3],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=6,
            linear_value_head_dim=5,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
            },
        )
    )
    fill(theirs)
    w = parts(theirs)
    ours = outside(w)
    for i in range(3):
        from_, to = f"model.layers.{i}.linear_attn", f"blocks.{i}.mixer"
        # By key head: q, k, its two value heads, their two gates; β and decay likewise.
        grouped = w[f"{from_}.in_proj_qkvz.weight"].unflatten(0, (2, -1))
        q, k, v, z = (part.flatten(0, 1) for part in grouped.split([6, 6, 10, 10], dim=1))
        rates = w[f"{from_}.in_proj_ba.weight"].unflatten(0, (2, 2, 2)).transpose(0, 1)
        ours |= block(w, i) | {
            f"{to}.qkv.weight": torch.cat([q, k, v]),
            f"{to}.gate.weight": z,
            f"{to}.beta_decay.weight": rates.flatten(0, 2),
            f"{to}.conv": w[f"{from_}.conv1d.weight"].squeeze(1),
            f"{to}.A_log": w[f"{from_}.A_log"],
            f"{to}.dt_bias": w[f"{from_}.dt_bias"],
            f"{to}.norm.weight": w[f"{from_}.norm.weight"],
            f"{to}.out.weight": w[f"{from_}.out_proj.weight"],
        }
    from_, to = "model.layers.3.self_attn", "blocks.3.mixer"
    q, gate = w[f"{from_}.q_proj.weight"].unflatten(0, (4, 2, 8)).unbind(1)
    ours |= block(w, 3) | {
        f"{to}.qkv.weight": torch.cat([q.flatten(0, 1), joined(w, from_, "kv")]),
        f"{to}.gate.weight": gate.flatten(0, 1),
        f"{to}.q_norm.weight": w[f"{from_}.q_norm.weight"],
        f"{to}.k_norm.weight": w[f"{from_}.k_norm.weight"],
        f"{to}.out.weight": w[f"{from_}.o_proj.weight"],
    }
    linear = {"heads": 2, "value_heads": 4, "head_dim": 6, "value_head_dim": 5}
    full = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "rotary_fraction": 0.25,
        "rotary_theta": 1e7,
    }
    config = ModelConfig(
        layers=4,
        dim=24,
        mlp_dim=40,
        tie_embeddings=False,
        zero_centered_norms=True,
        mixers={"gated_deltanet": linear, "attention": full},
    )
    return theirs, config, ours


def olmo_hybrid() -> tuple[nn.Module, ModelConfig, Weights]:
    """Norms after mixer and MLP where it attends, before them where it is linear."""
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    theirs = OlmoHybridForCausalLM(
        OlmoHybridConfig(
            **SIZES,
            layer_types=HYBRID,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=6,
            linear_value_head_dim=12,
            rope_parameters={"rope_type": "default", "rope_theta": None},  # as released
        )
    )
    fill(theirs)
    w = parts(theirs)
    ours = outside(w)
    for i in range(3):
        from_, to = f"model.layers.{i}.linear_attn", f"blocks.{i}.mixer"
        ours |= block(w, i) | {
            f"{to}.qkv.weight": joined(w, from_, "qkv"),
            f"{to}.gate.weight": w[f"{from_}.g_proj.weight"],
            f"{to}.beta_decay.weight": joined(w, from_, "ba"),
            f"{to}.conv": w[f"{from_}.conv1d.weight"].squeeze(1),
            f"{to}.A_log": w[f"{from_}.A_log"],
            f"{to}.dt_bias": w[f"{from_}.dt_bias"],
            f"{to}.norm.weight": w[f"{from_}.o_norm.weight"],
            f"{to}.out.weight": w[f"{from_}.o_proj.weight"],
        }
    from_, to = "model.layers.3.self_attn", "blocks.3.mixer"
    ours |= block(w, 3, ("post_attention_layernorm", "post_feedforward_layernorm")) | {
        f"{to}.qkv.weight": joined(w, from_, "qkv"),
        f"{to}.q_norm.weight": w[f"{from_}.q_norm.weight"],
        f"{to}.k_norm.weight": w[f"{from_}.k_norm.weight"],
        f"{to}.out.weight": w[f"{from_}.o_proj.weight"],
    }
    linear = {
        "heads": 2,
        "head_dim": 6,
        "value_head_dim": 12,
        "negative_eigenvalues": True,
        "norm_eps": 1e-5,
    }
    full = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "rotary_fraction": 0.0,
        "qk_norm_over": "heads",
        "output_gate": False,
    }
    config = ModelConfig(
        layers=4,
        dim=24,
        mlp_dim=40,
        tie_embeddings=False,
        post_norm=["attention"],
        mixers={"gated_deltanet": linear, "attention": full},
    )
    return theirs, config, ours


def joined(w: Weights, module: str, letters: str) -> Tensor:
    return torch.cat([w[f"{module}.{letter}_proj.weight"] for letter in letters])


def outside(w: Weights) -> Weights:
    return {
        "embedding.weight": w["model.embed_tokens.weight"],
        "norm.weight": w["model.norm.weight"],
        "head.weight": w["lm_head.weight"],
    }


def block(
    w: Weights, i: int, norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
) -> Weights:
    """A block without its mixer."""
    from_, to = f"model.layers.{i}", f"blocks.{i}"
    up = [w[f"{from_}.mlp.gate_proj.weight"], w[f"{from_}.mlp.up_proj.weight"]]
    return {
        f"{to}.mixer_norm.weight": w[f"{from_}.{norms[0]}.weight"],
        f"{to}.mlp_norm.weight": w[f"{from_}.{norms[1]}.weight"],
        f"{to}.mlp.up.weight": torch.cat(up),
        f"{to}.mlp.out.weight": w[f"{from_}.mlp.down_proj.weight"],
    }


@pytest.mark.parametrize("make", [llama, qwen3_next, olmo_hybrid])
def test_a_whole_model(make: Callable[[], tuple[nn.Module, ModelConfig, Weights]]) -> None:
    theirs, config, weights = make()
    mixers.check(config)
    ours = Model(config, 50)
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in weights.items()
    }
    ids = torch.randint(0, 50, (TOKENS,), generator=torch.Generator().manual_seed(4))

    def run_theirs(_: Tensor) -> Tensor:
        return theirs(ids.unsqueeze(0)).logits[0]

    def run_ours(_: Tensor) -> Tensor:
        return functional_call(ours, weights, (ids, None, shard([TOKENS], "cpu")))

    compare(run_theirs, run_ours, torch.empty(0), parts(theirs))

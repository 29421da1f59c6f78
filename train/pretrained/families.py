"""Families of models that transformers has too: whether a model of ours is one, and its settings.

A family is a row of a table: what its layers have and lack. From the row follow what keeps a
model of ours from being one, and the settings of `config.json` (`described` reads those of theirs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from data.settings import dump
from train.model import mixers, mlps
from train.model.config import ModelConfig
from train.model.mlps import experts, swiglu

OWN = "headrace"  # model_type of what transformers does not have
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
# The settings that all attention layers, or all linear ones, of a family have in common.
_ALIKE = {
    "attention": ("heads", "kv_heads", "head_dim", "rotary_fraction", "rotary_theta"),
    "gated_deltanet": (
        "heads",
        "value_heads",
        "head_dim",
        "value_head_dim",
        "conv_size",
        "negative_eigenvalues",
    ),
}


@dataclass(frozen=True)
class Family:
    """What the models of one `model_type` have.

    linear: layers may be Gated DeltaNet. fused: their projections lie together by key head.
    routed: layers may have experts instead of a dense MLP.
    post_norm: blocks that attend norm what mixer and MLP give. free_head_dim: heads may be of
    another width than hidden_size / heads. gated_eps: of the norm after Gated DeltaNet, where
    it is written into the code; None is that of all norms. norm_eps: where a config.json says
    nothing. own_tokenizer: whose AutoTokenizer
    takes for granted.
    """

    name: str
    architecture: str
    linear: bool = False
    fused: bool = False
    routed: bool = False
    qk_norm: Literal["head", "heads"] | None = None
    bias: bool = False
    gate: bool = False
    zero_centered: bool = False
    post_norm: bool = False
    rotary: Literal["all", "part", "all or none"] = "all"
    windows: Literal["none", "all", "some"] = "none"
    free_head_dim: bool = True
    negative_eigenvalues: bool = False
    gated_eps: float | None = None
    norm_eps: float = 1e-6
    own_tokenizer: str | None = None

    def faults(self, config: ModelConfig) -> list[str]:
        """Why `config` is none of these: a line a setting; empty if it is one."""
        found: list[str] = []
        first: dict[tuple[str, str], tuple[str, Any]] = {}
        for name, kind, settings in layers(config):
            if kind == "attention":
                found += self._attention_faults(config, name, settings)
            elif kind == "gated_deltanet" and self.linear:
                found += self._linear_faults(config, name, settings)
            else:
                found.append(f"model.pattern names {name!r}, which {self._is_none('layer')}")
                continue
            keys = _ALIKE[kind]
            if kind == "attention" and settings.window is not None:
                keys = (*keys, "window")
            for key in keys:
                value = getattr(settings, key)
                other, held = first.setdefault((kind, key), (name, value))
                if held != value:
                    found.append(
                        f"model.mixers.{name}.{key} is {dump(value)} and model.mixers.{other}."
                        f"{key} {dump(held)}; all layers of {self.name} have the same"
                    )
        found += self._mlp_faults(config)
        return list(dict.fromkeys([*found, *self._depth_faults(config)]))

    def _is_none(self, what: str) -> str:
        return f"is no {what} of {self.name}"

    def _attention_faults(self, config: ModelConfig, name: str, settings: Any) -> Iterator[str]:
        wanted: dict[str, Any] = {
            "qk_norm": self.qk_norm is not None,
            "qkv_bias": self.bias,
            "output_gate": self.gate,
            "conv_size": 0,
        }
        if self.qk_norm and settings.qk_norm:
            wanted["qk_norm_over"] = self.qk_norm
        if self.rotary == "all" or (self.rotary == "all or none" and settings.rotary_fraction):
            wanted["rotary_fraction"] = 1.0
        if self.windows == "none":
            wanted["window"] = None
        if not self.free_head_dim:
            wanted["head_dim"] = config.dim / settings.heads
        for key, value in wanted.items():
            held = getattr(settings, key)
            if held != value:
                yield self._fault(f"mixers.{name}.{key}", held, dump(value))
        if self.name == "llama" and config.dim % settings.heads:
            yield self._fault(f"mixers.{name}.heads", settings.heads, "a divisor of model.dim")
        if (name in config.post_norm) != self.post_norm:
            wish = f"[{name}]" if self.post_norm else "[]"
            yield self._fault("post_norm", config.post_norm, wish)

    def _linear_faults(self, config: ModelConfig, name: str, settings: Any) -> Iterator[str]:
        if settings.conv_size < 1:
            yield self._fault(f"mixers.{name}.conv_size", settings.conv_size, "at least 1")
        if settings.negative_eigenvalues and not self.negative_eigenvalues:
            yield self._fault(f"mixers.{name}.negative_eigenvalues", True, "false")
        eps = settings.norm_eps or config.norm_eps
        if eps != (self.gated_eps or config.norm_eps):
            yield self._fault(
                f"mixers.{name}.norm_eps", eps, dump(self.gated_eps or config.norm_eps)
            )
        if name in config.post_norm:
            yield self._fault("post_norm", config.post_norm, f"without {name}")

    def _mlp_faults(self, config: ModelConfig) -> Iterator[str]:
        first: dict[Any, tuple[str, Any]] = {}
        for name in dict.fromkeys(config.mlp_blocks):
            module, settings = mlps.resolve(name, config)
            if module is not swiglu and not (self.routed and module is experts):
                yield f"model.mlp_pattern names {name!r}, which {self._is_none('MLP')}"
                continue
            other, held = first.setdefault(module, (name, settings))
            if settings != held:
                yield f"model.mlps.{name} is not as {other}; those of {self.name} are alike"
            if module is experts:
                yield from self._expert_faults(name, settings)

    def _expert_faults(self, name: str, settings: experts.Config) -> Iterator[str]:
        wanted: dict[str, Any] = {
            "router": "softmax",
            "of_chosen": False,
            "bias": False,
            "groups": 1,
            "scaling": 1.0,
            "activation": "swiglu",
            "latent": 0,
            "shared_gate": True,
        }
        for key, value in wanted.items():
            held = getattr(settings, key)
            if held != value:
                yield self._fault(f"mlps.{name}.{key}", held, dump(value))
        # Below half a unit in the last place of the smallest sum, 1 / 4096, it changes nothing.
        if settings.normalise and settings.normalise_eps > 1e-12:
            yield self._fault(f"mlps.{name}.normalise_eps", settings.normalise_eps, "0")

    def _depth_faults(self, config: ModelConfig) -> Iterator[str]:
        laid = list(layers(config))
        if self.windows == "all" and any(
            kind == "attention" and settings.window is None for _, kind, settings in laid
        ):
            yield f"model.mixers.attention.window is null; in {self.name} it is a number"
        kinds = {kind for _, kind, _ in laid}
        if self.linear and "attention" not in kinds:
            yield self._fault("pattern", config.pattern, "with attention")
        if self.name == "olmo_hybrid" and "gated_deltanet" not in kinds:
            yield self._fault("pattern", config.pattern, "with gated_deltanet")

    def _fault(self, key: str, held: Any, wanted: str) -> str:
        return f"model.{key} is {dump(held)}; in {self.name} it is {wanted}"

    def describe(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of `config.json` that say what the layers are."""
        laid = list(layers(config))
        inside = {module: settings for module, settings in _mlps(config)}
        dense = inside.get(swiglu, swiglu.Config())
        found: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.name,
            "hidden_size": config.dim,
            "intermediate_size": swiglu.hidden(config, dense),
            "num_hidden_layers": config.layers,
            "hidden_act": "silu",
            "initializer_range": config.init_std,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
        }
        attending = [settings for _, kind, settings in laid if kind == "attention"]
        linear = [settings for _, kind, settings in laid if kind == "gated_deltanet"]
        if attending:
            found |= self._describe_attention(attending)
        if linear:
            found |= {
                "linear_num_key_heads": linear[0].heads,
                "linear_num_value_heads": linear[0].value_heads,
                "linear_key_head_dim": linear[0].head_dim,
                "linear_value_head_dim": linear[0].value_head_dim,
                "linear_conv_kernel_dim": linear[0].conv_size,
            }
            if self.negative_eigenvalues:
                found["linear_allow_neg_eigval"] = linear[0].negative_eigenvalues
        if self.linear or self.windows == "some":
            found["layer_types"] = [_layer_type(kind, settings) for _, kind, settings in laid]
        if self.routed:
            found |= self._describe_experts(config, inside.get(experts))
        return found

    def _describe_experts(
        self, config: ModelConfig, settings: experts.Config | None
    ) -> dict[str, Any]:
        plain = [layer for layer, (module, _) in enumerate(_mlps(config)) if module is swiglu]
        found: dict[str, Any] = {"mlp_only_layers": plain, "decoder_sparse_step": 1}
        if settings is None:
            return found | {"num_experts": 0}
        return found | {
            "num_experts": settings.experts,
            "num_experts_per_tok": settings.chosen,
            "moe_intermediate_size": experts.hidden(config, settings),
            "shared_expert_intermediate_size": settings.shared_dim,
            "norm_topk_prob": settings.normalise,
        }

    def _describe_attention(self, attending: list[Any]) -> dict[str, Any]:
        first = attending[0]
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": first.rotary_theta}
        if self.rotary == "part":
            turned = 2 * round(first.rotary_fraction * first.head_dim / 2)
            rope["partial_rotary_factor"] = turned / first.head_dim
        elif not first.rotary_fraction:
            rope["rope_theta"] = None
        found = {
            "num_attention_heads": first.heads,
            "num_key_value_heads": first.kv_heads,
            "rope_parameters": rope,
        }
        if self.free_head_dim:
            found["head_dim"] = first.head_dim
        if self.windows != "none":
            window = next((settings.window for settings in attending if settings.window), None)
            found["sliding_window"] = window
            if self.windows == "some":
                found["use_sliding_window"] = window is not None
        return found


FAMILIES = [
    Family("llama", "LlamaForCausalLM"),
    Family("mistral", "MistralForCausalLM", windows="all"),
    Family("qwen2", "Qwen2ForCausalLM", bias=True, windows="some", own_tokenizer="Qwen2"),
    Family("qwen3", "Qwen3ForCausalLM", qk_norm="head", windows="some"),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        qk_norm="heads",
        post_norm=True,
        free_head_dim=False,
        norm_eps=1e-5,
    ),
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        linear=True,
        fused=True,
        routed=True,
        qk_norm="head",
        gate=True,
        zero_centered=True,
        rotary="part",
    ),
    Family(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        linear=True,
        qk_norm="heads",
        post_norm=True,
        rotary="all or none",
        free_head_dim=False,
        negative_eigenvalues=True,
        gated_eps=1e-5,
    ),
]


def named(name: str) -> Family | None:
    """The family of a `model_type`."""
    return next((family for family in FAMILIES if family.name == name), None)


def nearest(config: ModelConfig) -> tuple[Family, list[str]]:
    """The family that `config` is, or the one from which the fewest settings keep it."""
    found = [(family, family.faults(config)) for family in FAMILIES]
    return min(found, key=lambda one: len(one[1]))


def layers(config: ModelConfig) -> Iterator[tuple[str, str, Any]]:
    """Name, kind and settings of every block's mixer."""
    resolved = {name: mixers.resolve(name, config) for name in config.pattern}
    for name in config.blocks:
        module, settings = resolved[name]
        yield name, module.__name__.rpartition(".")[2], settings


def _mlps(config: ModelConfig) -> Iterator[tuple[Any, Any]]:
    """Kind and settings of every block's MLP."""
    resolved = {name: mlps.resolve(name, config) for name in config.mlp_blocks}
    return (resolved[name] for name in config.mlp_blocks)


def _layer_type(kind: str, settings: Any) -> str:
    if kind == "gated_deltanet":
        return LINEAR
    return FULL if settings.window is None else SLIDING

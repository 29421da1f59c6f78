"""Settings of ours for what a config.json says: every value is seen to be of its kind and size."""

from __future__ import annotations

from typing import Any

from data.settings import ConfigError
from data.tokens.beside import shown
from train.pretrained.families import FULL, LINEAR, SLIDING, Family

MOST = 1 << 24  # any size: more is a slip of the pen, and would take the memory of the description
MOST_LAYERS = 1 << 12


class Described:
    """The keys of a config.json. Null is as good as missing.

    Raises:
        ConfigError: by every method, naming the key, its value and what it must be.
    """

    def __init__(self, held: dict[str, Any]) -> None:
        self.held = held

    def __contains__(self, key: str) -> bool:
        return key in self.held

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._fault(key, f"a whole number from {least} to {most}")
        return value

    def whole_or_none(self, key: str, most: int = MOST) -> int | None:
        return None if self.held.get(key) is None else self.whole(key, most=most)

    def number(
        self, key: str, default: float | None = None, least: float = 0.0, most: float = 1e30
    ) -> float:
        value = self._value(key, default)
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        # Compared as it is: the largest integers are no floats. NaN is not within anything.
        if not (known and least <= value <= most):
            raise self._fault(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._fault(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._fault(key, "text")
        return value

    def mapping(self, key: str) -> Described:
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self._fault(key, "a mapping")
        return Described(value)

    def each(self, key: str, kind: type) -> list[Any]:
        """A list whose items are all of a kind; empty if there is none."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._fault(key, f"a list of {'text' if kind is str else 'whole numbers'}")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.held.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{key} is missing")
        return value

    def _fault(self, key: str, wanted: str) -> ConfigError:
        return ConfigError(f"{key} is {shown(self.held[key])}; it must be {wanted}")


def settings(family: Family, held: dict[str, Any]) -> dict[str, Any]:
    """The settings of `model` for the config.json of one of the family.

    Raises:
        ConfigError: naming a key that is missing, malformed, or that our layers cannot express.
    """
    said = Described(held)
    for key, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if held.get(key) not in (wanted, None):
            raise ConfigError(f"{key} is {shown(held[key])}; here it is {shown(wanted)}")
    kinds = _layer_types(family, said)
    if LINEAR in kinds and not family.linear:
        raise ConfigError(f"layer_types names {LINEAR}, which is no layer of {family.name}")
    # A model that attends in two ways has two names for it.
    local = "local_attention" if FULL in kinds else "attention"
    names = {FULL: "attention", SLIDING: local, LINEAR: "gated_deltanet"}
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(kinds):
        if kind == LINEAR:
            found[names[kind]] = _linear(family, said)
            continue
        found[names[kind]] = _attention(family, said)
        if kind == SLIDING:
            found[local]["window"] = said.whole("sliding_window", 4096)
            found[local] |= {} if local == "attention" else {"kind": "attention"}
    inside = _mlps(family, said)
    return {
        "pattern": _period([names[kind] for kind in kinds]),
        "layers": len(kinds),
        "dim": said.whole("hidden_size"),
        "mlp_dim": said.whole("intermediate_size"),
        "tie_embeddings": said.flag("tie_word_embeddings", False),
        "init_std": said.number("initializer_range", 0.02),
        "norm_eps": said.number("rms_norm_eps", family.norm_eps),
        "zero_centered_norms": family.zero_centered,
        "post_norm": ["attention"] if family.post_norm else [],
        "max_positions": said.whole_or_none("max_position_embeddings", most=1 << 40),
        "mixers": found,
        "mlp_pattern": _period(inside),
        "mlps": {"experts": _experts(said)} if "experts" in inside else {},
    }


def _attention(family: Family, said: Described) -> dict[str, Any]:
    rope = said.mapping("rope_parameters" if said.held.get("rope_parameters") else "rope_scaling")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind != "default":
        raise ConfigError(f"rope_type is {shown(kind)}; here wavelengths are as in 'default'")
    none = family.rotary == "all or none" and "rope_parameters" in said
    theta = 0.0 if none else said.number("rope_theta", 10000.0, least=1.0)
    theta = rope.number("rope_theta", theta, least=0.0 if none else 1.0)
    fraction = 1.0 if theta else 0.0
    if family.rotary == "part":
        part = said.number("partial_rotary_factor", 0.25, most=1.0)
        fraction = rope.number("partial_rotary_factor", part, most=1.0)
    heads, dim = said.whole("num_attention_heads"), said.whole("hidden_size")
    own = said.whole_or_none("head_dim") if family.free_head_dim else None
    if own is None and heads > dim:
        raise ConfigError(f"num_attention_heads is {heads}, more than hidden_size, {dim}")
    return {
        "heads": heads,
        "kv_heads": said.whole("num_key_value_heads", heads),
        "head_dim": own or dim // heads,
        "rotary_fraction": fraction,
        "rotary_theta": theta or 10000.0,
        "qk_norm": family.qk_norm is not None,
        "qk_norm_over": family.qk_norm or "head",
        "qkv_bias": family.bias,
        "output_gate": family.gate,
    }


def _linear(family: Family, said: Described) -> dict[str, Any]:
    found: dict[str, Any] = {
        "heads": said.whole("linear_num_key_heads"),
        "value_heads": said.whole("linear_num_value_heads"),
        "head_dim": said.whole("linear_key_head_dim"),
        "value_head_dim": said.whole("linear_value_head_dim"),
        "conv_size": said.whole("linear_conv_kernel_dim", 4),
    }
    if family.negative_eigenvalues:
        found["negative_eigenvalues"] = said.flag("linear_allow_neg_eigval", True)
    if family.gated_eps:
        found["norm_eps"] = family.gated_eps
    return found


def _layer_types(family: Family, said: Described) -> list[str]:
    """The kind of every layer, also where config.json leaves it to a rule."""
    count = said.whole("num_hidden_layers", most=MOST_LAYERS)
    given = said.each("layer_types", str)
    if family.linear:
        every = said.whole("full_attention_interval", 4)
        rule = [LINEAR if (layer + 1) % every else FULL for layer in range(count)]
    elif family.windows == "all":
        none = "sliding_window" in said and said.whole_or_none("sliding_window") is None
        return [FULL if none else SLIDING] * count
    elif family.windows == "none" or not said.flag("use_sliding_window", False):
        return [FULL] * count
    else:
        first = said.whole("max_window_layers", 28, least=0)
        rule = [SLIDING if layer >= first else FULL for layer in range(count)]
    kinds = given or rule
    if len(kinds) != count:
        raise ConfigError(f"layer_types names {len(kinds)} layers; num_hidden_layers is {count}")
    for kind in kinds:
        if kind not in (FULL, SLIDING, LINEAR):
            raise ConfigError(
                f"layer_types names {shown(kind)}, which is no layer of {family.name}"
            )
        if kind == SLIDING and family.windows == "none":
            raise ConfigError(f"layer_types names {kind}, which is no layer of {family.name}")
    return kinds


def _mlps(family: Family, said: Described) -> list[str]:
    """The kind of every layer's MLP."""
    count = said.whole("num_hidden_layers", most=MOST_LAYERS)
    if not family.routed or not said.whole("num_experts", 512, least=0):
        return ["swiglu"] * count
    every, dense = said.whole("decoder_sparse_step", 1), set(said.each("mlp_only_layers", int))
    return [
        "swiglu" if layer in dense or (layer + 1) % every else "experts" for layer in range(count)
    ]


def _experts(said: Described) -> dict[str, Any]:
    return {
        "experts": said.whole("num_experts", 512),
        "chosen": said.whole("num_experts_per_tok", 10),
        "dim": said.whole("moe_intermediate_size", 512),
        "shared_dim": said.whole("shared_expert_intermediate_size", 512),
        "shared_gate": True,
        "normalise": said.flag("norm_topk_prob", True),
    }


def _period(names: list[str]) -> list[str]:
    """The shortest pattern that, repeated, gives these."""
    for length in range(1, len(names)):
        if all(name == names[i % length] for i, name in enumerate(names)):
            return names[:length]
    return names

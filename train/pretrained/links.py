"""Which rows of which tensors of a family are which of ours; read either way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train.model.mixers.attention import Mixer as Attention
from train.model.mixers.gated_deltanet import Mixer as GatedDeltaNet
from train.model.mlps import experts, swiglu
from train.model.transformer import Block, Model
from train.pretrained import weights
from train.pretrained.families import Family

Read = Callable[[str], Tensor]


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Link:
    """Tensors of ours and of theirs whose rows, end to end, are the same up to their order.

    ours, theirs: rows by name. order: our row i is their row order[i]; None is the same order.
    stack: if above 0, our tensors are stacks of so many matrices, whose rows come one matrix after
    the other. forth, back: what besides is done to each tensor on the way to them and from them.
    spellings: other names and cuts of theirs that files have.
    """

    ours: Mapping[str, int]
    theirs: Mapping[str, int]
    order: Tensor | None = None
    stack: int = 0
    forth: Callable[[Tensor], Tensor] = _as_it_is
    back: Callable[[Tensor], Tensor] = _as_it_is
    spellings: tuple[Mapping[str, int], ...] = ()

    def found(self, tensors: weights.Tensors) -> Link:
        """The link to what a file holds; as it is, if that has none of the spellings."""
        named = [
            theirs
            for theirs in (self.theirs, *self.spellings)
            if all(name in tensors for name in theirs)
        ]
        for theirs in named:
            if all(
                rows == -1 or tensors.shape(name)[:1] == [rows] for name, rows in theirs.items()
            ):
                return replace(self, theirs=theirs)
        return replace(self, theirs=named[0]) if named else self

    def to_theirs(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Their tensors by name, from ours."""
        rows = _joined([self._flat(read(name)) for name in self.ours])
        if self.order is not None:
            placed = torch.empty_like(rows)
            placed[self.order] = rows
            rows = placed
        for name, part in zip(self.theirs, rows.split(_sizes(self.theirs, rows)), strict=True):
            yield name, self.forth(part).contiguous()

    def to_ours(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        """Our tensors by name, from theirs."""
        rows = _joined([self.back(read(name)) for name in self.theirs])
        if self.order is not None:
            rows = rows[self.order]
        for name, part in zip(self.ours, rows.split(_sizes(self.ours, rows)), strict=True):
            yield name, self._stacked(part).contiguous()

    def _flat(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.stack else x  # (stack, m, n) -> (stack · m, n)

    def _stacked(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.stack, -1)) if self.stack else rows


def links(model: Model, family: Family) -> Iterator[Link]:
    """All links between a model of ours (it may be on `meta`) and one of the family."""
    config = model.config
    centre = config.zero_centered_norms, family.zero_centered
    yield _same("embedding.weight", "model.embed_tokens.weight")
    for layer, block in enumerate(model.blocks):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for name, spelled in zip(("mixer_norm", "mlp_norm"), _norms(family, block), strict=True):
            first, *others = (f"{theirs}.{spelling}.weight" for spelling in spelled)
            link = _norm(f"{ours}.{name}.weight", first, *centre)
            yield replace(link, spellings=tuple({other: -1} for other in others))
        if isinstance(block.mlp, experts.MLP):
            yield from _experts(block.mlp, f"{ours}.mlp", f"{theirs}.mlp")
        elif isinstance(block.mlp, swiglu.MLP):
            yield from _swiglu(block.mlp.out.in_features, f"{ours}.mlp", f"{theirs}.mlp")
        if isinstance(block.mixer, Attention):
            places = f"{ours}.mixer", f"{theirs}.self_attn"
            yield from _attention(block.mixer, family, *places, centre)
        elif isinstance(block.mixer, GatedDeltaNet):
            yield from _gated_deltanet(
                block.mixer, family, f"{ours}.mixer", f"{theirs}.linear_attn"
            )
    # The last norm's weight takes over what μP divides the hidden states by.
    yield _norm("norm.weight", "model.norm.weight", *centre, divisor=model.width)
    if not config.tie_embeddings:
        yield _same("head.weight", "lm_head.weight")


def _swiglu(hidden: int, ours: str, theirs: str) -> Iterator[Link]:
    yield _join(f"{ours}.up.weight", theirs, {"gate_proj": hidden, "up_proj": hidden})
    yield _same(f"{ours}.out.weight", f"{theirs}.down_proj.weight")


def _experts(mlp: experts.MLP, ours: str, theirs: str) -> Iterator[Link]:
    """Our stacks of matrices, and a module of theirs for each expert."""
    count, up, out = len(mlp.up.weight), mlp.hidden, mlp.out.weight.shape[1]
    yield _same(f"{ours}.router.weight", f"{theirs}.gate.weight")
    for name, rows in (("up", {"gate_proj": up, "up_proj": up}), ("out", {"down_proj": out})):
        every = {
            f"{theirs}.experts.{expert}.{part}.weight": size
            for expert in range(count)
            for part, size in rows.items()
        }
        yield Link({f"{ours}.{name}.weight": -1}, every, stack=count)
    yield from _swiglu(mlp.shared_dim, f"{ours}.shared", f"{theirs}.shared_expert")
    yield _same(f"{ours}.shared.gate.weight", f"{theirs}.shared_expert_gate.weight")


def _attention(
    mixer: Attention, family: Family, ours: str, theirs: str, centre: tuple[bool, bool]
) -> Iterator[Link]:
    q, k, v = mixer.widths
    if family.gate:  # a head's query and gate together
        yield Link(
            {f"{ours}.qkv.weight": q + k + v, f"{ours}.gate.weight": q},
            {
                f"{theirs}.{letter}_proj.weight": n
                for letter, n in zip("qkv", (2 * q, k, v), strict=True)
            },
            _gated_order(mixer),
        )
    else:
        projections = {"q_proj": q, "k_proj": k, "v_proj": v}
        yield _join(f"{ours}.qkv.weight", theirs, projections)
        if family.bias:
            yield _join(f"{ours}.qkv.bias", theirs, projections, "bias")
    if family.qk_norm:
        for part in ("q_norm.weight", "k_norm.weight"):
            yield _norm(f"{ours}.{part}", f"{theirs}.{part}", *centre)
    yield _same(f"{ours}.out.weight", f"{theirs}.o_proj.weight")


def _gated_deltanet(mixer: GatedDeltaNet, family: Family, ours: str, theirs: str) -> Iterator[Link]:
    q, k, v = mixer.widths
    heads = mixer.value_heads
    if family.fused:  # all that belongs to a key head together
        group = heads // mixer.heads
        parts = [mixer.head_dim] * 2 + [group * mixer.value_head_dim] * 2
        yield Link(
            {f"{ours}.qkv.weight": q + k + v, f"{ours}.gate.weight": v},
            {f"{theirs}.in_proj_qkvz.weight": q + k + 2 * v},
            _by_part(mixer.heads, parts),
        )
        yield Link(
            {f"{ours}.beta_decay.weight": 2 * heads},
            {f"{theirs}.in_proj_ba.weight": 2 * heads},
            _by_part(mixer.heads, [group, group]),
        )
    else:
        yield _join(f"{ours}.qkv.weight", theirs, {"q_proj": q, "k_proj": k, "v_proj": v})
        yield _join(f"{ours}.beta_decay.weight", theirs, {"b_proj": heads, "a_proj": heads})
        yield _same(f"{ours}.gate.weight", f"{theirs}.g_proj.weight")
    whole = {f"{theirs}.conv1d.weight": q + k + v}
    apart = [f"{theirs}.{letter}_conv1d.weight" for letter in "qkv"]
    # transformers cuts its one tensor into equal parts when it saves, whatever their widths.
    part = -(-(q + k + v) // 3)
    spellings = [
        dict(zip(apart, (q, k, v), strict=True)),
        dict(zip(apart, (part, part, q + k + v - 2 * part), strict=True)),
        whole,
    ]
    yield Link(
        {f"{ours}.conv": q + k + v},
        whole if family.fused else spellings[0],
        forth=lambda filters: filters.unsqueeze(1),
        back=lambda filters: filters.squeeze(1),
        spellings=() if family.fused else tuple(spellings[1:]),
    )
    norm, out = ("norm", "out_proj") if family.fused else ("o_norm", "o_proj")
    for one, other in (
        ("A_log", "A_log"),
        ("dt_bias", "dt_bias"),
        ("norm.weight", f"{norm}.weight"),
        ("out.weight", f"{out}.weight"),
    ):
        yield _same(f"{ours}.{one}", f"{theirs}.{other}")


def _norms(family: Family, block: Block) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the norms of a block's mixer and MLP in files: as written first, then others.

    OLMo Hybrid's files have names of their own for the norms of its linear blocks. transformers
    renames them, and when it saves renames one of the attention blocks with them.
    """
    if family.linear and not family.fused:
        if block.post_norm:
            mixer = ("post_attention_layernorm", "feedforward_layer_norm")
            return mixer, ("post_feedforward_layernorm",)
        mlp = ("feedforward_layer_norm", "post_attention_layernorm")
        return ("attention_layer_norm", "input_layernorm"), mlp
    if block.post_norm:
        return ("post_attention_layernorm",), ("post_feedforward_layernorm",)
    return ("input_layernorm",), ("post_attention_layernorm",)


def _same(ours: str, theirs: str) -> Link:
    return Link({ours: -1}, {theirs: -1})


def _join(ours: str, module: str, rows: Mapping[str, int], what: str = "weight") -> Link:
    """One tensor of ours from several projections of a module of theirs."""
    return Link({ours: -1}, {f"{module}.{name}.{what}": count for name, count in rows.items()})


def _norm(ours: str, theirs: str, ours_zero: bool, theirs_zero: bool, divisor: float = 1) -> Link:
    """A norm's weight: what it scales by, less one where it is zero-centred.

    Between 0.5 and 2 the difference is exact in floating point (Sterbenz).
    """

    def forth(weight: Tensor) -> Tensor:
        if ours_zero == theirs_zero and divisor == 1:
            return weight
        scale = (weight.double() + float(ours_zero)) / divisor
        return (scale - float(theirs_zero)).to(weight.dtype)

    return Link({ours: -1}, {theirs: -1}, forth=forth)


def _gated_order(mixer: Attention) -> Tensor:
    """q, k, v, gate from their q and gate by turns of a head, k, v."""
    q, k, v = mixer.widths
    rows = torch.arange(2 * q + k + v)
    query, gate = rows[: 2 * q].unflatten(0, (mixer.heads, 2, mixer.head_dim)).unbind(1)
    return torch.cat([query.flatten(), rows[2 * q :], gate.flatten()])


def _by_part(groups: int, parts: list[int]) -> Tensor:
    """First the first part of every group, then the second, from group by group."""
    rows = torch.arange(groups * sum(parts)).unflatten(0, (groups, sum(parts)))
    return torch.cat([part.flatten() for part in rows.split(parts, dim=1)])


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _sizes(rows: Mapping[str, int], joined: Tensor) -> list[int]:
    """Rows of each tensor; a single one has all there are."""
    return [len(joined)] if len(rows) == 1 else list(rows.values())

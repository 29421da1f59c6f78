"""The model: causal, sequence by sequence, and the same when it goes on from its caches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from data.settings import ConfigError
from parallel import shard
from train.evaluation.generate import generate
from train.model import mixers
from train.model.config import ModelConfig
from train.model.transformer import Model

VOCABULARY = 61
CONFIG = ModelConfig(
    pattern=["gated_deltanet", "local", "attention"],
    layers=3,
    dim=24,
    mixers={
        "gated_deltanet": {"heads": 2, "value_heads": 4, "head_dim": 8, "value_head_dim": 6},
        "attention": {"heads": 4, "kv_heads": 2, "head_dim": 6, "rotary_fraction": 0.5},
        "local": {
            "kind": "attention",
            "heads": 2,
            "head_dim": 8,
            "window": 5,
            "rotary_fraction": 0.0,
            "output_gate": False,
            "qk_norm": False,
        },
    },
)


def make(**changes: object) -> Model:
    torch.manual_seed(1)
    # Larger weights than a fresh model's, so that every part has its say.
    return Model(dataclasses.replace(CONFIG, init_std=0.3, **changes), VOCABULARY)  # type: ignore[arg-type]


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def logits(model: Model, ids: torch.Tensor, *lengths: int) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, None, shard(lengths, "cpu"))


def test_packed_sequences_are_as_if_alone() -> None:
    model, lengths = make(), (1, 63, 2, 65, 3)
    ids = tokens(sum(lengths))
    packed = logits(model, ids, *lengths)
    for alone, part in zip(ids.split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(part, logits(model, alone, len(alone)), rtol=0, atol=1e-4)


def test_a_later_token_changes_no_earlier_output() -> None:
    model, ids = make(), tokens(70)
    changed = ids.clone()
    changed[40] = (changed[40] + 1) % VOCABULARY
    before, after = logits(model, ids, 70), logits(model, changed, 70)
    assert torch.equal(before[:40], after[:40])
    assert not torch.allclose(before[40:], after[40:])


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_logits(tied: bool) -> None:
    model = make(tie_embeddings=tied, z_loss=1e-2)
    ids, labels = tokens(66), tokens(66, seed=1)
    labels[::3] = -100
    part = shard([66], "cpu")
    loss, cross_entropy = model(ids, labels, part)
    z = model(ids, None, part)
    wanted = F.cross_entropy(z, labels, reduction="sum", ignore_index=-100)
    penalty = 1e-2 * (z.logsumexp(-1) ** 2)[labels >= 0].sum()
    torch.testing.assert_close(cross_entropy, wanted.detach(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(loss, wanted + penalty, rtol=1e-5, atol=1e-3)
    names = [name for name, _ in model.named_parameters()]
    assert ("head.weight" in names) == (not tied)
    got = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, right in zip(
        got, torch.autograd.grad(wanted + penalty, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(gradient, right, rtol=1e-3, atol=1e-2)


def test_decoding_by_pieces_gives_the_logits_of_one_forward() -> None:
    """Prefill of 63, then one token at a time, then a piece of 4."""
    model, ids = make(), tokens(80)
    whole = logits(model, ids, 80)
    cache, seen, parts = model.new_cache(), 0, []
    with torch.no_grad():
        for size in (63, *[1] * 13, 4):
            here = shard([size], "cpu", start=seen)
            parts.append(model(ids[seen : seen + size], None, here, cache))
            seen += size
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)
    assert cache[0]["state"].shape == (1, 4, 8, 6)  # constant, however long the text
    assert cache[1]["k"].shape[1] == 4  # the window, but for the token to come


def test_generation_is_greedy_at_temperature_zero_and_seeded_above() -> None:
    class Letters:
        vocab_size, bos_id = VOCABULARY, 0
        end_ids = frozenset({1})

        def encode(self, text: str) -> list[int]:
            return [ord(letter) % VOCABULARY for letter in text]

        def decode(self, ids: list[int]) -> str:
            return ",".join(map(str, ids))

    model = make()
    text = generate(model, Letters(), "abc", 5, temperature=0.0)  # type: ignore[arg-type]
    ids = [0, *map(int, text.split(","))]
    full = logits(model, torch.tensor(ids), len(ids))
    assert full[3:-1].argmax(-1).tolist() == ids[4:]
    once, again = (generate(model, Letters(), "abc", 8, 1.0, seed=3) for _ in range(2))  # type: ignore[arg-type]
    assert once == again


def test_flops_follow_from_the_matrices_and_the_lengths() -> None:
    model = Model(dataclasses.replace(CONFIG, pattern=["attention"], layers=1, mixers={}), 64)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n != "embedding.weight"]
    products = sum(p.numel() for p in matrices) + 64 * 24  # the tied head multiplies too
    pairs = 10 * 11 / 2 + 5 * 6 / 2
    assert model.flops([10, 5]) == 2 * 15 * products + pairs * 4 * (2 * 64 + 2 * 64)
    # Linear layers cost the same however the tokens are cut into sequences.
    linear = Model(dataclasses.replace(CONFIG, pattern=["gated_deltanet"], mixers={}), 64)
    assert linear.flops([15]) == linear.flops([10, 5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ["atention"]}, "model.pattern names 'atention'; the mixers are attention,"),
        ({"mixers": {"attention": {"hedas": 2}}}, "hedas: no such key; did you mean heads?"),
        ({"mixers": {"attention": {"heads": 3, "kv_heads": 2}}}, "kv_heads is 2"),
        ({"mixers": {"retnat": {}}}, "model.mixers.retnat is set, but"),
        ({"post_norm": ["gla"]}, "model.post_norm names 'gla', but model.pattern names only att"),
    ],
)
def test_wrong_mixer_settings_name_the_right_ones(changes: dict, message: str) -> None:
    config = dataclasses.replace(ModelConfig(pattern=["attention"]), **changes)
    with pytest.raises(ConfigError) as error:
        mixers.check(config)
    assert "\n" not in str(error.value)
    assert message in str(error.value)


def test_zero_centred_norms_keep_their_weight_less_one() -> None:
    plain, centred = make(), make(zero_centered_norms=True)
    moved = 0
    for (name, weight), other in zip(plain.named_parameters(), centred.parameters(), strict=True):
        if not torch.equal(weight, other):
            assert name.endswith("norm.weight")
            torch.testing.assert_close(weight, 1 + other)
            moved += 1
    # Two a block, q and k of the attention that has such norms, and the last; not the norm
    # on Gated DeltaNet's output.
    assert moved == 3 * 2 + 2 + 1
    ids = tokens(9)
    torch.testing.assert_close(logits(plain, ids, 9), logits(centred, ids, 9))


def wide(dim: int, base: int | None) -> Model:
    torch.manual_seed(0)
    heads = {"heads": dim // 16, "head_dim": 16}
    pattern = ["attention", "gla"]
    return Model(
        ModelConfig(
            pattern=pattern,
            layers=2,
            dim=dim,
            init_std=0.05,
            mup_base_dim=base,
            mixers={name: heads for name in pattern},
        ),
        VOCABULARY,
    )


def test_mup_scales_matrices_by_their_inputs() -> None:
    plain, scaled = wide(64, None), wide(64, 16)
    assert plain.lr_multipliers() == {}
    multipliers = scaled.lr_multipliers()
    assert set(multipliers.values()) == {1 / 4}
    others = {name for name, _ in scaled.named_parameters() if name not in multipliers}
    matrices = {name for name in others if dict(scaled.named_parameters())[name].dim() == 2}
    # The last reads as many channels at every width.
    assert matrices == {"embedding.weight", "blocks.1.mixer.decay.up.weight"}
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(other, one / 2 if name in multipliers else one)
    # Logits are divided by what the width is more.
    plain.load_state_dict(scaled.state_dict())
    ids = tokens(9)
    torch.testing.assert_close(logits(plain, ids, 9) / 4, logits(scaled, ids, 9))


def movement(dim: int, base: int | None) -> float:
    """How far three steps of Adam move the logits."""
    model, ids, part = wide(dim, base), tokens(65), shard([64], "cpu")
    factor = model.lr_multipliers()
    adam = torch.optim.Adam(
        [{"params": [p], "lr": 1e-2 * factor.get(n, 1)} for n, p in model.named_parameters()]
    )
    before = logits(model, ids[:-1], 64)
    for _ in range(3):
        model(ids[:-1], ids[1:], part)[0].div(64).backward()
        adam.step()
        adam.zero_grad()
    return float((logits(model, ids[:-1], 64) - before).std())


def test_under_mup_a_step_moves_the_logits_alike_at_any_width() -> None:
    small = movement(64, None)
    assert 0.6 < movement(256, 64) / small < 1.6
    assert movement(256, None) / small > 2

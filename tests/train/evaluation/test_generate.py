"""Decoding: the logits of one forward, whatever the chunks of the prompt, in constant memory."""

from __future__ import annotations

import pytest
import torch

from parallel import shard
from train.evaluation.generate import Decoder
from train.model import mixers
from train.model.config import ModelConfig
from train.model.transformer import Model

VOCABULARY, TOKENS = 53, 40
SETTINGS = {"gated_deltanet": {"heads": 2, "head_dim": 8}, "attention": {"heads": 2, "head_dim": 8}}


def make(pattern: list[str], mlp: str = "swiglu") -> Model:
    torch.manual_seed(2)
    # Larger weights than a fresh model's, so that every part has its say.
    config = ModelConfig(
        pattern=pattern,
        layers=2,
        dim=32,
        init_std=0.2,
        mixers={name: SETTINGS[name] for name in set(pattern) & SETTINGS.keys()},
        mlp_pattern=[mlp],
    )
    return Model(config, VOCABULARY).eval()


@pytest.mark.parametrize("linear", [name for name in mixers.names() if name != "attention"])
def test_logits_equal_the_full_forward_at_every_position(linear: str) -> None:
    """Prompts of 1 to 36 tokens in chunks of 8, and every position after them one by one."""
    # Routers choose the same experts, of one token or of a chunk.
    model = make([linear, "attention"], "experts" if linear == "gated_deltanet" else "swiglu")
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, None, shard([TOKENS], "cpu"))
    for prompt in (1, 9, 36):
        decoder = Decoder(model, chunk=8)
        made = [decoder.feed(ids[:prompt].tolist())]
        made += [decoder.feed([token]) for token in ids[prompt:].tolist()]
        torch.testing.assert_close(torch.stack(made), whole[prompt - 1 :], rtol=1e-4, atol=2e-4)


def test_linear_layers_hold_no_more_after_a_longer_text() -> None:
    held = {}
    for pattern in (["gated_deltanet"], ["gated_deltanet", "attention"]):
        decoder = Decoder(make(pattern), chunk=16)
        sizes = []
        for _ in range(3):
            decoder.feed([1] * 20)
            sizes.append(decoder.memory)
        held[len(pattern)] = sizes
    assert held[1][0] == held[1][1] == held[1][2]
    # A layer of keys and values, 2 heads of 8, in fp32, for twenty more tokens.
    assert held[2][2] - held[2][1] == held[2][1] - held[2][0] == 20 * 2 * (2 * 8) * 4


def test_no_logits_are_made_for_the_inside_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.model.transformer import F

    made: list[int] = []
    linear = F.linear

    def counting(x, weight, bias=None):  # type: ignore[no-untyped-def]
        if weight.shape[0] == VOCABULARY:
            made.append(x.shape[0])
        return linear(x, weight, bias)

    model = make(["gated_deltanet"])
    monkeypatch.setattr(F, "linear", counting)
    Decoder(model, chunk=8).feed([3] * 30)
    assert made == [1]

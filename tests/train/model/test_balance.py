"""The balance of experts over a step, against loops (`tests.balance`) and transformers' loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel import World, distribute, shard
from tests.balance import Layer
from tests.streams import Stream, streams
from train.model.config import ModelConfig
from train.model.mlps._balance import Counted
from train.model.mlps._router import Router
from train.model.transformer import Model

VOCABULARY, ALONE = 31, World(0, 1, 0, torch.device("cpu"))
SETTINGS: dict[str, dict[str, Any]] = {
    "sign": {"bias_update": "sign", "router": "sigmoid"},
    "proportional": {"bias_update": "proportional", "bias_rate": 0.02},
    "losses": {"aux_loss": 0.3, "sequence_loss": 0.2, "z_loss": 0.1, "bias_update": "none"},
    "groups": {
        "router": "sigmoid", "groups": 3, "chosen_groups": 2, "aux_loss": 0.3, "sequence_loss": 0.2,
    },
}  # fmt: skip
BALANCE = ("aux_loss", "sequence_loss", "z_loss", "bias_update", "bias_rate")


def make(settings: dict[str, Any], **changes: Any) -> Model:
    """Two layers of six experts, of which a token meets two, with a bias."""
    torch.manual_seed(3)
    config = ModelConfig(
        pattern=["gla"], layers=2, dim=16, init_std=0.3, mlp_pattern=["experts"],
        mixers={"gla": {"heads": 2, "head_dim": 8}},
        mlps={"experts": {"experts": 6, "chosen": 2, "dim": 8, "bias": True, **settings}},
    )  # fmt: skip
    return Model(dataclasses.replace(config, **changes), VOCABULARY)


def routers(model: Model) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def batches() -> list[Stream]:
    """Two of a step; the second one has tokens without a target."""
    made = streams([[9, 1, 14], [7, 12]], VOCABULARY)
    made[1].labels[3:9] = -100
    return made


def went(model: Model, batch: Stream) -> Tensor:
    """Forward, backward and add; the loss."""
    loss = model(*distribute(*batch, ALONE))[0]
    loss.backward()
    model.balance.add()
    return loss.detach()


def end(model: Model, good: bool = True) -> None:
    model.balance.reduce(ALONE)
    model.balance.end(good)


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_those_of_the_definition(name: str) -> None:
    """fp64, to 1e-6: loads and biases are fp32. Three steps of two batches."""
    on = SETTINGS[name]
    ours = make(on).double()
    bare = {key: value for key, value in on.items() if key not in BALANCE}
    plain = make({**bare, "bias_update": "none"}).double()
    wanted = {key: value for key, value in on.items() if key in BALANCE}
    layers = [Layer(router, {"bias_update": "sign"} | wanted) for router in routers(plain)]
    for _ in range(3):
        for batch in batches():
            loss = plain(*distribute(*batch, ALONE))[0]
            loss = loss + sum(layer.losses(batch.labels, batch.cu_seqlens) for layer in layers)
            loss.backward()
            assert float(went(ours, batch)) == pytest.approx(float(loss.detach()), rel=1e-6)
        for (key, mine), one in zip(ours.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, one.grad, rtol=0, atol=1e-5, msg=key)
        counts = [layer.counts.tolist() for layer in layers]
        with torch.no_grad():
            told = [layer.end() for layer in layers]
        end(ours)
        loads = ours.balance.loads()
        assert [load.counts for load in loads.values()] == counts
        for load, values in zip(loads.values(), told, strict=True):
            assert load.losses == pytest.approx({key: values[key] for key in on if key in values})
        for mine, one in zip(routers(ours), routers(plain), strict=True):
            torch.testing.assert_close(mine.choice_bias, one.choice_bias, rtol=0, atol=1e-7)
            torch.testing.assert_close(mine.load, one.load, rtol=0, atol=1e-7)
    if on.get("bias_update") != "none":
        assert all(router.choice_bias.any() for router in routers(ours))


def test_the_auxiliary_loss_is_that_of_transformers() -> None:
    """Where the load of the step before is this step's own. They leave out the division by K."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = make({"aux_loss": 1.0})
    (router, _), k = routers(model), 2
    (_, labels, here), x = distribute(*batches()[1], ALONE), torch.randn(19, 16)
    labels[3:9] = -100
    model.balance.begin(labels, here)
    experts, _ = router(x)
    logits = x @ router.weight.T
    theirs = load_balancing_loss_func((logits,), 6, k, (labels >= 0).long().view(1, -1))
    (wanted,) = torch.autograd.grad(theirs, router.weight)

    router.load.copy_(torch.bincount(experts[labels >= 0].flatten(), minlength=6))
    router.load.div_(router.load.sum())
    model.balance.begin(labels, here)
    router(x)
    mean = model.balance.loss(here) / int((labels >= 0).sum())
    (mine,) = torch.autograd.grad(mean, router.weight)
    assert float(mean.detach()) * k == pytest.approx(float(theirs.detach()), rel=1e-5)
    torch.testing.assert_close(mine * k, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation_changes_nothing_and_keeps_nothing(dtype: torch.dtype) -> None:
    on = {"aux_loss": 0.3, "sequence_loss": 0.2, "z_loss": 0.1}
    once, twice = (make(on, checkpoint_activations=again).to(dtype) for again in (False, True))
    seen = []
    for batch in batches():
        loss = twice(*distribute(*batch, ALONE))[0]
        kept = [router.tally for router in routers(twice)]
        loss.backward()
        # The second run of a router leaves the first one's sums, which have no graph.
        assert all(a is router.tally for a, router in zip(kept, routers(twice), strict=True))
        assert not any(tally.shares.requires_grad for tally in kept)
        twice.balance.add()
        seen.append((float(loss.detach()), float(went(once, batch))))
    for a, b in seen:
        assert a == b
    for (name, a), b in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for model in (once, twice):
        end(model)
    assert once.balance.loads() == twice.balance.loads()
    for a, b in zip(once.buffers(), twice.buffers(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("update", ["sign", "proportional"])
def test_a_step_without_a_target_changes_nothing(update: str) -> None:
    model = make({"bias_update": update, "aux_loss": 0.3, "sequence_loss": 0.2, "z_loss": 0.1})
    for batch in batches():
        went(model, batch)
    end(model)
    before = [buffer.clone() for buffer in model.buffers()]
    assert any(buffer.any() for buffer in before)
    empty = batches()[0]
    empty.labels[:] = -100
    model.zero_grad()
    assert float(went(model, empty)) == 0.0
    end(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(not np.any(load.counts) for load in model.balance.loads().values())
    assert all(not any(load.losses.values()) for load in model.balance.loads().values())


def test_sums_of_fragments_of_any_length() -> None:
    lengths = [1, 700, 256, 3, 257]
    labels, here = torch.zeros(sum(lengths), dtype=torch.int64), shard(lengths, "cpu")
    labels[5:300] = -100
    values = torch.randn(len(labels), 3, dtype=torch.float64, requires_grad=True)
    got = Counted(labels, here).of_fragments(values)
    counted = (values * (labels >= 0).unsqueeze(1)).split(lengths)
    wanted = torch.stack([rows.sum(0) for rows in counted])
    torch.testing.assert_close(got, wanted)
    weight = torch.randn_like(wanted)
    mine, theirs = (torch.autograd.grad((x * weight).sum(), values)[0] for x in (got, wanted))
    torch.testing.assert_close(mine, theirs)


def test_evaluation_counts_nothing() -> None:
    model, (first, second) = make({"aux_loss": 0.3}), batches()
    went(model, first)
    model.eval()
    with torch.no_grad():
        model(*distribute(*second, ALONE))
    assert all(router.tally is None for router in routers(model))
    model.train()
    end(model)
    tokens = int((first.labels >= 0).sum())
    assert [sum(load.counts) for load in model.balance.loads().values()] == [2 * tokens] * 2


def test_a_model_without_experts_has_no_balance() -> None:
    model = make({}, mlp_pattern=["swiglu"])
    went(model, batches()[0])
    end(model)
    assert model.balance.loads() == {}

"""DeepSpeed, behind one class: forward, backward, step, and the state by parameter.

All ZeRO stages train one flat world of ranks. What is saved is never DeepSpeed's own
layout but every parameter's full fp32 tensors by name, so that a checkpoint knows nothing
of ranks or stages.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from parallel import World
from train.config import TrainConfig, ZeroConfig
from train.model.transformer import Model
from train.optimiser.muon import Muon, Piece
from train.optimiser.optim import OptimConfig, parameter_groups

# The fp32 tensors of one parameter: the weight itself and the optimiser's means.
WEIGHT = "weight"
_MUON = (WEIGHT, "exp_avg")
_ADAMW = (WEIGHT, "exp_avg", "exp_avg_sq")


# Most numbers that ZeRO's ranks reduce at a time, DeepSpeed's own default.
BUCKET = 500_000_000


def bucket(parameters: int) -> int:
    """Numbers of the buffer from which ZeRO reduces gradients: no more than there are."""
    return min(BUCKET, parameters)


class Engine:
    """A model under DeepSpeed.

    Args:
        model: built alike on every rank.
        accumulate: batches of one optimiser step.
        dtype: of weights and activations; with bf16 the optimiser keeps fp32 weights.
    """

    def __init__(
        self,
        model: Model,
        optim: OptimConfig,
        zero: ZeroConfig,
        world: World,
        dtype: torch.dtype,
        accumulate: int,
    ) -> None:
        self.world, self.stage = world, zero.stage
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        # A learning rate of zero until a step sets it: DeepSpeed makes some of the
        # optimiser's state by a step of its own, which must change nothing.
        groups = parameter_groups(model.named_parameters(), optim, model.lr_multipliers())
        self.state_keys = {
            self.names[parameter]: _MUON if group["orthogonal"] else _ADAMW
            for group in groups
            for parameter in group["params"]
        }
        optimizer = Muon(
            groups,
            optim.momentum,
            world,
            lr=0.0,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        bf16 = dtype == torch.bfloat16
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": optim.clip,
            "zero_optimization": {
                "stage": zero.stage,
                "reduce_bucket_size": bucket(sum(p.numel() for p in model.parameters())),
            },
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "steps_per_print": None,
        }
        if bf16 and zero.stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        self._engine = _quietly_initialise(model, optimizer, settings, world)
        wrapper = self._engine.optimizer
        self._optimizer: Muon = getattr(wrapper, "optimizer", wrapper)
        self._optimizer.step = self._if_good(self._optimizer.step)
        self._good: Callable[[float], bool] = lambda norm: True
        self._verdict: bool | None = None
        self._norm = 0.0
        self._create_optimizer_state()
        self.set_optimizer_step(0)
        self._masters = self._unsharded_weights() if self.stage == 0 else {}

    @property
    def model(self) -> Model:
        return self._engine.module

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add this batch's gradients; they are averaged over ranks and accumulation."""
        self._engine.backward(loss)

    def step(
        self, learning_rate: float, good: Callable[[float], bool] = lambda norm: True
    ) -> float | None:
        """End a batch. At the last one of a step update the weights and return the gradient norm.

        Args:
            good: asked once a step, with the gradient norm over all parameters before
                clipping, on all ranks together. If it says no, weights and optimiser stay
                as they are, to the last bit; the gradients are gone.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["multiplier"]
        self._good, self._verdict = good, None
        if self._weights_are_masters:
            # Nothing wraps the optimiser then, and DeepSpeed keeps no norm.
            grads = [p.grad for p in self.names if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(grads))
        self._engine.step()
        # DeepSpeed itself gives up most of the steps whose norm is not finite.
        self._may_update()
        return self._norm

    def eval(self) -> None:
        self._engine.eval()

    def train(self) -> None:
        self._engine.train()

    def gather(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter, state key, full fp32 tensor) of everything there is to save.

        Every rank must run it to the end together.
        """
        for parameter, name in self.names.items():
            for key in self.state_keys[name]:
                yield name, key, self._full(parameter, key)

    def scatter(self, read: Callable[[str, str], Tensor]) -> None:
        """Set everything from `read(parameter, state key)`, which gives full fp32 tensors."""
        for parameter, name in self.names.items():
            for key in self.state_keys[name]:
                value = read(name, key).to(self.world.device, torch.float32)
                self._set_full(parameter, key, value)

    def set_optimizer_step(self, step: int) -> None:
        """AdamW's own count of steps, which corrects the bias of its young means."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The full shape, also where ZeRO 3 has left this rank a part."""
        return getattr(parameter, "ds_shape", parameter.shape)

    def _if_good(self, update: Callable[[], Any]) -> Callable[[], Any]:
        """The optimiser's step, which DeepSpeed calls for each group of parameters."""
        return lambda *_: update() if self._may_update() else None

    def _may_update(self) -> bool:
        if self._verdict is None:
            if not self._weights_are_masters:
                norm = float(self._engine.optimizer._global_grad_norm)
                # One that is not finite may come as -1.
                self._norm = norm if norm >= 0 else math.nan
            self._verdict = self._good(self._norm)
        return self._verdict

    @property
    def _weights_are_masters(self) -> bool:
        return self._engine.optimizer is self._optimizer

    def _create_optimizer_state(self) -> None:
        """The optimiser's means, as zeros, before the first step: a resume fills them."""
        state = self._optimizer.state
        for flat, group, members in self._partitions():
            if group["orthogonal"] and self.stage > 0:
                self._optimizer.pieces[flat] = self._pieces(members)
            if not state[flat]:
                state[flat]["exp_avg"] = torch.zeros_like(flat)
                if not group["orthogonal"]:
                    state[flat]["exp_avg_sq"] = torch.zeros_like(flat)
                    state[flat]["step"] = torch.zeros((), device=flat.device)
        wrapper = self._engine.optimizer
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> Iterator[tuple[Tensor, dict[str, Any], list[nn.Parameter]]]:
        """The tensors that the optimiser steps: each with its group, and whose weights it has."""
        wrapper, groups = self._engine.optimizer, self._optimizer.param_groups
        if self.stage == 3:
            for number, flat in enumerate(wrapper.fp32_partitioned_groups_flat):
                group = groups[wrapper.sub_group_to_group_id[number]]
                yield flat, group, wrapper.fp16_groups[number]
        else:
            ours = getattr(wrapper, "bit16_groups", None) or getattr(wrapper, "bf16_groups", None)
            for number, group in enumerate(groups):
                for flat in group["params"]:
                    yield flat, group, ours[number] if ours else []

    def _pieces(self, members: list[nn.Parameter]) -> list[Piece]:
        """Where the ranks hold these matrices, which one flat tensor a rank has slices of."""
        mine = []  # (offset in the flat tensor, elements) of each
        offset = 0
        for parameter in members:
            if self.stage == 3:
                size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
                numel = self.shape(parameter).numel()
                mine.append((offset, min(max(numel - self.world.rank * size, 0), size)))
                offset += size
            else:
                linked = parameter._hp_mapping  # type: ignore[attr-defined]
                address = linked.hp_fragment_address if linked else None
                mine.append((address.start, address.numel) if address else (0, 0))
        every = self.world.gather([count for _, count in mine])
        return [
            Piece(self.shape(parameter), offset, [0, *accumulate(counts)])
            for parameter, (offset, _), counts in zip(
                members, mine, zip(*every, strict=True), strict=True
            )
        ]

    def _unsharded_weights(self) -> dict[nn.Parameter, Tensor]:
        """Stage 0: each parameter's fp32 weight, in bf16 the copy that the optimiser holds."""
        if self._weights_are_masters:
            return {parameter: parameter for parameter in self.names}
        wrapper = self._engine.optimizer
        return {
            low: full
            for lows, fulls in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for low, full in zip(lows, fulls, strict=True)
        }

    def _unsharded(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Stage 0: the tensor itself."""
        master = self._masters[parameter]
        return master.data if key == WEIGHT else self._optimizer.state[master][key]

    def _full(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return self._unsharded(parameter, key)
        if key == WEIGHT:
            full = safe_get_full_fp32_param(parameter)
        else:
            full = safe_get_full_optimizer_state(parameter, key)
        return full.reshape(self.shape(parameter))

    def _set_full(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed import utils

        if self.stage == 0:
            self._unsharded(parameter, key).copy_(value)
        elif self.stage < 3:
            if key == WEIGHT:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
        else:
            part = parameter.ds_tensor  # type: ignore[attr-defined]
            size = part.numel()
            padded = value.new_zeros(size * self.world.size)
            padded[: value.numel()] = value.flatten()
            mine = padded[size * self.world.rank :][:size]
            if key == WEIGHT:
                utils.safe_set_local_fp32_param(parameter, mine)
                part.data.copy_(mine)
            else:
                utils.safe_set_local_optimizer_state(parameter, mine, key)
        # The weights that the model computes with: ZeRO 3 has none in between, but for
        # the small ones that it keeps whole on every rank.
        if key == WEIGHT and parameter.shape == value.shape:
            parameter.data.copy_(value)


def dtype_of(config: TrainConfig, device: str) -> torch.dtype:
    """The dtype of weights and activations on a kind of device, "cuda" or "cpu"."""
    auto = "bf16" if device == "cuda" else "fp32"
    name = auto if config.dtype == "auto" else config.dtype
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _quietly_initialise(
    model: nn.Module, optimizer: Any, settings: dict[str, Any], world: World
) -> Any:
    """`deepspeed.initialize` without its chatter, on the process group that there is."""
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime import bf16_optimizer, compiler

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It prints how much memory is used before and after every group of parameters.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # Its Muon, which is not ours but imported, hands functions to torch.compile: that imports the
    # compiler, in a second of every rank.
    compiler.compile = lambda: lambda function: function
    # DeepSpeed calls torch by older names, which nobody who reads this can mend.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    # An all-reduce for CPU ranks that DeepSpeed would compile here, with a C++ compiler
    # that a newcomer need not have; gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    gc.collect()  # circles of its objects keep the weights as they were before it moved them
    return engine

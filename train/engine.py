"""DeepSpeed, behind one class: forward, backward, step, and the state by parameter.

All ZeRO stages train one flat world of ranks. What is saved is never DeepSpeed's own
layout but every parameter's full fp32 tensors by name, so that a checkpoint knows nothing
of ranks or stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from parallel import World
from train.config import TrainConfig, ZeroConfig
from train.experts import AtHome
from train.model.initial import values
from train.model.transformer import Model, place
from train.optimiser.muon import Muon, Piece, muon
from train.optimiser.optim import OptimConfig, parameter_groups
from train.optimiser.state import ADAMW, WEIGHT, Read, create, keys_of, read_into
from train.zero import quietly_initialise, stand_in

# Most numbers that ZeRO's ranks reduce at a time, DeepSpeed's own default.
BUCKET = 500_000_000


def bucket(parameters: int) -> int:
    """Numbers of the buffer from which ZeRO reduces gradients: no more than there are."""
    return min(BUCKET, parameters)


class Engine:
    """A model under DeepSpeed, of which a rank holds its own share and never more.

    That share is what `train.forecast.states` counts as always there: of N parameters on P ranks,
    with e bytes a weight, stage 0 holds all; stages 1 and 2 the N weights that the model computes
    with, and 1/P of the fp32 masters and the optimiser's means (stage 1 in bf16 also N fp32
    gradients); stage 3 holds 1/P of everything, gradients among it, and a bucket. What a start
    takes beside it does not grow with the model: numbers are made or read piece by piece.
    Buffers are whole on every rank, and keep their dtype.

    Args:
        model: on `meta`: its weights are unset until `begin` or `scatter`. One with weights
            begins with them, and is whole on every rank.
        accumulate: batches of one optimiser step.
        dtype: of weights and activations; with bf16 the optimiser keeps fp32 weights.
        by_rows: the MLPs to whose experts rows travel, by name (`train.experts.AtHome`).
    """

    def __init__(
        self,
        model: Model,
        optim: OptimConfig,
        zero: ZeroConfig,
        world: World,
        dtype: torch.dtype,
        accumulate: int,
        by_rows: Mapping[str, bool] | None = None,
    ) -> None:
        self.world, self.stage, self._clip = world, zero.stage, optim.clip
        held = [*model.named_parameters(), *model.named_buffers()]
        given = {name: x.detach() for name, x in held if not x.is_meta}
        self.at_home = AtHome(model, optim, world, dtype, by_rows or {})

        def make(_: str, old: Tensor) -> Tensor:
            if not isinstance(old, nn.Parameter):
                return torch.empty(old.shape, dtype=old.dtype, device=world.device)
            if zero.stage == 0:  # nobody copies weights into memory of their own
                return torch.empty(old.shape, dtype=dtype, device=world.device)
            return stand_in(old.shape, dtype, world.device)

        place(model, make)
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model.named_parameters(), optim, model.lr_multipliers())
        self.state_keys = {
            self.names[parameter]: keys_of(group)
            for group in groups
            for parameter in group["params"]
        }
        self.state_keys |= {name: stack.keys for name, stack in self.at_home.stacks.items()}
        self.state_keys |= {name: (WEIGHT,) for name, _ in model.named_buffers()}
        optimizer = muon(groups, optim, world)
        bf16 = dtype == torch.bfloat16
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": 0.0,  # done here, by the norm over all there is
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
        self._engine = quietly_initialise(model, optimizer, settings, world)
        wrapper = self._engine.optimizer
        self._optimizer: Muon = getattr(wrapper, "optimizer", wrapper)
        self._optimizer.step = self._if_good(self._optimizer.step)
        self._good: Callable[[float], bool] = lambda norm: True
        self._verdict: bool | None = None
        self._norm = self._beside = 0.0  # _beside: squares of experts' gradients that live at home
        self._create_optimizer_state()
        self.set_optimizer_step(0)
        self._masters = self._unsharded_weights() if self.stage == 0 else {}
        if given:
            self.scatter(lambda name, _, *part: given[name].flatten()[slice(*part)], {WEIGHT})

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
        self.model.balance.add()
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        self.model.balance.reduce(self.world)  # before what this step waits for the device
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["multiplier"]
        self._good, self._verdict = good, None
        self._beside = self.at_home.reduce()
        if self._weights_are_masters:
            # Nothing wraps the optimiser then, and DeepSpeed keeps no norm.
            grads = [p.grad for p in self.names if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(grads))
        self._engine.step()
        # DeepSpeed itself gives up most of the steps whose norm is not finite.
        updated = self._may_update()
        self.model.balance.end(updated)
        if updated:
            self.at_home.step(learning_rate, self._factor)
        else:
            self.at_home.forget()
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
        for name, stack in self.at_home.stacks.items():
            for key in stack.keys:
                yield name, key, self.at_home.full(name, key)
        for name, buffer in self.model.named_buffers():
            yield name, WEIGHT, buffer

    def copies(self) -> Iterator[tuple[str, Tensor, list[list[int]]]]:
        """(name, this rank's tensor, groups of ranks that have the same) of what several ranks have
        whole: all of the model under ZeRO 0 to 2, experts that have replicas."""
        if self.stage < 3:
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
                yield name, tensor, [list(range(self.world.size))]
        for name, stack in self.at_home.stacks.items():
            if stack.homes.replicated:
                yield name, stack.weight, stack.homes.groups

    def begin(self, seed: int) -> None:
        """Set the weights to the model's first values; the optimiser stays as new."""
        self.scatter(lambda name, _, *part: self.first(name, seed, *part), {WEIGHT})

    def first(self, name: str, seed: int, begin: int, end: int) -> Tensor:
        """(end − begin,) fp32: what these elements of a parameter or buffer begin as."""
        return values(self.model.firsts[name], seed, name, begin, end)

    def scatter(self, read: Read, keys: Collection[str] = ADAMW) -> None:
        """Set what `keys` name, on all ranks together. Each reads its own part only, in pieces."""
        for parameter, name in self.names.items():
            for key in self.state_keys[name]:
                if key in keys:
                    self._set(parameter, key, lambda *part, n=name, k=key: read(n, k, *part))
        self.at_home.scatter(read, keys)
        if WEIGHT in keys:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(read(name, WEIGHT, 0, buffer.numel()).view(buffer.shape))
            self._share_weights()

    def set_optimizer_step(self, step: int) -> None:
        """AdamW's own count of steps, which corrects the bias of its young means."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)
        self.at_home.set_step(step)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The full shape of everything that is saved, by name: of parameters and buffers."""
        found = {name: self.shape(parameter) for parameter, name in self.names.items()}
        found |= {name: stack.shape for name, stack in self.at_home.stacks.items()}
        return found | {name: buffer.shape for name, buffer in self.model.named_buffers()}

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The full shape, also where ZeRO 3 has left this rank a part."""
        return getattr(parameter, "ds_shape", parameter.shape)

    def _if_good(self, update: Callable[[], Any]) -> Callable[[], Any]:
        """The optimiser's step, which DeepSpeed calls for each group of parameters."""

        def clipped(*_: Any) -> None:
            if not self._may_update():
                return
            if self._factor < 1:
                for group in self._optimizer.param_groups:
                    for weights in group["params"]:
                        if weights.grad is not None:
                            weights.grad.mul_(self._factor)
            update()

        return clipped

    def _may_update(self) -> bool:
        if self._verdict is None:
            if not self._weights_are_masters:
                norm = float(self._engine.optimizer._global_grad_norm)
                # One that is not finite may come as -1.
                self._norm = norm if norm >= 0 else math.nan
            if self._beside:
                self._norm = math.sqrt(self._norm**2 + self._beside)
            self._verdict = self._good(self._norm) and math.isfinite(self._norm)
        return self._verdict

    @property
    def _factor(self) -> float:
        """What clipping multiplies all gradients with."""
        return min(1.0, self._clip / (self._norm + 1e-6)) if self._clip else 1.0

    @property
    def _weights_are_masters(self) -> bool:
        return self._engine.optimizer is self._optimizer

    def _create_optimizer_state(self) -> None:
        """The optimiser's means, as zeros, before the first step: a resume fills them."""
        state = self._optimizer.state
        for flat, group, members in self._partitions():
            if group["orthogonal"] and self.stage > 0:
                self._optimizer.pieces[flat] = self._pieces(members)
            create(state, flat, group)
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
            piece
            for parameter, (offset, _), counts in zip(
                members, mine, zip(*every, strict=True), strict=True
            )
            for piece in Piece(self.shape(parameter), offset, [0, *accumulate(counts)]).each(
                self.world.rank
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

    def _set(self, parameter: nn.Parameter, key: str, read: Callable[[int, int], Tensor]) -> None:
        """Set this rank's part of a tensor from `read(begin, end)`."""
        part, begin = self._part(parameter, key)
        read_into(part, begin, read)
        if key != WEIGHT:
            return
        # The weights that the model computes with.
        if self.stage < 3:
            parameter.data.view(-1)[begin:][: part.numel()].copy_(part)
        else:
            parameter.ds_tensor.data[: part.numel()].copy_(part)  # type: ignore[attr-defined]
            # Small ones stay whole on every rank, once they were gathered.
            if parameter.numel():
                parameter.data.view(-1).copy_(read(0, parameter.numel()))

    def _part(self, parameter: nn.Parameter, key: str) -> tuple[Tensor, int]:
        """This rank's part of an fp32 tensor, flat, and the element that it begins with."""
        if self.stage == 0:
            return self._unsharded(parameter, key).view(-1), 0
        state = None if key == WEIGHT else key
        if self.stage < 3:
            linked = parameter._hp_mapping  # type: ignore[attr-defined]
            if linked is None:
                return torch.empty(0), 0
            return linked.get_hp_fragment(state).data, linked.lp_fragment_address.start
        of_zero = parameter._z3_optimizer  # type: ignore[attr-defined]
        part: Tensor = of_zero.get_local_fp32_param(parameter, state).data
        begin = self.world.rank * part.numel()
        return part[: max(self.shape(parameter).numel() - begin, 0)], begin

    def _share_weights(self) -> None:
        """Stages 1 and 2: send the weights that the model computes with, each from its owner."""
        if self.stage in (1, 2):
            wrapper = self._engine.optimizer
            of_bf16 = getattr(wrapper, "bf16_partitioned_groups", None)
            for parts in of_bf16 or wrapper.parallel_partitioned_bit16_groups:
                for owner, part in enumerate(parts):
                    self.world.broadcast(part, owner)


def dtype_of(config: TrainConfig, device: str) -> torch.dtype:
    """The dtype of weights and activations on a kind of device, "cuda" or "cpu"."""
    auto = "bf16" if device == "cuda" else "fp32"
    name = auto if config.dtype == "auto" else config.dtype
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]

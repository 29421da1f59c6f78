"""The model: an embedding, blocks of a mixer and an MLP, and a head that computes the loss.

x ← x + mixer(norm(x))          x ← x + norm(mixer(x))
x ← x + mlp(norm(x))       or   x ← x + norm(mlp(x))       if post_norm names the mixer

A block whose MLP is `none` is the first line alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from parallel import Shard
from train.model import mixers, mlps
from train.model.balance import Balance
from train.model.config import ModelConfig
from train.model.initial import Constant, First, Normal, declarations, fill, without_values
from train.model.linear import Stacked, met
from train.model.mixers._parts import LowRank
from train.model.norm import RMSNorm

Cache = list[dict[str, Tensor]]  # one dict a block, for its mixer


class Block(nn.Module):
    """A mixer and an MLP on the residual stream: x (1, t, dim) -> (1, t, dim)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        name = config.blocks[layer]
        self.post_norm = name in config.post_norm
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps, config.zero_centered_norms)
        self.mixer = mixers.make(name, config, layer)
        mlp = mlps.make(config.mlp_blocks[layer], config, layer)
        if mlp is not None:
            self.mlp_norm = RMSNorm(config.dim, config.norm_eps, config.zero_centered_norms)
        self.mlp = mlp

    def forward(self, x: Tensor, shard: Shard, cache: dict[str, Tensor] | None = None) -> Tensor:
        if self.post_norm:
            x = x + self.mixer_norm(self.mixer(x, shard, cache))
            return x if self.mlp is None else x + self.mlp_norm(self.mlp(x))
        x = x + self.mixer(self.mixer_norm(x), shard, cache)
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))


class Head(nn.Module):
    """The output matrix (V, dim): hidden (t, dim) -> logits (t, V) without labels.

    With labels (t,), in training the summed losses of `kernels.linear_cross_entropy`, in evaluation
    each token's, of `kernels.token_cross_entropy`.
    """

    def __init__(self, vocab_size: int, dim: int, z_loss: float) -> None:
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.empty(vocab_size, dim))
        self.z_loss = z_loss

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        if labels is None:
            return F.linear(hidden, self.weight)
        if not self.training:
            return kernels.token_cross_entropy(hidden, self.weight, labels)
        return kernels.linear_cross_entropy(hidden, self.weight, labels, z_loss=self.z_loss)


def check_settings(config: ModelConfig) -> None:
    """Check the settings of the mixers and MLPs in use, and their names.

    Raises:
        ConfigError: there is no such mixer or MLP, or it has no such setting.
    """
    mixers.check(config)
    mlps.check(config)


def skeleton(config: ModelConfig, vocab_size: int) -> Model:
    """The model without memory for its weights: names and shapes."""
    with without_values():
        return Model(config, vocab_size)


def place(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Put new tensors, which `make` gives, in the place of all parameters and buffers of `model`.

    What two modules share they still share afterwards.
    """
    placed: dict[Tensor, Tensor] = {}
    for path, module in model.named_modules():
        for key, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None:
                continue
            if old not in placed:
                made = make(f"{path}.{key}" if path else key, old)
                kept = isinstance(old, nn.Parameter)
                placed[old] = nn.Parameter(made, old.requires_grad) if kept else made
            setattr(module, key, placed[old])


class Model(nn.Module):
    """A hybrid language model over a shard of the stream.

    Args:
        seed: from which parameters get their first values; not on `meta`, where they have none.

    Attributes:
        firsts: what each parameter and buffer begins as, by name.
        balance: of its experts, over an optimiser step.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config, layer) for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps, config.zero_centered_norms)
        self.head = Head(vocab_size, config.dim, config.z_loss)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.balance = Balance(self)
        self.firsts = self._firsts()
        if not self.embedding.weight.is_meta:
            fill(self, self.firsts, seed)
        # All matrices, and what a token is multiplied with of them. Counted now, since under ZeRO 3
        # a rank's parameters are empty between their uses.
        self.matrices = sum(
            parameter.numel()
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if parameter.dim() >= 2 and name != "embedding.weight"
        )
        self.matmul_parameters = met(self) - self.embedding.weight.numel()

    def _firsts(self) -> dict[str, First]:
        """What parameters and buffers begin as: as their modules declare, else normal for matrices
        and 0 for biases. Matrices that write to the residual stream (`.out`) have 1 / √(2 layers)
        of the standard deviation."""
        found = declarations(self)
        multipliers = self.lr_multipliers()
        for name, tensor in self.kept_tensors():
            if name in found:
                continue
            if tensor.dim() >= 2:
                writes_residual = name.removesuffix(".weight").endswith(".out")
                scale = (2 * self.config.layers) ** -0.5 if writes_residual else 1.0
                # μP: m times as many inputs are summed, so the variance is 1/m.
                scale *= multipliers.get(name, 1.0) ** 0.5
                found[name] = Normal(self.config.init_std * scale)
            elif name.endswith("bias"):
                found[name] = Constant(0)
            else:
                raise TypeError(f"{name} must declare what it begins as: see train.model.initial")
        return found

    @property
    def width(self) -> float:
        """m: dim over the width for which lr and init_std were tuned; 1 without μP."""
        return self.config.dim / (self.config.mup_base_dim or self.config.dim)

    def lr_multipliers(self) -> dict[str, float]:
        """Factors on the learning rate, by parameter name; 1 for parameters not named.

        μP for Adam (Yang et al. 2022, arXiv 2203.03466): matrices inside the blocks have 1/m of the
        learning rate of embeddings, norms and other vectors, where m is `width`; their initial
        variance and the factor on the logits are 1/m too. Matrices whose number of inputs does not
        grow with dim are left out: the second one of a `LowRank`.
        """
        if self.width == 1:
            return {}
        narrow = {id(part.up) for part in self.modules() if isinstance(part, LowRank)}
        return {
            f"{name}.weight": 1 / self.width
            for name, module in self.named_modules()
            if isinstance(module, (nn.Linear, Stacked)) and id(module) not in narrow
        }

    def kept_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What makes the model what it is, by name: parameters and persistent buffers."""
        yield from self.named_parameters()
        of_training = self.of_training
        yield from ((name, x) for name, x in self.named_buffers() if name not in of_training)

    @property
    def of_training(self) -> set[str]:
        """Names of buffers that only training needs: they are in checkpoints, and in no export."""
        return {
            f"{path}.{key}"
            for path, module in self.named_modules()
            for key in module._non_persistent_buffers_set
        }

    def forward(
        self, tokens: Tensor, labels: Tensor | None, shard: Shard, cache: Cache | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The loss over a shard, or the logits that follow each of its tokens.

        Args:
            tokens: (t,) int64, the shard's sequences end to end.
            labels: (t,) int64, the token to predict at each place, −100 for none; or None.
            shard: where the sequences lie.
            cache: of `new_cache`, for a sequence that is continued from call to call.

        Returns:
            Without labels, the logits (t, V). With labels, in training (loss, cross_entropy), fp32
            sums over the targets, the z-loss and those that balance experts in the first one only;
            in evaluation (cross_entropy,
            likeliest), (t,) fp32 and (t,) bool: each token's cross-entropy, and whether its label
            is the likeliest token; 0 and false without a label.
        """
        self.balance.begin(labels if self.training else None, shard)
        x = self.embedding(tokens).unsqueeze(0)  # (t,) -> (1, t, dim)
        for layer, block in enumerate(self.blocks):
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, shard, use_reentrant=False)
            else:
                x = block(x, shard, None if cache is None else cache[layer])
        hidden = self.norm(x).squeeze(0)  # (1, t, dim) -> (t, dim)
        result = self.head(hidden if self.width == 1 else hidden / self.width, labels)
        if labels is None or not self.training:
            return result
        loss, cross_entropy = result
        return loss + self.balance.loss(shard), cross_entropy

    def new_cache(self) -> Cache:
        return [{} for _ in self.blocks]

    def flops(self, lengths: Sequence[int] | np.ndarray) -> float:
        """FLOPs of one forward pass over sequences of these lengths, mixers included."""
        mixing = sum(block.mixer.mixing_flops(lengths) for block in self.blocks)
        return 2.0 * sum(lengths) * self.matmul_parameters + mixing

"""Text from a model: prefill in chunks, then a token at a time from the layers' caches."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from data.stream import IGNORED
from data.tokenizer import Tokenizer
from parallel import shard
from train.evaluation.trained import Trained
from train.model.transformer import Model

# Tokens of a prompt that pass through the model at a time: what is held beside the caches is
# a chunk's activations, however long the prompt.
CHUNK = 2048


class Decoder:
    """A sequence that grows, as the model's layers remember it.

    Linear layers keep a state of constant size, windows their last keys and values, layers of
    full attention all of them.

    Args:
        model: in evaluation mode.
        chunk: most tokens that pass through the model at a time.
    """

    def __init__(self, model: Model, chunk: int = CHUNK) -> None:
        self.model, self.chunk = model, chunk
        self.cache, self.seen = model.new_cache(), 0
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Go on with `tokens`, one at least; the logits (vocabulary,) that follow the last."""
        *before, last = tokens
        for begin in range(0, len(before), self.chunk):
            self._forward(before[begin : begin + self.chunk], asked=False)
        return self._forward([last], asked=True)

    @property
    def memory(self) -> int:
        """Bytes that the layers' caches hold."""
        return sum(held.nbytes for layer in self.cache for held in layer.values())

    def _forward(self, tokens: Sequence[int], asked: bool) -> Tensor:
        here = shard([len(tokens)], self._device, start=self.seen)
        ids = torch.tensor(tokens, device=self._device)
        # Labels without a target: no logits are made that nobody reads.
        labels = None if asked else torch.full_like(ids, IGNORED)
        logits = self.model(ids, labels, here, self.cache)[0]
        self.seen += len(tokens)
        return logits


def generate(
    model: Model, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int = 0
) -> str:
    """Go on from `prompt` by up to `tokens` tokens, less if the text ends before.

    The same seed gives the same text; a temperature of 0 takes the likeliest token.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    ids += _continue(Decoder(model), tokenizer.eos_id, ids, tokens, temperature, seed)
    return tokenizer.decode(ids[1:])


def show(trained: Trained, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Print what `generate` gives, and how fast it went."""
    tokenizer, decoder = trained.material.tokenizer, Decoder(trained.model)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    began = time.monotonic()
    made = _continue(decoder, tokenizer.eos_id, ids, tokens, temperature, seed)
    seconds = time.monotonic() - began
    print(tokenizer.decode([*ids[1:], *made]))
    print(
        f"\n{trained.checkpoint}: {len(ids)} tokens in, {len(made)} out in {seconds:.1f} s; "
        f"the caches hold {decoder.memory / 1e6:.2f} MB after {decoder.seen} tokens"
    )


def _continue(
    decoder: Decoder, eos_id: int, ids: list[int], tokens: int, temperature: float, seed: int
) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    made: list[int] = []
    fresh = ids
    while len(made) < tokens:
        logits = decoder.feed(fresh).float().cpu()
        if temperature > 0:
            chances = torch.softmax(logits / temperature, dim=-1)
            token = int(torch.multinomial(chances, 1, generator=random))
        else:
            token = int(logits.argmax())
        if token == eos_id:
            break
        made.append(token)
        fresh = [token]
    return made

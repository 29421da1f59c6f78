"""Text from a model: prefill in chunks, then a token at a time from the layers' caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data.batch import IGNORED
from data.settings import ConfigError
from data.tokens.spelling import spell
from data.tokens.tokenizer import Tokenizer
from parallel import shard
from train.evaluation.sampling import Sampling
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

    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Go on with `tokens`, one at least; the logits (vocabulary,) that follow the last."""
        ids = torch.tensor(tokens, device=self._device)
        # Labels without a target: no logits are made that nobody reads.
        for part in _chunks(ids[:-1], self.chunk):
            self._forward(part, torch.full_like(part, IGNORED))
        return self._forward(ids[-1:], None)[0]

    def logits(self, ids: Tensor) -> Iterator[Tensor]:
        """Go on with `ids` (T,) int64; the logits after each, (up to chunk, vocabulary) a time."""
        for part in _chunks(ids, self.chunk):
            yield self._forward(part, None)

    def losses(self, ids: Tensor) -> Iterator[Tensor]:
        """Go on with `ids` (T,) int64, of which the last is only predicted; −log p in nats of
        each but the first, (up to chunk,) fp32 a time."""
        parts = zip(_chunks(ids[:-1], self.chunk), _chunks(ids[1:], self.chunk), strict=True)
        for part, labels in parts:
            yield self._forward(part, labels)

    @property
    def memory(self) -> int:
        """Bytes that the layers' caches hold."""
        return sum(held.nbytes for layer in self.cache for held in layer.values())

    @torch.no_grad()
    def _forward(self, ids: Tensor, labels: Tensor | None) -> Tensor:
        """The logits (T, vocabulary); with labels, the loss of each (T,)."""
        here = shard([len(ids)], self._device, start=self.seen)
        found = self.model(ids, labels, here, self.cache)
        self.seen += len(ids)
        return found if labels is None else found[0]


def sample(
    decoder: Decoder, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling
) -> Iterator[int]:
    """The tokens that a model makes after `ids`, one at least; what ends a text is not given.

    Rows of the model that are no piece of the tokenizer are never drawn.

    Raises:
        ConfigError: a logit is not finite.
    """
    random = torch.Generator().manual_seed(sampling.seed)
    fresh = ids
    for _ in range(sampling.tokens):
        logits = decoder.feed(fresh)[: tokenizer.vocab_size].double().cpu()
        top = logits.max()
        if not torch.isfinite(top):
            raise ConfigError(
                f"the logits after {decoder.seen} tokens are not finite: the model has diverged"
            )
        if sampling.temperature > 0:
            # The largest first: no temperature is so low that it overflows.
            chances = torch.softmax((logits - top) / sampling.temperature, dim=-1)
            token = int(torch.multinomial(chances, 1, generator=random))
        else:
            token = int(logits.argmax())
        if token in tokenizer.end_ids:
            return
        yield token
        fresh = [token]


def write(
    decoder: Decoder, tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling
) -> Iterator[str]:
    """The text that a model makes after `ids`, in pieces of whole characters, while it is made."""
    return spell(tokenizer, ids, sample(decoder, tokenizer, ids, sampling))


def generate(
    model: Model, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int = 0
) -> str:
    """`prompt` and what comes after it; see `Trained.generate`."""
    ids = encode(tokenizer, prompt)
    pieces = write(Decoder(model), tokenizer, ids, Sampling(tokens, temperature, seed))
    return tokenizer.decode(ids[1:]) + "".join(pieces)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """`bos_id` and the pieces of `text`, as every document of training begins.

    Raises:
        ConfigError: `text` has half a surrogate pair in it, which UTF-8 cannot hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the text is not UTF-8: character {error.start + 1} is {text[error.start]!r}"
        ) from None
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def _chunks(ids: Tensor, size: int) -> Iterator[Tensor]:
    """`ids` in parts; none if there are no ids."""
    return iter(ids.split(size) if len(ids) else ())

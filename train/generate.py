"""Text from a model: the prompt in one pass, then a token at a time from the layers' caches."""

from __future__ import annotations

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from parallel import shard
from train.model.transformer import Model


@torch.no_grad()
def generate(
    model: Model, tokenizer: Tokenizer, prompt: str, tokens: int, temperature: float, seed: int = 0
) -> str:
    """Go on from `prompt` by up to `tokens` tokens, less if the text ends before.

    Linear layers carry a state of constant size, full-attention layers their keys and
    values. The same seed gives the same text; a temperature of 0 takes the likeliest token.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    cache = model.new_cache()
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    fresh, seen = ids, 0
    for _ in range(tokens):
        here = shard([len(fresh)], device, start=seen)
        logits = model(torch.tensor(fresh, device=device), None, here, cache)
        assert isinstance(logits, Tensor)
        seen += len(fresh)
        last = logits[-1].float().cpu()
        if temperature > 0:
            chances = torch.softmax(last / temperature, dim=-1)
            token = int(torch.multinomial(chances, 1, generator=random))
        else:
            token = int(last.argmax())
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        fresh = [token]
    return tokenizer.decode(ids[1:])

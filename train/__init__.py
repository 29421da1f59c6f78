"""Training, and what was trained. `python -m train …` is the command; in Python

    from train import load

    model = load("runs/smoke")           # or what import, convert or export wrote
    logits = model.logits(ids)           # (T,) int → (T, vocabulary) fp32
    nats = model.nats("some text")       # −log p of the text; model.bits_per_byte too
    for piece in model.generate("def "):
        print(piece, end="", flush=True)
    model.tokenizer, model.config

`load` is imported when it is first used, so that settings and `--help` come without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.evaluation.trained import Trained, load

__all__ = ["Trained", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("train.evaluation.trained"), name)
    raise AttributeError(f"module 'train' has no attribute {name!r}")

"""What a trained model makes of long contexts: `python -m train evaluate RUN`.

One dictionary of plain numbers is measured, then printed, saved, drawn and given to
TensorBoard:

- loss by position and by length of document, at the training length and at 2 and 4 times it;
- recall: pairs of a key and a value, asked for later, by number of pairs and length;
- a needle: something shown once in held-out text, asked for at the end, by depth and length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Batch
from parallel import shard
from train.evaluation.evaluate import ByOctave
from train.evaluation.trained import Trained
from train.monitor import figures
from train.monitor.metrics import METRICS
from train.survival.manifest import step_of

FACTORS = (1, 2, 4)  # lengths, as multiples of the training length
PAIRS = (4, 8, 16, 64, 256)
QUERIES = 16
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FOLDER = "evaluation"  # in the run's

Report = dict[str, Any]
Probe = tuple[np.ndarray, np.ndarray] | None
Say = Callable[[str], None]


def measure(trained: Trained, tokens: int, samples: int, say: Say = lambda line: None) -> Report:
    """Everything above for a model.

    Args:
        tokens: of the validation set, at most, read at each length.
        samples: sequences of each number of pairs, depth and length; more where a batch of
            training has more.
        say: told what begins.
    """
    seq_len = trained.config.train.seq_len
    lengths = [factor * seq_len for factor in FACTORS]
    report: Report = {
        "checkpoint": str(trained.checkpoint),
        "step": step_of(trained.checkpoint),
        "seq_len": seq_len,
        "validation": {},
        "loss_by_position": {},
        "loss_by_document_length": {},
    }
    for length in lengths:
        say(f"validation in sequences of up to {length:,} tokens")
        summary, by_position, by_document = validate(trained, tokens, length)
        report["validation"][str(length)] = summary
        report["loss_by_position"][str(length)] = by_position
        report["loss_by_document_length"][str(length)] = by_document
    shorter = [max(seq_len // 4, 2), max(seq_len // 2, 2), *lengths]
    material = trained.material

    def count(length: int) -> int:
        return max(samples, trained.config.train.batch_tokens // length)

    def recall(pairs: int, length: int) -> Probe:
        random = np.random.default_rng([pairs, length])
        return material.recall_probe(random, count(length), length, pairs, min(pairs, QUERIES))

    def needle(depth: float, length: int) -> Probe:
        random = np.random.default_rng([round(100 * depth), length])
        return material.needle_probe(random, count(length), length, depth)

    say("recall by number of pairs and length")
    report["recall"] = _grid(trained, recall, PAIRS, shorter, "pairs")
    say("a needle by depth and length")
    report["needle"] = _grid(trained, needle, DEPTHS, shorter, "depth")
    return report


def validate(
    trained: Trained, tokens: int, length: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """The validation set in sequences of up to `length` tokens.

    Returns:
        `val_loss` and its kin as in an evaluation row, the loss by position, and the loss by
        length of document, both by the first number of each octave.
    """
    positions, documents = ByOctave(), ByOctave()
    byte_lengths = trained.material.tokenizer.byte_lengths()
    size = 0
    for batch in trained.material.validation(tokens, length):
        scores = [held.cpu() for held in score(trained, batch)]
        each = np.diff(batch.cu_seqlens)
        positions.add(shard(each, "cpu").positions, *scores)
        documents.add(torch.from_numpy(np.repeat(each, each)), *scores)
        size += int(byte_lengths[batch.labels[batch.labels >= 0]].sum())
    nats, hits, targets = positions.sums.sum(1).tolist()
    summary = {"val_loss": nats / max(targets, 1), "val_accuracy": hits / max(targets, 1)}
    if size:
        summary["val_bpb"] = nats / math.log(2) / size
    return summary, positions.loss(), documents.loss()


@torch.no_grad()
def score(trained: Trained, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, each token's loss in nats and whether its label is the likeliest: (T,) each."""
    device = trained.device
    tokens, labels = (torch.from_numpy(held).to(device) for held in (batch.tokens, batch.labels))
    return labels, *trained.model(tokens, labels, shard(np.diff(batch.cu_seqlens), device))


def _grid(
    trained: Trained,
    probe: Callable[[Any, int], Probe],
    rows: tuple[Any, ...],
    lengths: list[int],
    name: str,
) -> Report:
    """Share of right answers and loss in nats for each row and length; None where one does not
    fit, and no row without any number."""
    accuracy: list[list[float | None]] = []
    loss: list[list[float | None]] = []
    for row in rows:
        found = [_answers(trained, probe(row, length)) for length in lengths]
        accuracy.append([hit for hit, _ in found])
        loss.append([nats for _, nats in found])
    kept = [i for i, row in enumerate(accuracy) if any(cell is not None for cell in row)]
    return {
        name: [rows[i] for i in kept],
        "lengths": lengths,
        "accuracy": [accuracy[i] for i in kept],
        "loss": [loss[i] for i in kept],
    }


def _answers(trained: Trained, probe: Probe) -> tuple[float | None, float | None]:
    if probe is None:
        return None, None
    hits = nats = targets = 0.0
    # One sequence at a time where they are long, so that memory does not grow with samples.
    tokens, labels = probe
    count, length = tokens.shape
    together = max(1, trained.config.train.batch_tokens // length)
    for first in range(0, count, together):
        some = slice(first, first + together)
        edges = np.arange(0, tokens[some].size + 1, length)
        batch = Batch(tokens[some].reshape(-1), labels[some].reshape(-1), edges)
        wanted, loss, hit = score(trained, batch)
        targets += int((wanted >= 0).sum())
        nats, hits = nats + float(loss.sum()), hits + float(hit.sum())
    return hits / targets, nats / targets


def text(report: Report) -> str:
    """A report to read."""
    lengths = list(report["validation"])
    trained_at = str(report["seq_len"])
    heads = [f"{length}{' *' if length == trained_at else ''}" for length in lengths]
    lines = [f"{report['checkpoint']}  (* the training length)", ""]
    keys = [key for key in METRICS if key in report["validation"][trained_at]]
    rows = [[METRICS[key], *(report["validation"][n][key] for n in lengths)] for key in keys]
    lines += _table("validation, in sequences of up to", heads, rows)
    for key, title in (
        ("loss_by_position", "loss by position, from"),
        ("loss_by_document_length", "loss by length of document, from"),
    ):
        found = report[key]
        octaves = sorted({int(first) for line in found.values() for first in line})
        rows = [[f"{n:,}", *(found[length].get(str(n)) for length in lengths)] for n in octaves]
        lines += ["", *_table(title, heads, rows)]
    for key, name, title in (
        ("recall", "pairs", "recall: right answers by pairs and length"),
        ("needle", "depth", "needle: right answers by depth and length"),
    ):
        grid = report[key]
        if grid[name]:
            heads = [f"{n}{' *' if n == report['seq_len'] else ''}" for n in grid["lengths"]]
            rows = [[str(n), *line] for n, line in zip(grid[name], grid["accuracy"], strict=True)]
            lines += ["", *_table(title, heads, rows)]
    return "\n".join(lines)


def _table(title: str, heads: list[str], rows: list[list[Any]]) -> list[str]:
    width = max(len(title), *(len(row[0]) for row in rows)) if rows else len(title)
    lines = [f"{title:<{width}}" + "".join(f"{head:>10}" for head in heads)]
    for name, *cells in rows:
        shown = ["" if cell is None else f"{cell:.3f}" for cell in cells]
        lines.append(f"{name:>{width}}" + "".join(f"{cell:>10}" for cell in shown))
    return lines


def drawings(report: Report) -> dict[str, Any]:
    """The report as matplotlib figures, by name."""
    nats = "loss in nats"
    drawn = {
        "loss_by_position": figures.curves(
            {f"up to {n} tokens": line for n, line in report["loss_by_position"].items()},
            "position",
            nats,
        ),
        "loss_by_document_length": figures.curves(
            {f"up to {n} tokens": line for n, line in report["loss_by_document_length"].items()},
            "tokens of the document",
            nats,
        ),
    }
    for key, name in (("recall", "pairs"), ("needle", "depth")):
        grid = report[key]
        if grid[name]:
            values = np.array(grid["accuracy"], dtype=np.float64)
            drawn[key] = figures.grid(values, grid[name], grid["lengths"], name, "tokens")
    return drawn


def save(report: Report, run: Path, path: Path | None) -> list[Path]:
    """Write the report as JSON and its figures, and both into TensorBoard.

    Args:
        run: the run's folder; everything lies in its `evaluation/`.
        path: of the JSON, if elsewhere.

    Returns:
        The files, the JSON first.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder, step = run / FOLDER, report["step"]
    folder.mkdir(exist_ok=True)
    path = path or folder / f"step-{step:08d}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    written = [path]
    with SummaryWriter(str(folder)) as board:
        for length, summary in report["validation"].items():
            for key, value in summary.items():
                board.add_scalar(f"evaluation/{key}/{length}", value, step)
        for name, figure in drawings(report).items():
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=120)
            board.add_figure(f"evaluation/{name}", figure, step)
    return written

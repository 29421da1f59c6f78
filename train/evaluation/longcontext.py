"""What a trained model makes of long contexts: `python -m train evaluate FOLDER`.

One dictionary of plain numbers is measured, then printed, saved, drawn and given to
TensorBoard:

- loss by position and by length of document, at the training length and at 2 and 4 times it;
- recall: pairs of a key and a value, asked for later, by number of pairs and length;
- a needle: something shown once in held-out text, asked for at the end, by depth and length.

What cannot be measured, for want of text or room, is left out.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Batch, CodedText, HeldOut, HeldOutText, regular
from data.config import longest_seq_len
from data.settings import ConfigError
from parallel import shard
from train.evaluation.evaluate import ByOctave, summary
from train.evaluation.trained import Trained
from train.monitor import figures
from train.monitor.metrics import METRICS

FACTORS = (1, 2, 4)  # lengths, as multiples of the training length
PAIRS = (4, 8, 16, 64, 256)
QUERIES = 16
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FOLDER = "evaluation"  # in the run's

Report = dict[str, Any]
Probe = tuple[np.ndarray, np.ndarray] | None
Say = Callable[[str], None]


def held_out(trained: Trained, text: str | None, tokens: int) -> tuple[HeldOut, str | None]:
    """What to measure on, and what it is called; None is what the run holds out.

    Args:
        text: a file, folder or glob of any kind that `data.sources` reads.
        tokens: to read of the file, at most.

    Raises:
        ConfigError: there is no text.
    """
    config, stored = trained.config, trained.stored
    if text is not None:
        try:
            coded = CodedText(text, config.data, trained.tokenizer, tokens)
        except ConfigError as error:
            raise ConfigError(f"--text: {error}") from None
        return HeldOutText(coded, config.train), coded.name
    if not stored.has_data:
        raise ConfigError(f"{stored.folder} has no text of its own to measure on; add --text FILE")
    return stored.material, None


def measure(
    trained: Trained,
    on: HeldOut,
    text: str | None,
    tokens: int,
    samples: int,
    say: Say = lambda line: None,
) -> Report:
    """Everything above for a model.

    Args:
        on, text: what to measure on, and what it is called, as `held_out` gives them.
        tokens: of it, at most, read at each length.
        samples: sequences of each number of pairs, depth and length; more where a batch of
            training has more.
        say: told what begins.

    Raises:
        ConfigError: there is no token to predict.
    """
    config = trained.config
    seq_len = longest_seq_len(config.data, config.train, trained.stored.step)
    lengths = [factor * seq_len for factor in FACTORS]
    if next(on.validation(tokens, seq_len), None) is None:
        raise ConfigError(
            f"{trained.stored.folder}: no token to predict, as no document is held out or "
            "--tokens is too small; add --text FILE, or train with a larger data.validation"
        )
    report: Report = {
        "checkpoint": str(trained.stored.source),
        "step": trained.stored.step,
        "text": text,
        "seq_len": seq_len,
        "validation": {},
        "loss_by_position": {},
        "loss_by_document_length": {},
    }
    for length in lengths:
        say(f"validation in sequences of up to {length:,} tokens")
        told, by_position, by_document = validate(trained, on, tokens, length)
        report["validation"][str(length)] = told
        report["loss_by_position"][str(length)] = by_position
        report["loss_by_document_length"][str(length)] = by_document
    shorter = list(dict.fromkeys([max(seq_len // 4, 2), max(seq_len // 2, 2), *lengths]))

    def count(length: int) -> int:
        return max(samples, config.train.batch_tokens // length)

    def recall(pairs: int, length: int) -> Probe:
        random = np.random.default_rng([pairs, length])
        return on.recall_probe(random, count(length), length, pairs, min(pairs, QUERIES))

    def needle(depth: float, length: int) -> Probe:
        random = np.random.default_rng([round(100 * depth), length])
        return on.needle_probe(random, count(length), length, depth)

    say("recall by number of pairs and length")
    report["recall"] = _grid(trained, recall, PAIRS, shorter, "pairs")
    say("a needle by depth and length")
    report["needle"] = _grid(trained, needle, DEPTHS, shorter, "depth")
    return report


def validate(
    trained: Trained, on: HeldOut, tokens: int, length: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """What is held out, in sequences of up to `length` tokens.

    Returns:
        `val_loss` and its kin as in an evaluation row, the loss by position, and the loss by
        length of document, both by the first number of each octave.
    """
    positions, documents = ByOctave(), ByOctave()
    byte_lengths = on.tokenizer.byte_lengths()
    size = 0
    for batch in on.validation(tokens, length):
        scores = [held.cpu() for held in score(trained, batch)]
        each = np.diff(batch.cu_seqlens)
        positions.add(shard(each, "cpu").positions, *scores)
        documents.add(torch.from_numpy(np.repeat(each, each)), *scores)
        size += int(byte_lengths[batch.labels[batch.labels >= 0]].sum())
    return summary(positions, size), positions.loss(), documents.loss()


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
    on = f" on {report['text']}" if report["text"] else ""
    lines = [f"{report['checkpoint']}{on}  (* the training length)", ""]
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


def save(report: Report, model: Path, path: Path | None) -> list[Path]:
    """Write the report as JSON and its figures, and both into TensorBoard.

    Args:
        model: the model's folder; everything lies in its `evaluation/`, and there in a folder of
            its own if it is of another text than the run's.
        path: of the JSON, if elsewhere.

    Returns:
        The files, the JSON first.

    Raises:
        ConfigError: one cannot be written.
    """
    folder = model / FOLDER / (report["text"] or "")
    try:
        return _save(report, folder, path)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror or error}") from None


def _save(report: Report, folder: Path, path: Path | None) -> list[Path]:
    from torch.utils.tensorboard import SummaryWriter

    step = report["step"] or 0
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1) + "\n"
    if path is None:
        path = folder / ("report.json" if report["step"] is None else f"step-{step:08d}.json")
        regular.replace(path, text.encode())
    else:
        path.write_text(text, encoding="utf-8")
    written = [path]
    with SummaryWriter(str(folder)) as board:
        for length, summary in report["validation"].items():
            for key, value in summary.items():
                board.add_scalar(f"evaluation/{key}/{length}", value, step)
        for name, figure in drawings(report).items():
            written.append(folder / f"{name}.png")
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=120)
            regular.replace(written[-1], drawn.getvalue())
            board.add_figure(f"evaluation/{name}", figure, step)
    return written

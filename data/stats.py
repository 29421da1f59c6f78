"""What a corpus holds and what the packer makes of it, as a report: text, JSON, figure.

A report is one dictionary of plain numbers, so the same thing is printed, saved, drawn and
given to TensorBoard.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.batch import Cursor
from data.config import DataConfig, Packing, StreamConfig
from data.ordering.packing import Packer, gaps, loads
from data.ordering.plan import Plan, Window
from data.storing.corpus import Corpus

_CHUNK = 1 << 20
_TOKENS = 1 << 24  # of the stream, looked at for the packer, in at most so many windows
_WINDOWS = 8
METHODS: tuple[Packing, ...] = ("balanced", "best_fit", "sequential")


def report(corpus: Corpus, stream: StreamConfig, data: DataConfig) -> dict[str, Any]:
    """Lengths, mixture and packing of a corpus under the given settings.

    The packer is judged on the first windows of the stream: eight, or fewer if they reach
    16 Mi tokens.
    """
    plan = Plan(corpus, stream, data)
    windows: list[Window] = []
    cursor = Cursor()
    while len(windows) < _WINDOWS and cursor.batches * stream.batch_tokens < _TOKENS:
        windows.append(plan.window(cursor))
        cursor = windows[-1].after
    manifest = corpus.manifest
    return {
        "corpus": str(corpus.path),
        "fingerprint": corpus.fingerprint,
        "documents": corpus.document_count,
        "tokens": corpus.token_count,
        "bytes_per_token": manifest["text_bytes"] / corpus.token_count,
        "validation_documents": len(corpus.validation),
        "left_out": {source["name"]: source["left_out"] for source in manifest["sources"]},
        "lengths": _lengths(corpus),
        "mixture": _mixture(plan, windows),
        "packing": {
            "batch_tokens": stream.batch_tokens,
            "seq_len": [{"step": stage.step, "seq_len": stage.seq_len} for stage in plan.stages],
            "batches": cursor.batches,
            "window_batches": [window.end for window in windows],
            "methods": {method: _judge(method, plan, windows) for method in METHODS},
        },
    }


def _lengths(corpus: Corpus) -> list[dict[str, float]]:
    """A row an octave of document length: documents, and their share of all tokens."""
    documents = np.zeros(64, dtype=np.int64)
    tokens = np.zeros(64, dtype=np.int64)
    for first in range(0, corpus.document_count, _CHUNK):
        length = np.diff(corpus.offsets[first : first + _CHUNK + 1])
        octave = np.floor(np.log2(length)).astype(np.int64)
        documents += np.bincount(octave, minlength=64)
        tokens += np.bincount(octave, length, 64).astype(np.int64)
    used = np.flatnonzero(documents)
    return [
        {
            "from": 1 << int(octave),
            "documents": int(documents[octave]),
            "tokens": int(tokens[octave]),
            "share_of_tokens": float(tokens[octave] / corpus.token_count),
        }
        for octave in range(int(used[0]), int(used[-1]) + 1)
    ]


def _mixture(plan: Plan, windows: list[Window]) -> list[dict[str, Any]]:
    """A row a deck: share of tokens in the corpus, wanted, and achieved in the windows."""
    achieved = sum(
        np.bincount(window.deck, window.documents.length, len(plan.decks)) for window in windows
    )
    wanted = sum(np.array(w.stage.weights) / sum(w.stage.weights) * w.end for w in windows)
    held = np.array([deck.tokens for deck in plan.decks], dtype=np.float64)
    return [
        {
            "source": deck.source,
            "part": "long" if deck.long else "short" if plan.data.long_tokens else "all",
            "documents": deck.last - deck.first,
            "tokens": deck.tokens,
            "share": float(share),
            "wanted": float(want),
            "achieved": float(got),
        }
        for deck, share, want, got in zip(
            plan.decks,
            held / held.sum(),
            np.atleast_1d(wanted / np.sum(wanted)),
            np.atleast_1d(achieved / np.sum(achieved)),
            strict=True,
        )
    ]


def _judge(method: Packing, plan: Plan, windows: list[Window]) -> dict[str, float]:
    """What one way of packing does to the documents of the windows."""
    size = plan.stream.batch_tokens
    load: list[np.ndarray] = []
    cuts = needed = padding = 0
    packers: dict[int, Packer] = {}
    for window in windows:
        lengths, seq_len = window.documents.length, window.stage.seq_len
        rows = window.rows
        if method != plan.data.packing:
            if seq_len not in packers:
                packers[seq_len] = Packer.fitted(method, size, seq_len, lengths)
            rows = packers[seq_len].pack(lengths, key=0)
        load.append(loads(rows, window.end))
        cuts += len(rows) - len(lengths)
        needed += int((-(-lengths // seq_len) - 1).sum())
        if method == "best_fit":
            padding += gaps(lengths, window.end, size, seq_len)
    every = np.concatenate(load)
    return {
        "cuts_per_batch": cuts / len(every),
        "needed_cuts_per_batch": needed / len(every),
        # Nothing is padded here; this is what best fit would pad if it cut nothing.
        "padding_without_cuts": padding / (len(every) * size),
        "load_mean": float(every.mean()),
        "load_std": float(every.std()),
        "load_max_over_mean": float(every.max() / every.mean()),
        "context": float(every.mean() / size / 2),
    }


def text(made: dict[str, Any]) -> str:
    """A report to read."""
    lines = [
        f"{made['corpus']}  fingerprint {made['fingerprint']}",
        f"{made['documents']:,} documents, {made['tokens']:,} tokens, "
        f"{made['bytes_per_token']:.3f} bytes a token, "
        f"{made['validation_documents']:,} documents held out",
    ]
    for name, problems in made["left_out"].items():
        if problems:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in problems.items())
            lines.append(f"{name}: left out {kinds}")
    lines += ["", "tokens of a document     documents   share of tokens"]
    for row in made["lengths"]:
        bar = "█" * round(row["share_of_tokens"] * 50)
        upto = f"{row['from']:>9,} – {2 * row['from'] - 1:<9,}"
        lines.append(f"{upto} {row['documents']:>13,}   {row['share_of_tokens']:>6.1%} {bar}")
    lines += ["", "mixture (of tokens)           held   wanted  achieved"]
    for row in made["mixture"]:
        name = row["source"] if row["part"] == "all" else f"{row['source']} ({row['part']})"
        lines.append(
            f"{name:<26} {row['share']:>7.2%}  {row['wanted']:>7.2%}  {row['achieved']:>7.2%}"
        )
    packing = made["packing"]
    first, *later = packing["seq_len"]
    longest = f"{first['seq_len']:,}"
    for stage in later:
        longest += f", from step {stage['step']:,} on {stage['seq_len']:,}"
    methods = packing["methods"]
    plain = methods["sequential"]["load_std"] / methods["sequential"]["load_mean"]
    lines += [
        "",
        f"packing {packing['batches']:,} batches of {packing['batch_tokens']:,} tokens, sequences "
        f"of at most {longest}, in windows of "
        f"{min(packing['window_batches'])} to {max(packing['window_batches'])} batches",
        "(a document's pieces are delayed by no more than its window)",
        "               cuts a batch  of them needed   Σ len²: std/mean  max/mean  steadier by",
    ]
    for method, row in methods.items():
        spread = row["load_std"] / row["load_mean"]
        lines.append(
            f"{method:<14} {row['cuts_per_batch']:>12.2f}  {row['needed_cuts_per_batch']:>14.2f}"
            f"   {spread:>16.4f}  {row['load_max_over_mean']:>8.3f}"
            f"  {plain / max(spread, 1e-12):>10.1f}×"
        )
    padding = methods["best_fit"]["padding_without_cuts"]
    lines.append(f"padding: none; best fit without cuts would pad {padding:.3%} of all tokens")
    return "\n".join(lines)


def figure(made: dict[str, Any]) -> Any:
    """A report as a matplotlib figure: lengths, mixture, Σ len²."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 3.6))  # margins are given: to find them takes longer than to draw
    margins = {"left": 0.05, "right": 0.99, "bottom": 0.25, "top": 0.96, "wspace": 0.22}
    lengths, mixture, spread = drawn.subplots(1, 3, gridspec_kw=margins)
    rows = made["lengths"]
    at = np.arange(len(rows))
    documents = np.array([row["documents"] for row in rows]) / made["documents"]
    lengths.bar(at - 0.2, documents, 0.4, label="of documents")
    lengths.bar(at + 0.2, [row["share_of_tokens"] for row in rows], 0.4, label="of tokens")
    lengths.set_xticks(at, [f"{row['from']:,}" for row in rows], rotation=60)
    lengths.set(xlabel="tokens of a document, from", ylabel="share")
    lengths.legend()
    rows = made["mixture"]
    at = np.arange(len(rows))
    for shift, key in ((-0.27, "share"), (0.0, "wanted"), (0.27, "achieved")):
        mixture.bar(at + shift, [row[key] for row in rows], 0.27, label=key)
    mixture.set_xticks(at, [f"{row['source']} {row['part']}" for row in rows])
    mixture.set(ylabel="share of tokens")
    mixture.legend()
    methods = made["packing"]["methods"]
    spread.bar(list(methods), [row["load_std"] / row["load_mean"] for row in methods.values()])
    spread.set(ylabel="Σ len² of a batch: std / mean")
    return drawn


def save(made: dict[str, Any], folder: Path) -> None:
    """Write stats.json and stats.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stats.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    figure(made).savefig(folder / "stats.png", dpi=120)

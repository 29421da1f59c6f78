"""Finished runs side by side: `python -m train table RUN…`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data import regular
from data.settings import ConfigError
from train.config import Config, read
from train.model.config import ModelConfig
from train.monitor.lines import evaluations, rows

PURE = "pure"
# The last evaluation of every run, by mixer and by its ratio to full attention.
Results = dict[str, dict[str, list[float]]]


def collect(runs: Sequence[Path], metric: str) -> Results:
    """The last evaluations of `runs`, several seeds of one model together.

    Args:
        runs: their folders.
        metric: a key of evaluation rows.

    Raises:
        ConfigError: a folder is no run's, it has not finished, or it lacks the metric.
    """
    results: Results = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if not (run / "config.yaml").exists():
            raise ConfigError(f"{run} is no run's folder: there is no config.yaml in it")
        config = read(run / "config.yaml")
        mixer, ratio = kind(config.model)
        results[mixer][ratio].append(_last(run, config, metric))
    return results


def kind(model: ModelConfig) -> tuple[str, str]:
    """The linear mixer of a model, or several with "+", and how many of its layers come to one
    of full attention; a model of attention alone is a pure one of that name.

    Windowed attention counts as linear: its state does not grow.
    """
    blocks = model.blocks
    full = [name for name in blocks if _is_full_attention(name, model)]
    linear = [name for name in blocks if name not in full]
    if not linear:
        return "attention", PURE
    mixer = "+".join(dict.fromkeys(linear))
    if not full:
        return mixer, PURE
    ratio = len(linear) / len(full)
    return mixer, f"{ratio:.3g}:1"


def text(results: Results, metric: str) -> str:
    """A Markdown table, the mixer with the best number first."""
    ratios = sorted({ratio for row in results.values() for ratio in row}, key=_purity)
    best = max if metric == "val_accuracy" else min

    def rank(mixer: str) -> float:
        mean = best(sum(values) / len(values) for values in results[mixer].values())
        return -mean if best is max else mean

    lines = [
        f"| {metric} | {' | '.join(ratios)} |",
        "|---" * (len(ratios) + 1) + "|",
    ]
    for mixer in sorted(results, key=rank):
        cells = [_cell(results[mixer].get(ratio, []), metric) for ratio in ratios]
        lines.append(f"| {mixer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float], metric: str) -> str:
    if not values:
        return ""
    style = ".1%" if metric == "val_accuracy" else ".3f"
    mean = format(sum(values) / len(values), style)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{style}}–{max(values):{style}})"


def _purity(ratio: str) -> float:
    """Orders columns from the fewest layers of full attention to the most."""
    return float("-inf") if ratio == PURE else -float(ratio.removesuffix(":1"))


def _is_full_attention(name: str, model: ModelConfig) -> bool:
    settings = model.mixers.get(name, {})
    return settings.get("kind", name) == "attention" and settings.get("window") is None


def _last(run: Path, config: Config, metric: str) -> float:
    path = run / "metrics.jsonl"
    try:
        content = regular.content(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); train the run first"
        ) from None
    step = max((row["step"] for _, row in rows(content) if row is not None), default=0)
    found = [row for row in evaluations(content) if row["step"] == step]
    if step < config.train.steps:
        raise ConfigError(
            f"{run} is at step {step} of {config.train.steps}; train it to its end first"
        )
    if not found:
        raise ConfigError(
            f"{run} has no evaluation of step {step}: no document was held out; see data.validation"
        )
    if metric not in found[-1]:
        raise ConfigError(f"{run} has no {metric}; --metric may be another")
    return float(found[-1][metric])

"""What a run will need, as a report: one dictionary of plain numbers, for JSON, text and figure."""

from __future__ import annotations

from typing import Any

import numpy as np

from parallel.planning.clusters import Cluster
from train.forecast import memory, work
from train.forecast.case import RUNTIME, SLACK, STAGES, TRAVELLING, Case
from train.forecast.speed import DAY, Speed, Times
from train.monitor import figures
from train.monitor.summary import blocks_in_words
from train.optimiser.optim import is_orthogonal

_FP32 = 4
_MOST_TRIED = 1024  # ranks, of more nodes than the run has: plans for more take seconds
ACTIVATIONS = "activations"
# Columns of the table of memory, beside activations, which stand for all layers together.
_COLUMNS = (
    memory.WEIGHTS,
    memory.GRADIENTS,
    memory.OPTIMISER,
    memory.BUFFERS,
    ACTIVATIONS,
    memory.AT_WORK,
    TRAVELLING,
    SLACK,
    RUNTIME,
)


def report(case: Case, asked_nodes: int | None, cluster: Cluster | None) -> dict[str, Any]:
    """Everything that is known of a run before it starts.

    Args:
        asked_nodes: nodes that the job script asks for, if the ranks are its.
        cluster: whose speeds a step is priced by, if they are known.
    """
    config, sizes, train = case.config, case.sizes, case.config.train
    forward = work.flops(case.model, case.lengths(case.seq_len))
    rows = [_row(case, stage, on) for stage in STAGES for on in (False, True)]
    made: dict[str, Any] = {
        "run": config.run.name,
        "model": blocks_in_words(config.model.block_kinds),
        "parameters": {"total": sizes.total, "active": sizes.active, "by_part": sizes.by_part},
        "flops_a_token": {
            "seq_len": case.seq_len,
            "forward": sum(forward.values()),
            # A backward pass is twice the work of a forward pass.
            "step": 3 * sum(forward.values()),
            "forward_by_part": forward,
        },
        "ranks": case.ranks,
        "ranks_per_node": case.ranks_per_node,
        "asked_nodes": asked_nodes,
        "device": case.device,
        "dtype": str(case.dtype).removeprefix("torch."),
        "batch_tokens": train.batch_tokens,
        "accumulate": train.accumulate,
        "tokens_a_rank": case.tokens,
        "stage": config.zero.stage,
        "checkpoint_activations": config.model.checkpoint_activations,
        "memory": {"room": case.room, "rows": rows},
        "checkpoint": {"bytes": _FP32 * sizes.total + _means(case)},
    }
    made["time"] = _time(Speed(case, cluster), made) if cluster else None
    made["nodes"] = _nodes(case, cluster) if cluster else []
    return made | {"change": _changes(case, made)}


def configured(made: dict[str, Any]) -> dict[str, Any]:
    """The row of memory that the run's own settings say."""
    return next(
        row
        for row in made["memory"]["rows"]
        if (row["stage"], row["checkpoint_activations"])
        == (made["stage"], made["checkpoint_activations"])
    )


def _row(case: Case, stage: int, checkpointed: bool) -> dict[str, Any]:
    held = case.memory(stage, checkpointed)
    return {
        "stage": stage,
        "checkpoint_activations": checkpointed,
        "kinds": held.kinds,
        "tensors": held.tensors,
        "total": held.total,
        "fits": held.total <= case.room,
        "longest_sequence": case.longest(stage, checkpointed),
    }


def _time(speed: Speed, made: dict[str, Any]) -> dict[str, Any]:
    """What the steps take: with full sequences, stage by stage, and with the text's own lengths."""
    stages = [
        {"steps": steps, "seq_len": length, **_step(times)}
        for steps, length, times in speed.stages()
    ]
    own = speed.corpus()
    return {
        "cluster": speed.case.cluster,
        "stages": stages,
        "days": sum(stage["steps"] * stage["seconds"] for stage in stages) / DAY,
        "corpus": None
        if own is None
        else {
            "batches": len(own),
            "sequences": float(np.mean([len(lengths) for lengths in own])),
            "longest": int(max(lengths.max() for lengths in own)),
            **_step(speed.times(own)),
        },
        "checkpoint_seconds": speed.saving(made["checkpoint"]["bytes"]),
    }


def _nodes(case: Case, cluster: Cluster) -> list[dict[str, Any]]:
    """The same run on fewer and on more nodes."""
    now, found = -(-case.ranks // case.ranks_per_node), []
    for nodes in sorted({max(1, now // 2), now, 2 * now, 4 * now}):
        ranks = case.ranks if nodes == now else nodes * case.ranks_per_node
        if nodes > now and ranks > min(case.config.train.batch_tokens, _MOST_TRIED):
            continue
        on = case.on(ranks)
        held = on.memory(case.config.zero.stage, case.config.model.checkpoint_activations).total
        days = sum(steps * times.step for steps, _, times in Speed(on, cluster).stages()) / DAY
        found.append(
            {
                "nodes": nodes,
                "ranks": ranks,
                "total": held,
                "fits": held <= case.room,
                "days": days,
            }
        )
    return found


def _step(times: Times) -> dict[str, float]:
    return {
        "seconds": times.step,
        "passes": times.passes,
        "made_anew": times.anew,
        "rows": times.rows,
        "zero": times.zero,
        "optimiser": times.optimiser,
        "over_even": times.passes / times.even,
        "tokens_per_second": times.tokens / times.step,
        "tokens_per_day": times.tokens / times.step * DAY,
        "mfu": times.mfu,
    }


def _means(case: Case) -> float:
    """Bytes of the optimiser's means, which are saved in fp32."""
    shapes, optim = case.sizes.shapes, case.config.optim
    return float(
        sum(
            _FP32 * shape.numel() * (1 if is_orthogonal(name, shape, optim) else 2)
            for name, shape in shapes.items()
        )
    )


def _changes(case: Case, made: dict[str, Any]) -> list[str]:
    """What to change first, as `key=value` words and why; the least costly change first."""
    now, rows = configured(made), made["memory"]["rows"]
    stage, saving = made["stage"], made["checkpoint_activations"]

    def fits(at: int, on: bool) -> bool:
        return any(
            row["fits"] for row in rows if (row["stage"], row["checkpoint_activations"]) == (at, on)
        )

    if now["fits"]:
        found = []
        if saving and fits(stage, False):
            saved = ""
            if made["time"]:
                longest = made["time"]["stages"][-1]
                share = longest["made_anew"] / longest["seconds"]
                saved = f": nothing is computed anew, which takes {share:.0%} of a step"
            found.append(f"model.checkpoint_activations=false fits{saved}")
        if stage == 3 and fits(2, saving):
            found.append("zero.stage=2 fits, and gathers weights once a step, not twice")
        return found
    found = []
    for at in range(stage, 4):
        for on in (saving, True):
            words = [f"zero.stage={at}"] * (at > stage)
            words += ["model.checkpoint_activations=true"] * (on and not saving)
            if fits(at, on) and words:
                found.append(f"{' '.join(words)} fits")
        if found:
            break
    found += _smaller(case, now)
    found += _more_nodes(case, stage, saving)
    return found or ["nothing that is tried here makes it fit: lower model.* or take larger GPUs"]


def _smaller(case: Case, now: dict[str, Any]) -> list[str]:
    """A batch in more parts, if it then fits."""
    train = case.config.train
    for parts in (2, 4, 8, 16, 32):
        size = train.batch_tokens // parts
        if size < case.seq_len:
            break
        if size <= now["longest_sequence"]:
            return [
                f"train.batch_tokens={size} train.accumulate={train.accumulate * parts} fits: "
                "the same step in more, smaller batches"
            ]
    return []


def _more_nodes(case: Case, stage: int, saving: bool) -> list[str]:
    nodes = -(-case.ranks // case.ranks_per_node)
    for times in (2, 4, 8, 16, 32):
        if case.tokens // times < 1:
            break
        larger = case.on(nodes * times * case.ranks_per_node)
        if larger.memory(stage, saving).total <= case.room:
            return [f"{nodes * times} nodes hold it: sbatch --nodes={nodes * times}"]
    return []


def text(made: dict[str, Any]) -> str:
    """A report to read."""
    parameters, flops = made["parameters"], made["flops_a_token"]
    by_part = ", ".join(f"{name} {_short(n)}" for name, n in parameters["by_part"].items() if n)
    forward = ", ".join(f"{name} {_short(n)}" for name, n in flops["forward_by_part"].items())
    what = "GPU" if made["device"] == "cuda" else "rank"
    nodes = -(-made["ranks"] // made["ranks_per_node"])
    lines = [
        f"{made['model']}; {parameters['total']:,} parameters, {parameters['active']:,} active",
        f"  {by_part}",
        f"{_short(flops['step'])}FLOP a token in sequences of {flops['seq_len']:,}; forward:",
        f"  {forward}",
        f"{made['ranks']:,} {what}s on {nodes} node{'s' * (nodes > 1)}, "
        f"{made['batch_tokens']:,} tokens a batch, {made['tokens_a_rank']:,} a {what}, "
        f"{made['dtype']}",
        "",
        *_table(made, what),
        "",
        *_detail(made, what),
        *_clocked(made, what),
        *_verdict(made, what, nodes),
    ]
    return "\n".join(lines)


def _table(made: dict[str, Any], what: str) -> list[str]:
    """A row for each stage, without and with checkpointing."""
    room = made["memory"]["room"]
    columns = ["weights", "gradients", "optimiser", "ZeRO", "kept", "at work", "travel", "slack"]
    head = "".join(f"{name:>10}" for name in [*columns, "runtime", "total"])
    size_of, unit = _unit(made)
    lines = [f"{unit} a {what} at most:", f"{'zero  checkpointing':<21}{head}   longest sequence"]
    for row in made["memory"]["rows"]:
        ours = row is configured(made)
        cells = "".join(
            f"{size / size_of:>10.2f}" for size in [*folded(row).values(), row["total"]]
        )
        on = "on" if row["checkpoint_activations"] else "off"
        longest = f"{row['longest_sequence']:,}" if row["longest_sequence"] else "none"
        mark = "" if row["fits"] else f"  over {room / 1e9:,.0f} GB"
        lines.append(
            f"{'→' if ours else ' '} {row['stage']}   {on:<15}{cells}   {longest:>16}{mark}"
        )
    return lines


def _unit(made: dict[str, Any]) -> tuple[float, str]:
    """Bytes of the unit in which sizes are shown, and its name."""
    largest = max(row["tensors"] for row in made["memory"]["rows"])
    return (1e9, "GB") if largest > 1e9 else (1e6, "MB")


def folded(row: dict[str, Any]) -> dict[str, float]:
    """A row's bytes by the columns of the table: all layers' activations are one."""
    found = dict.fromkeys(_COLUMNS, 0.0)
    for kind, size in row["kinds"].items():
        found[kind if kind in found else ACTIVATIONS] += size
    return found


def layers(row: dict[str, Any]) -> dict[str, float]:
    """A row's activations that are kept, by kind of layer."""
    return {kind: size for kind, size in row["kinds"].items() if kind not in _COLUMNS}


def _detail(made: dict[str, Any], what: str) -> list[str]:
    size_of, unit = _unit(made)
    kept = ", ".join(
        f"{kind} {size / size_of:.2f}"
        for kind, size in layers(configured(made)).items()
        if size > size_of / 200
    )
    return [f"kept at the peak (→), {unit} a {what}: {kept}"] if kept else []


def _clocked(made: dict[str, Any], what: str) -> list[str]:
    size, time = made["checkpoint"]["bytes"] / 1e9, made["time"]
    if time is None:
        return [f"a checkpoint has {size:,.2f} GB; how long a step takes needs a --cluster"]
    lines = [
        "",
        f"by the prices of {time['cluster']}, if no {what} waits for data or its host:",
        f"{'steps':>9}{'tokens of a sequence':>22}{'a step':>10}{'÷ even':>8}{'anew':>7}"
        f"{'tokens a day':>15}{'MFU':>7}",
    ]
    for stage in time["stages"]:
        length = f"{stage['seq_len']:,}"
        lines.append(f"{stage['steps']:>9,}{length:>22}" + _priced(stage))
    if own := time["corpus"]:
        lines.append(f"{'of the text itself':>19}, to {own['longest']:>8,}" + _priced(own))
    else:
        lines.append("the text is not prepared here: its own lengths are not known")
    if most := max(stage["rows"] / stage["seconds"] for stage in time["stages"]):
        lines.append(f"rows to experts and back: up to {most:.0%} of a step, nothing beside")
    others = ", ".join(
        f"{row['nodes']}: {row['days']:,.3g}" + " (does not fit)" * (not row["fits"])
        for row in made["nodes"]
    )
    lines.append(f"days by nodes: {others}")
    lines.append(
        f"{_long(time['days'])} in all; a checkpoint has {size:,.2f} GB, "
        f"{time['checkpoint_seconds']:,.1f} s beside training at 1 GB/s a node"
    )
    return lines


def _priced(step: dict[str, float]) -> str:
    anew = step["made_anew"] / step["seconds"]
    return (
        f"{_seconds(step['seconds']):>10}{step['over_even']:>8.2f}{anew:>7.0%}"
        f"{_short(step['tokens_per_day']):>14} {step['mfu']:>6.1%}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _verdict(made: dict[str, Any], what: str, nodes: int) -> list[str]:
    row, room = configured(made), made["memory"]["room"]
    said = "change first" if not row["fits"] else "may change"
    advice = [f"{said}: {line}" for line in made["change"]]
    if row["fits"]:
        return [f"it fits: {row['total'] / 1e9:,.1f} of {room / 1e9:,.1f} GB a {what}", *advice]
    who = f"{made['ranks']:,} {what}{'s' * (made['ranks'] > 1)}"
    if made["asked_nodes"]:
        who = f"the {nodes} node{'s' * (nodes > 1)} that sbatch asks for, {who},"
    return [
        f"WARNING: {who} cannot hold it: {row['total'] / 1e9:,.1f} GB a {what}, and there are "
        f"{room / 1e9:,.1f}",
        *advice,
    ]


def figure(made: dict[str, Any]) -> Any:
    """Memory as stacked bars, a bar for each stage without and with checkpointing."""
    bars = {}
    for row in made["memory"]["rows"]:
        name = f"zero {row['stage']}" + "\ncheckpointed" * row["checkpoint_activations"]
        parts = folded(row)
        bars[name] = {kind: size / 1e9 for kind, size in parts.items()}
    return figures.stacked(bars, "GB at most", made["memory"]["room"] / 1e9)


def _long(days: float) -> str:
    """A time in the largest unit that it is one of."""
    units = ((DAY, "days"), (3600, "hours"), (60, "minutes"), (0, "s"))
    size, name = next((size, name) for size, name in units if days * DAY >= size)
    return f"{days * DAY / (size or 1):,.3g} {name}"


def _short(number: float) -> str:
    """A number with a decimal prefix: 1.23 G."""
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g} {prefix}"
    return f"{number:.3g} "

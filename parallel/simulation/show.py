"""`python -m parallel show`: the plan of one batch, as text and as a picture."""

from __future__ import annotations

import numpy as np

from parallel.planning.layout import Layout, Plan

_WIDTH = 60  # the longest bar has half as many characters
_LISTED = 40  # sequences that are listed at most; of ranks twice as many


def text(plan: Plan) -> str:
    """The plan in words and bars: where each sequence lies in the stream and in attention, and the
    work of each rank."""
    lengths = np.diff(plan.cu_seqlens)
    topology = plan.topology
    tokens = int(lengths.sum())
    cut = len(plan.crossing)
    fragments = sum(map(len, plan.fragments))
    moved = plan.to_attention.tokens[plan.to_attention.source != plan.to_attention.target].sum()
    work = lengths.astype(np.float64) ** 2
    lines = [
        f"{len(lengths)} sequences, {tokens} tokens, on {topology.ranks} ranks of "
        f"{topology.nodes} nodes; strategy {plan.strategy}",
        f"the stream holds {cut} of them on several ranks, all in {fragments} fragments; "
        f"{moved} tokens change rank for full attention",
        "",
        "sequences",
    ]
    holders = _holders(plan)
    for i in range(min(len(lengths), _LISTED)):
        share = work[i] / max(work.sum(), 1)
        lines.append(
            f"  {i:>4}  {lengths[i]:>8} tokens  {share:>6.1%} of the work  "
            f"stream: {_ranks(plan.stream.rank[plan.stream.sequence == i]):<12} "
            f"attention: {holders[i]}"
        )
    if len(lengths) > _LISTED:
        lines.append(f"  … and {len(lengths) - _LISTED} more")
    lines += [
        "",
        f"{'rank':>4} {'node':>4}  tokens in the stream, in attention; its attention work",
    ]
    loads = _work(plan)
    for rank in range(min(topology.ranks, 2 * _LISTED)):
        bar = "█" * round(_WIDTH / 2 * loads[rank] / max(loads.max(), 1))
        lines.append(
            f"{rank:>4} {topology.node(rank):>4}  {plan.stream.tokens[rank]:>8} "
            f"{plan.attention.tokens[rank]:>8}  {bar}"
        )
    if topology.ranks > 2 * _LISTED:
        lines.append(f"  … and {topology.ranks - 2 * _LISTED} more")
    lines.append(
        f"work of the mean rank against the busiest: {loads.mean() / max(loads.max(), 1):.2f}"
    )
    return "\n".join(lines)


def draw(plan: Plan, path: str) -> None:
    """Draw which rank holds which part of which sequence, in the stream and in attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ranks = plan.topology.ranks
    figure, panels = plt.subplots(
        1, 2, figsize=(14, min(14.0, 2 + 0.3 * ranks)), sharey=True, sharex=True
    )
    titles = "the stream: all layers but full attention", "full attention"
    for panel, layout, title in zip(panels, (plan.stream, plan.attention), titles, strict=True):
        _panel(panel, layout, title)
        for first in plan.topology.first[1:].tolist():
            panel.axhline(first - 0.5, color="black", linewidth=1)
    panels[0].set_ylabel("rank (lines part the nodes)")
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(panel: object, layout: Layout, title: str) -> None:
    from matplotlib import colormaps

    # One colour for each sequence; multiples of the golden ratio give neighbours unlike ones.
    colours = colormaps["hsv"]((layout.sequence * 0.6180339887498949) % 1.0)
    size = layout.end - layout.start
    panel.barh(  # type: ignore[attr-defined]
        layout.rank, size, left=layout.offset, color=colours, edgecolor="white", linewidth=0.6
    )
    for row in np.flatnonzero(size > 0.06 * layout.tokens.max(initial=1))[:400]:
        panel.text(  # type: ignore[attr-defined]
            layout.offset[row] + size[row] / 2,
            layout.rank[row],
            f"{layout.sequence[row]}",
            ha="center",
            va="center",
            fontsize=7,
        )
    panel.set_title(title)  # type: ignore[attr-defined]
    panel.set_xlabel("tokens; the numbers are the sequences'")  # type: ignore[attr-defined]


def _holders(plan: Plan) -> list[str]:
    """For each sequence, which ranks attend to it, in words."""
    found = ["nobody (empty)"] * (len(plan.cu_seqlens) - 1)
    for row in range(len(plan.attention.rank)):
        found[plan.attention.sequence[row]] = f"rank {plan.attention.rank[row]}"
    if not plan.rings:
        for i in range(len(found)):
            held = plan.attention.rank[plan.attention.sequence == i]
            found[i] = f"ranks {_ranks(held)}" if len(held) else found[i]
    for ring in plan.rings:
        over = (
            "a ring over nodes" if len(ring.ranks) > 1 else "a ring" if ring.seats > 1 else "heads"
        )
        for i in ring.sequences:
            found[i] = f"{over}, ranks {_ranks(ring.members)}"
    return found


def _ranks(ranks: np.ndarray) -> str:
    """Ranks as text: a range if they are adjacent, else one by one."""
    each = np.unique(ranks)
    if not len(each):
        return "–"
    if len(each) > 2 and each[-1] - each[0] + 1 == len(each):
        return f"{each[0]}–{each[-1]}"
    return ",".join(str(rank) for rank in each)


def _work(plan: Plan) -> np.ndarray:
    """Query-key pairs of each rank in full attention: float64 (ranks,)."""
    start, end = (x.astype(np.float64) for x in (plan.attention.start, plan.attention.end))
    pairs = (end * (end + 1) - start * (start + 1)) / 2
    return np.bincount(plan.attention.rank, pairs, plan.topology.ranks)

"""Length-balanced packing of one window: equal tokens and equal Σ len² in every batch.

The time of a step grows with the tokens of its batch in most layers, and with Σ len² over
its sequences in full attention. Both are made even, in four steps:

1. Cut. A document of L > seq_len tokens becomes ⌈L / seq_len⌉ pieces, the least
   possible: all of seq_len tokens but one, and that one may be anywhere in the document,
   so pieces go to whichever batches suit them and are then given their places in order.
2. Deal. Pieces, longest first, go to the batch that misses the most Σ len². What a batch
   misses is counted after the share that its free room will bring by itself: room for R
   tokens will hold pieces no longer than those still in hand, worth R · λ, λ = Σ len² /
   Σ len over them. The many short pieces at the end are dealt in one sweep, so that every
   batch gets the same mixture of lengths. This is longest-processing-time scheduling
   (Graham, 1969) with two resources.
3. Settle. Batches now miss their tokens by a little. Swapping two pieces whose lengths
   differ by just that much sets one right, and among the thousands of pieces of a window
   nearly always there is such a pair. Only what no swap can mend is cut.
4. Trim. Where too few short pieces were left, some batches hold too much Σ len²; each is
   brought down by one more cut, if the price of cuts allows it.

Where a batch holds only few sequences of seq_len, whole ones cannot be spread evenly (four
lie in one batch, three in the next); then long documents are cut into equal parts, or
a little shorter: whichever of `CUTS` has the best price, see `choose_cut`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# Prices of a cut, against a spread of Σ len² of 1 %: one cut a batch more than needed, or a
# tenth less of Σ len², which is context that attention does not see.
_EXTRA_CUT = 0.01
_LOST_CONTEXT = 0.1
_GOOD = 0.02  # a price at which no other cut is looked at
_SWEEP = 1024  # pieces are dealt singly up to one for so many tokens of a window, then in a sweep
_LOOK_AT = 64  # pieces of a batch that settling looks at
_NEAR = np.arange(-8, 9)  # … each beside pieces of the lengths nearest to what is wanted
_TRIES = 16  # swaps a batch may take to be exact
_CUT_PRICE = 0.01  # what one more cut is worth, as a share of a batch's Σ len²


class Cut(NamedTuple):
    """How documents longer than `share` of seq_len are cut: to that length, or into equal parts."""

    share: float
    equal: bool


CUTS = (
    Cut(1.0, False),
    *(Cut(share, True) for share in (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75)),
)


@dataclass
class Deal:
    """Pieces and where they lie: document, length and batch, each int64 (pieces,)."""

    document: np.ndarray
    length: np.ndarray
    batch: np.ndarray

    def loads(self, batches: int) -> np.ndarray:
        """float64 (batches,): Σ len²."""
        return np.bincount(self.batch, self.length.astype(np.float64) ** 2, batches)


def balanced(lengths: np.ndarray, batches: int, batch_tokens: int, seq_len: int, cut: Cut) -> Deal:
    """Pack documents into batches of exactly `batch_tokens` tokens and even Σ len².

    Args:
        lengths: int64 (documents,), summing to batches * batch_tokens.
        cut: what `choose_cut` chose.
    """
    deal = _cut(lengths, max(1, int(seq_len * cut.share)), cut.equal)
    _deal(deal, batches, batch_tokens)
    return _trim(_settle(deal, batches, batch_tokens, seq_len), batches)


def choose_cut(lengths: np.ndarray, batches: int, batch_tokens: int, seq_len: int) -> Cut:
    """The cut with the best price for documents like these: evenness, cuts, and context."""
    return _best_cut(lengths.astype(np.int64).tobytes(), batches, batch_tokens, seq_len)


@lru_cache(8)  # a run's stream and its report ask for the same
def _best_cut(documents: bytes, batches: int, batch_tokens: int, seq_len: int) -> Cut:
    lengths = np.frombuffer(documents, dtype=np.int64)
    needed = int((-(-lengths // seq_len)).sum())
    full = 0.0
    prices: list[float] = []
    for cut in CUTS:
        deal = balanced(lengths, batches, batch_tokens, seq_len, cut)
        loads = deal.loads(batches)
        full = max(full, float(loads.mean()))
        prices.append(
            float(loads.std() / loads.mean())
            + _EXTRA_CUT * (len(deal.length) - needed) / batches
            + _LOST_CONTEXT * (1 - float(loads.mean()) / full)
        )
        if prices[0] <= _GOOD:
            break
    return CUTS[int(np.argmin(prices))]


def _cut(lengths: np.ndarray, longest: int, equal: bool) -> Deal:
    """Pieces of no more than `longest` tokens, by falling length."""
    count = -(-lengths // longest)
    document = np.repeat(np.arange(len(lengths)), count)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    if equal:
        base, more = np.divmod(lengths, count)
        length = base[document] + (nth < more[document])
    else:
        length = np.minimum(longest, lengths[document] - nth * longest)
    # Equal lengths go round the documents, so that those of one document are spread.
    turn = (nth + 0.5) / count[document]
    order = np.lexsort((turn, -length))
    return Deal(document[order], length[order], np.full(len(order), -1, dtype=np.int64))


def _deal(deal: Deal, batches: int, batch_tokens: int) -> None:
    """Give every piece a batch; tokens come out nearly even, Σ len² as even as can be."""
    length = deal.length.astype(np.float64)
    room = np.full(batches, float(batch_tokens))
    missing = np.full(batches, (length**2).sum() / batches)
    # As many whole rounds of the longest length as there are: no choice to make.
    rounds = int((deal.length == deal.length[0]).sum()) // batches
    rounds = min(rounds, batch_tokens // int(deal.length[0]))
    start = rounds * batches
    deal.batch[:start] = np.arange(start) // max(rounds, 1)
    room -= rounds * length[0]
    missing -= rounds * length[0] ** 2
    worth = np.cumsum(length[::-1] ** 2)[::-1] / np.cumsum(length[::-1])[::-1]
    singly = min(len(length), start + max(batches * batch_tokens // _SWEEP, 4 * batches))
    for i in range(start, singly):
        size = length[i]
        need = missing - room * worth[i]
        need[room < size] = -np.inf
        chosen = int(need.argmax())
        if room[chosen] < size:
            chosen = int(room.argmax())
        deal.batch[i] = chosen
        room[chosen] -= size
        missing[chosen] -= size * size
    if singly < len(length):
        deal.batch[singly:] = _sweep(np.maximum(room, 0.0), len(length) - singly)


def _sweep(room: np.ndarray, pieces: int) -> np.ndarray:
    """Batches for `pieces` of falling length: each batch takes evenly spaced ones of them."""
    shares = np.cumsum(room) / room.sum() * pieces
    counts = np.diff(np.floor(shares + 0.5).astype(np.int64), prepend=0)
    batch = np.repeat(np.arange(len(room)), counts)
    nth = np.arange(pieces) - np.repeat(np.cumsum(counts) - counts, counts)
    # The golden ratio spreads the batches' first pieces over one spacing.
    phase = (batch * 0.6180339887498949) % 1.0
    return batch[np.argsort((nth + phase) / counts[batch], kind="stable")]


def _settle(deal: Deal, batches: int, batch_tokens: int, seq_len: int) -> Deal:
    """Make every batch exact: by swaps of pieces, then by moving cuts, then by new cuts."""
    length, batch = deal.length, deal.batch
    excess = np.bincount(batch, length, batches).astype(np.int64) - batch_tokens
    load = deal.loads(batches)
    target = load.mean()
    by_length = np.argsort(length, kind="stable")
    ordered = length[by_length]
    owned = np.argsort(batch, kind="stable")
    edges = np.searchsorted(batch[owned], np.arange(batches + 1))
    members = [owned[edges[b] : edges[b + 1]].tolist() for b in range(batches)]
    unsettled = excess != 0

    def price(load: np.ndarray, excess: np.ndarray) -> np.ndarray:
        """What a batch's faults cost, in Σ len²: carrying d tokens over costs about 2·seq_len·d."""
        missed = np.abs(excess)
        return np.abs(load - target) + 2.0 * seq_len * missed + _CUT_PRICE * target * (missed > 0)

    for a in np.argsort(-np.abs(excess), kind="stable").tolist():
        for _ in range(_TRIES):
            if excess[a] == 0:
                break
            mine = np.array(members[a][:: max(1, len(members[a]) // _LOOK_AT)])
            low = np.searchsorted(ordered, length[mine] - excess[a], side="left")
            at = low[:, None] + _NEAR
            theirs = by_length[at.clip(0, len(ordered) - 1)]
            other = batch[theirs]
            rows, columns = np.nonzero(unsettled[other] & (other != a))
            mine, theirs, other = mine[rows], theirs[rows, columns], other[rows, columns]
            shift = length[theirs] - length[mine]
            heavier = (length[theirs] + length[mine]) * shift
            gain = (
                price(load[a], excess[a])
                + price(load[other], excess[other])
                - price(load[a] + heavier, excess[a] + shift)
                - price(load[other] - heavier, excess[other] - shift)
            )
            if not len(gain) or gain[best := int(gain.argmax())] <= 0:
                break
            x, y, b = int(mine[best]), int(theirs[best]), int(other[best])
            members[a][members[a].index(x)] = y
            members[b][members[b].index(y)] = x
            batch[x], batch[y] = b, a
            load[a] += heavier[best]
            load[b] -= heavier[best]
            excess[a] += shift[best]
            excess[b] -= shift[best]
        unsettled[a] = False
    return _recut(deal, excess, seq_len)


def _recut(deal: Deal, excess: np.ndarray, seq_len: int) -> Deal:
    """Carry tokens from batches with too many to those with too few, by cuts inside documents."""
    document, length, batch = deal.document.tolist(), deal.length.tolist(), deal.batch.tolist()
    members: dict[int, list[int]] = {int(b): [] for b in np.flatnonzero(excess)}
    for i in np.flatnonzero(excess[deal.batch]).tolist():
        members[batch[i]].append(i)
    givers = [int(b) for b in np.flatnonzero(excess > 0)]
    takers = [int(b) for b in np.flatnonzero(excess < 0)]
    left = excess.tolist()
    while givers:
        a, b = givers[-1], takers[-1]
        amount = min(left[a], -left[b])
        # A document with a piece on both sides can give without a new cut.
        here = {document[i]: i for i in members[b] if length[i] + amount <= seq_len}
        shared = [i for i in members[a] if document[i] in here and length[i] > amount]
        if shared:
            length[shared[0]] -= amount
            length[here[document[shared[0]]]] += amount
        else:
            longest = max(members[a], key=lambda i: length[i])
            amount = min(amount, length[longest] - 1) if length[longest] > 1 else amount
            length[longest] -= amount
            document.append(document[longest])
            length.append(amount)
            batch.append(b)
            members[b].append(len(length) - 1)
        left[a] -= amount
        left[b] += amount
        if left[a] == 0:
            givers.pop()
        if left[b] == 0:
            takers.pop()
    rows = np.array([document, length, batch], dtype=np.int64)
    return Deal(*rows[:, rows[1] > 0])


def _trim(deal: Deal, batches: int) -> Deal:
    """Bring batches far above the mean Σ len² down to it, each by one cut of its longest piece.

    Both parts stay in their batch, so tokens stay exact. As many are trimmed as the price
    of cuts allows.
    """
    load = deal.loads(batches)
    over = load / load.mean() - 1
    heaviest = np.argsort(-over, kind="stable")[: int((over > 0).sum())]
    spread = np.cumsum(np.append(0.0, -(over[heaviest] ** 2))) + (over**2).sum()
    prices = np.sqrt(spread.clip(0) / batches) + _EXTRA_CUT * np.arange(len(spread)) / batches
    trimmed = heaviest[: int(prices.argmin())]
    by_length = np.lexsort((deal.length, deal.batch))
    longest = by_length[np.searchsorted(deal.batch[by_length], trimmed, side="right") - 1]
    length = deal.length[longest].astype(np.float64)
    # Cut in two at x, a piece of L tokens loses 2 x (L − x) of Σ len².
    left = np.sqrt((length**2 - 2 * over[trimmed] * load.mean()).clip(0))
    part = np.maximum((length - left) / 2, 1).astype(np.int64).clip(max=deal.length[longest] - 1)
    deal.length[longest] -= part
    return Deal(
        np.append(deal.document, deal.document[longest][part > 0]),
        np.append(deal.length, part[part > 0]),
        np.append(deal.batch, trimmed[part > 0]),
    )

"""Which of the experts that a window streamed stay on the GPU, and whose slots they take.

An expert that the kernels read from host memory can be stored in a slot on the way: it crosses the
link anyway. One number decides, the *key* of an expert in a window: its value (`Policy.value`, in
pairs of a window) plus the pairs that it had. What streams is what has the highest key, and it
takes the slots of those residents of its layer without a pair that are worth the least. What the
link carries besides, it carries where it is idle: copies while a draft runs follow the same keys,
copies beside the streams of a window must win by `margin`. Numpy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Seconds of a draft model that are worth copies: in less, they bring less than the host takes to
# learn what the last window did, and to choose.
SHORTEST_DRAFT = 3e-3
# What the host does meanwhile, in seconds beside an H200 (docs/benchmarks.md): a draft with copies
# ends so much later than one without, and its copies have so much less time than it lasts.
DRAFT_LATER = 1.0e-3
COPIES_LATER = 1.5e-3

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


def stream_and_keep(
    n: Floats, value: Floats, key: Floats, resident: NDArray[np.bool_], streams: int
) -> tuple[Indices, Indices, Indices]:
    """One layer's window: the experts to stream, which of them stay, and whom they replace.

    n, value, key and resident are [E]; `streams` missing experts with pairs are read, highest key
    first, ties in order of their ids. The first stays in the slot of the idle resident of the
    lowest value, and so on, while its key is higher. A value of -inf keeps a missing expert from
    staying (its copy is under way), +inf a resident from being replaced (it is leaving).
    """
    streamed = ranked(key, (n > 0) & ~resident)[:streams]
    old = ranked(value, resident & (n == 0), descending=False)[: len(streamed)]
    new = streamed[: len(old)]
    better = key[new] > value[old]
    return streamed, new[better], old[better]


def exchange(
    key: Floats, new: Indices, resident: NDArray[np.bool_], margin: float = 0.0
) -> tuple[Indices, Indices]:
    """Of a whole model, key and resident [L, E] or flat: which of the missing experts `new`, in the
    order of `ranked`, are worth a copy, and the residents that each of them replaces, lowest first,
    as long as they win by `margin`. Flat indices."""
    old = ranked(key, resident, descending=False)[: len(new)]
    new = new[: len(old)]
    better = key.ravel()[new] > key.ravel()[old] + margin
    return new[better], old[better]


def ranked(key: Floats, among: NDArray[np.bool_], descending: bool = True) -> Indices:
    """Flat indices where `among`, by key, ties in order of the index."""
    where = np.flatnonzero(among)
    by = key.ravel()[where]
    return where[np.argsort(-by if descending else by, kind="stable")]


def margin(streamed: float) -> float:
    """By how many pairs a newcomer must win if its copy shares the link with the streams of a
    window, when a layer streamed so many experts in the last one."""
    return 0.125 + 2 * streamed

"""Replays a routing trace against a policy, a cost model and a pool of slots.

Event-atomic: an event is one layer of one verify window. All its pairs are classified against the
residency when the event starts; what to keep is decided afterwards. (Replaying the same trace token
by token lets a window's later tokens hit what its earlier ones fetched, and flatters LRU by about
28 %.) Time passes by the cost model, and copies progress with it, one at a time, at the bandwidth
of the link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spac.balance import BalanceProblem, Balancer
from spac.cost import CostModel
from spac.keep import DRAFT_LATER, SHORTEST_DRAFT
from spac.policy import Policy, PrefetchOracle, Spac
from spac.profile import Profile
from spac.replay_slots import Rounds, Slots
from spac.trace import Trace
from spac.utility import pair_counts

REJECTED = ("next", "repeat", "frequent")


@dataclass(frozen=True)
class Window:
    """One verify window: ids [W, L, k]. Rows 0..accepted were kept: accepted + 1 tokens of text."""

    ids: NDArray[np.integer]
    accepted: int
    at: float  # share of the trace that came before


class WindowSource:
    """Cuts a trace of accepted tokens into verify windows, one at a time.

    Each drafted token is accepted with chance `acceptance`. A trace does not hold what rejected
    tokens chose, so their rows are modelled: "next" routes them like the tokens that really came
    next, "repeat" like the last accepted token, "frequent" at random by the layer's frequencies.
    """

    def __init__(
        self, trace: Trace, acceptance: float = 1.0, rejected: str = "next", seed: int = 0
    ) -> None:
        if not 0 <= acceptance <= 1:
            raise ValueError(f"acceptance: needed 0..1, got {acceptance}")
        if rejected not in REJECTED:
            raise ValueError(f"rejected: expected one of {', '.join(REJECTED)}, got {rejected!r}")
        self.trace, self.acceptance, self.rejected = trace, acceptance, rejected
        self._rng, self._start = np.random.default_rng(seed), 0
        layers = range(trace.shape[1])
        ids = trace.expert_ids
        self._share = np.stack([pair_counts(ids[:, j], trace.num_experts) for j in layers])

    def draw(self, gamma: int) -> Window | None:
        """The next window of gamma + 1 rows; None when the trace has no more so many tokens."""
        tokens, _, k = self.trace.shape
        start, W = self._start, gamma + 1
        if start + W > tokens:
            return None
        misses = np.flatnonzero(self._rng.random(gamma) >= self.acceptance)
        kept = int(misses[0]) if misses.size else gamma
        rows = self.trace.expert_ids[start : start + W].copy()
        if self.rejected == "repeat":
            rows[kept + 1 :] = rows[kept]
        elif self.rejected == "frequent" and kept < gamma:
            noise = self._rng.gumbel(size=(gamma - kept, *self._share.shape))
            order = np.argsort(-(np.log(self._share + 0.1) + noise), axis=-1)
            rows[kept + 1 :] = order[..., :k]
        self._start += kept + 1
        return Window(rows, kept, start / tokens)


def make_windows(
    trace: Trace, gamma: int, acceptance: float = 1.0, rejected: str = "next", seed: int = 0
) -> list[Window]:
    """All windows of gamma + 1 rows; tokens that do not fill one at the end are left out."""
    if gamma < 0 or gamma >= trace.shape[0]:
        raise ValueError(f"gamma: needed 0..{trace.shape[0] - 1} for this trace, got {gamma}")
    source = WindowSource(trace, acceptance, rejected, seed)
    return list(iter(lambda: source.draw(gamma), None))  # type: ignore[arg-type]


@dataclass
class Replay:
    """What a replay counted, after the warm-up windows."""

    windows: int = 0
    tokens: int = 0  # that came out
    seconds: float = 0.0
    pairs: float = 0.0
    resident_pairs: float = 0.0
    copies: int = 0  # experts copied in the background
    streamed: int = 0  # experts read over the link because they were needed at once
    kept: int = 0  # of those, that stayed in a slot
    late: int = 0  # experts needed while their copy was under way
    wasted: int = 0  # background copies evicted before a pair used them
    step_seconds: list[float] = field(default_factory=list)  # every window, warm-up included
    coverage_by_window: list[float] = field(default_factory=list)
    residency: list[NDArray[np.int64]] = field(default_factory=list)  # slots per layer [L]
    expert_bytes: int = 0

    @property
    def coverage(self) -> float:
        """Share of pairs that ran on resident experts."""
        return self.resident_pairs / max(self.pairs, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of experts moved over the link per output token."""
        return (self.copies + self.streamed) * self.expert_bytes / max(self.tokens, 1)


def window_counts(windows: Sequence[Window], num_experts: int) -> NDArray[np.float64]:
    """Pairs [windows, L, E]."""
    layers = range(windows[0].ids.shape[1])
    return np.stack([[pair_counts(w.ids[:, j], num_experts) for j in layers] for w in windows])


def replay(
    windows: Iterable[Window],
    policy: Policy,
    cost: CostModel,
    slots: int,
    *,
    live: bool = False,
    streaming: bool = False,
    max_copies: int | None = None,
    keep: bool = False,
    draft_copies: bool = False,
    draft_token: float = 0.0,
    learnt: bool = False,
    warmup: float = 0.25,
    balancer: Balancer | None = None,
    balance_every: int = 8,
    profile: Profile | None = None,
    prompt: NDArray[np.float64] | None = None,
    on_window: Callable[[Window, float], None] | None = None,
) -> Replay:
    """Run every window; counts start after the first `warmup` share of the trace.

    live: copies follow scores as they are after every layer, not as they were when the window
    began. streaming: experts that are missing may be read over the link instead of computed on the
    CPU, as many as make the layer fastest, and stay if they beat a resident (three-way split).
    max_copies: copy as the engine does, in rounds of so many a window (`replay_slots.Rounds`), and
    stream as many as `CostModel.streams` says, which do not stay; None: copies follow one another.
    keep: with it, what streams stays as `spac.keep` says. draft_copies: with `keep`, what the last
    window used is also copied while a draft runs, before the next window begins (`spac.idle`).
    learnt: `cost` is as `spac.split` learns it, where a stream's seconds are what it adds to those
    of the resident experts; else both run side by side.
    balancer: sets a `Spac` policy's thresholds and quotas every `balance_every` windows.
    profile: what an earlier run saw fills the slots and starts the policy (see `attach`).
    prompt: pairs [L, E] of a window, as the prompt had them, which the policy begins from; without
    a profile each layer's most frequent ones have stayed in its slots.
    on_window(window, seconds) is called after each; `windows` may be drawn as the replay goes.
    """
    layers, num_experts = policy.shape
    if policy.foresight:
        windows = list(windows)
        policy.prepare(window_counts(windows, num_experts))
    if profile is not None:
        profile.check_model(layers, num_experts)
        policy.warm_start(profile.rate)
    if prompt is not None and not policy.foresight:
        policy.warm_start(prompt)
    fill = None if profile is None else profile.rate
    table = None
    if prompt is not None and fill is None:
        fill = -(-prompt).argsort(axis=1, kind="stable").argsort(axis=1).astype(float)  # -rank
    if max_copies is None:
        pool = Slots(layers, num_experts, slots, cost, fill)
    else:
        told = prompt is not None
        pool = Rounds(layers, num_experts, slots, cost, max_copies, fill, told, keep, draft_copies)
        table = cost.streams(num_experts, within=1.0 if keep else 1.05)
    handoff = cost.handoff if slots < layers * num_experts else 0.0
    out = Replay(expert_bytes=cost.expert_bytes)
    for w, window in enumerate(windows):
        counted = window.at >= warmup
        if counted and not out.windows:
            pool.started = pool.wasted = pool.kept = 0
        W = len(window.ids)
        if balancer is not None and isinstance(policy, Spac) and w and w % balance_every == 0:
            _balance(policy, balancer, pool, cost, slots, W, out.step_seconds, balance_every)
        pool.rank(policy)
        seconds, pairs, resident_pairs = draft_token * (W - 1), 0.0, 0.0
        pool.begin_window(policy, seconds)
        if draft_copies and seconds >= SHORTEST_DRAFT:
            seconds += DRAFT_LATER
        for layer in range(layers):
            ids = window.ids[:, layer]
            n = pair_counts(ids, num_experts)
            offset = layer * num_experts
            here = pool.resident[offset : offset + num_experts]
            hit, missing = np.flatnonzero((n > 0) & here), np.flatnonzero((n > 0) & ~here)
            pool.unused[offset + hit] = False
            if not streaming:
                streamed = missing[:0]
            elif keep and isinstance(pool, Rounds) and table is not None:
                streamed = pool.choose(layer, n, policy.pair, int(table[len(missing)]))
            else:
                streamed = _streamed(cost, n, hit, missing, pool, table)
            if counted:
                coming = pool.under_way() - offset
                out.late += int((n[coming[(coming >= 0) & (coming < num_experts)]] > 0).sum())
                out.streamed += len(streamed)
            on_link = pool.stream(len(streamed)) if len(streamed) else 0.0
            cpu = np.setdiff1d(missing, streamed, assume_unique=True)
            gpu_side = cost.gpu(len(hit) + len(streamed), n[hit].sum() + n[streamed].sum())
            if learnt:
                gpu_side += on_link
            cpu_side = cost.cpu(len(cpu), n[cpu].sum())
            took = float(cost.dense(W)) + handoff
            took += max(float(gpu_side), float(cpu_side), on_link)
            pairs, resident_pairs = pairs + n.sum(), resident_pairs + n[hit].sum()
            policy.observe(layer, ids)
            if live:
                pool.rank(policy)
            keeps = len(streamed) and table is None
            score = policy.score()[layer] if keeps else n
            for e in streamed if keeps else ():
                if not here[e] and pool.make_room(score[e]):
                    pool.settle(offset + e, score[e])
            pool.run(took - on_link)
            seconds += took
        policy.end_window(window.accepted)
        out.step_seconds.append(seconds)
        out.coverage_by_window.append(float(resident_pairs / max(pairs, 1)))
        out.residency.append(pool.resident.reshape(layers, -1).sum(axis=1))
        if counted:
            out.windows += 1
            out.tokens += window.accepted + 1
            out.seconds += seconds
            out.pairs += pairs
            out.resident_pairs += resident_pairs
        if on_window is not None:
            on_window(window, seconds)
    out.copies, out.wasted, out.kept = pool.started, pool.wasted, pool.kept
    return out


def oracle_bound(
    windows: Sequence[Window],
    num_experts: int,
    cost: CostModel,
    slots: int,
    **options: Any,
) -> Replay:
    """The best replay of `PrefetchOracle` over its discounts: the bound for this link and pool.
    options: of `replay`."""
    runs = []
    for discount in PrefetchOracle.DISCOUNTS:
        oracle = PrefetchOracle(windows[0].ids.shape[1], num_experts, slots)
        oracle.discount = discount
        runs.append(replay(windows, oracle, cost, slots, live=True, **options))
    return max(runs, key=lambda r: r.tokens_per_second)


def _streamed(
    cost: CostModel,
    n: NDArray[np.float64],
    hit: NDArray[np.intp],
    missing: NDArray[np.intp],
    pool: Slots,
    table: NDArray[np.int32] | None,
) -> NDArray[np.intp]:
    """The missing experts to read over the link, most pairs first: as many as the engine's table
    says, or as make the slowest side fastest."""
    order = missing[np.argsort(-n[missing], kind="stable")]
    if table is not None:
        return order[: table[len(order)]]
    k = np.arange(len(order) + 1)
    moved = np.concatenate([[0.0], n[order].cumsum()])
    gpu = cost.gpu(len(hit) + k, n[hit].sum() + moved)
    cpu = cost.cpu(len(order) - k, moved[-1] - moved)
    link = pool.link_seconds(k)
    return order[: int(np.maximum(np.maximum(gpu, cpu), link).argmin())]


def _balance(
    policy: Spac,
    balancer: Balancer,
    pool: Slots,
    cost: CostModel,
    slots: int,
    tokens: int,
    step_seconds: list[float],
    horizon: int,
) -> None:
    plan = balancer.solve(
        BalanceProblem.build(
            utility=policy.utility,
            counts=policy.expected,
            resident=pool.resident.reshape(policy.shape),
            cost=cost,
            pool=slots,
            byte_window=horizon * float(np.mean(step_seconds[-horizon:])) / cost.h2d_byte,
            tokens=tokens,
            horizon=horizon,
        )
    )
    if plan is not None:
        policy.tau, policy.quota = plan.tau, plan.slots.astype(float)

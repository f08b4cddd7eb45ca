"""The truth: every operator in plain torch, one obvious way, fp32 (or fp64) accumulation.

Kernels are tested against these functions; nothing here is tuned. Shapes: T tokens (W in a verify
window), k chosen experts per token, E experts, H hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spac.keep import stream_and_keep
from spac.layout import ExpertLayout, Places
from spac.quantize import dequantize


def activate(gate: Tensor, up: Tensor, layout: ExpertLayout) -> Tensor:
    """act(gate) * up, or GPT-OSS's clamped form; see `ExpertLayout`."""
    if layout.activation == "swiglu_clamp":
        gate = gate.clamp(max=layout.limit)
        up = up.clamp(min=-layout.limit, max=layout.limit)
        return (up + 1) * gate * torch.sigmoid(layout.alpha * gate)
    if layout.activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if layout.activation == "gelu":
        return F.gelu(gate) * up
    return (F.silu(gate) if layout.activation == "silu" else F.relu(gate)) * up


def expert_ffn(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    layout: ExpertLayout,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """y[t] = sum_j weights[t, j] * ffn(ids[t, j], x[t]); invalid ids (-1, >= E) add nothing.

    x [T, H], ids [T, k] int, weights [T, k]; gate_up [E, 2I, H] and down [E, H, I] unless
    `layout.transposed`. Differentiable; accumulates in the widest of fp32 and x.dtype.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    y = x.new_zeros(x.shape, dtype=acc)
    for e in range(layout.num_experts):
        token, choice = torch.where(ids == e)
        if token.numel() == 0:
            continue
        w_gu, w_d = gate_up[e], down[e]
        if layout.transposed:
            w_gu, w_d = w_gu.T, w_d.T
        h = x[token].to(acc) @ w_gu.to(acc).T
        if gate_up_bias is not None:
            h = h + gate_up_bias[e].to(acc)
        gate, up = (h[:, ::2], h[:, 1::2]) if layout.interleaved else h.chunk(2, dim=-1)
        out = activate(gate, up, layout) @ w_d.to(acc).T
        if down_bias is not None:
            out = out + down_bias[e].to(acc)
        y = y.index_add(0, token, out * weights[token, choice, None].to(acc))
    return y.to(x.dtype)


def expert_ffn_quantized(
    x: Tensor, ids: Tensor, weights: Tensor, sections: dict[str, Tensor], layout: ExpertLayout
) -> Tensor:
    """`expert_ffn` with the weights that the quantised `sections` [E, ...] stand for.

    Exact in the dequantised weights, which are products of two numbers: what a kernel adds to the
    error of `spac.quantize` is its own.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    w = dequantize(sections, layout, acc)
    return expert_ffn(
        x, ids, weights, w["gate_up"], w["down"], layout, w.get("gate_up_bias"), w.get("down_bias")
    )


def activate_backward(gate: Tensor, up: Tensor, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    """d activate / d gate and d activate / d up, elementwise."""
    if layout.activation == "swiglu_clamp":
        g, u = gate.clamp(max=layout.limit), up.clamp(min=-layout.limit, max=layout.limit)
        s = torch.sigmoid(layout.alpha * g)
        d_gate = (u + 1) * s * (1 + layout.alpha * g * (1 - s))
        return d_gate * (gate <= layout.limit), g * s * (up.abs() <= layout.limit)
    if layout.activation == "silu":
        s = torch.sigmoid(gate)
        act, slope = gate * s, s * (1 + gate * (1 - s))
    elif layout.activation == "relu":
        act, slope = F.relu(gate), (gate > 0).to(gate)
    elif layout.activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(gate * 0.5**0.5))
        act, slope = gate * cdf, cdf + gate * torch.exp(-0.5 * gate**2) / (2 * torch.pi) ** 0.5
    else:
        t = torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
        inner = (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * gate**2)
        act, slope = 0.5 * gate * (1 + t), 0.5 * (1 + t) + 0.5 * gate * (1 - t**2) * inner
    return slope * up, act


def expert_ffn_backward(
    dy: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    layout: ExpertLayout,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    frozen: bool = False,
) -> list[Tensor]:
    """Gradients of `expert_ffn` for dy [T, H]: of x, weights and, unless `frozen`, the parameters.

    Each has the shape and dtype of its tensor; those of experts that no token chose are zero.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    dx = torch.zeros_like(x, dtype=acc)
    d_weights = torch.zeros_like(weights, dtype=acc)
    parameters = () if frozen else (gate_up, down, gate_up_bias, down_bias)
    grads = [torch.zeros_like(p) for p in parameters if p is not None]
    for e in range(layout.num_experts):
        token, choice = torch.where(ids == e)
        if token.numel() == 0:
            continue
        w_gu, w_d = gate_up[e].to(acc), down[e].to(acc)
        if layout.transposed:
            w_gu, w_d = w_gu.T, w_d.T
        x_e, dy_e = x[token].to(acc), dy[token].to(acc)
        h = x_e @ w_gu.T
        if gate_up_bias is not None:
            h = h + gate_up_bias[e].to(acc)
        gate, up = (h[:, ::2], h[:, 1::2]) if layout.interleaved else h.chunk(2, dim=-1)
        act = activate(gate, up, layout)
        out = act @ w_d.T
        if down_bias is not None:
            out = out + down_bias[e].to(acc)
        d_weights[token, choice] = (out * dy_e).sum(-1)
        d_out = dy_e * weights[token, choice, None].to(acc)
        d_act = d_out @ w_d
        d_gate, d_up = (d * d_act for d in activate_backward(gate, up, layout))
        d_h = (
            torch.stack([d_gate, d_up], dim=-1).flatten(1)
            if layout.interleaved
            else torch.cat([d_gate, d_up], dim=-1)
        )
        dx.index_add_(0, token, d_h @ w_gu)
        if grads:
            g_gu, g_d = d_h.T @ x_e, d_out.T @ act
            grads[0][e], grads[1][e] = (g_gu.T, g_d.T) if layout.transposed else (g_gu, g_d)
        for grad, g in zip(grads[2:], (d_h, d_out), strict=False):
            grad[e] = g.sum(0)
    return [dx.to(x.dtype), d_weights.to(weights.dtype), *grads]


def route(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax over the experts, then the top k: weights fp32 [W, k] and ids int32 [W, k].

    logits [W, E] float. Best first, the lower id of equals first; with `normalize` a token's
    weights add up to 1. As the routers of Qwen3-MoE, Mixtral and OLMoE in transformers.
    """
    probs = logits.float().softmax(-1)
    probs, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    weights = probs[:, :top_k]
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.contiguous(), ids[:, :top_k].to(torch.int32)


def verify(
    ids: Tensor,
    address: Tensor,
    utility: Tensor,
    bounds: Tensor,
    counters: Tensor,
    max_utility: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Split the pairs of one verify window by residency, group them, update the utility.

    ids [W, k]; address int64 [E] (0 = not on the GPU); utility int32 [E] and counters int64 [4]
    are updated in place; bounds int32 [2] = (up, down). With n[e] the pairs of expert e:
    u += 1 if n - u >= up; u -= 1 if u - n >= down; clipped to 0..max_utility.
    counters += (pairs, resident pairs, distinct experts, distinct resident experts).

    Returns resident_ids [W, k] and cpu_ids [W, k] (int32, -1 = not this side), counts [E] int32,
    order [W * k] int32 (the resident pairs t * k + j, by expert, then the rest as -1), and
    offsets [E + 1] int32 (group e is order[offsets[e]:offsets[e + 1]]).
    """
    E = address.numel()
    flat = ids.reshape(-1).to(torch.int64)
    valid = (flat >= 0) & (flat < E)
    safe = flat.clamp(0, E - 1)
    resident = valid & (address[safe] != 0)
    n = torch.bincount(safe[valid], minlength=E).to(torch.int32)
    up, down = bounds[0], bounds[1]
    step = (n - utility >= up).to(torch.int32) - (utility - n >= down).to(torch.int32)
    utility.copy_((utility + step).clamp(0, max_utility))
    here = (n > 0) & (address != 0)
    counters += torch.stack([n.sum(), resident.sum(), (n > 0).sum(), here.sum()]).to(counters)
    minus = torch.full_like(flat, -1)
    resident_ids = torch.where(resident, flat, minus).reshape(ids.shape).to(torch.int32)
    cpu_ids = torch.where(valid & ~resident, flat, minus).reshape(ids.shape).to(torch.int32)
    key = torch.where(resident, flat, torch.full_like(flat, E))
    order = torch.argsort(key, stable=True)
    order = torch.where(key[order] < E, order, -1).to(torch.int32)
    sizes = torch.where(address != 0, n, torch.zeros_like(n))
    offsets = F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
    return resident_ids, cpu_ids, n, order, offsets


def split_window(
    ids: Tensor,
    address: Tensor,
    host: Tensor,
    utility: Tensor,
    bounds: Tensor,
    counters: Tensor,
    frequency: Tensor,
    streams: Tensor,
    streamed: Tensor,
    max_utility: int,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """`verify` of one window, and who computes what is missing: the link or the CPU.

    ids [W, k]; address, host int64 [E] of the slots (0 = none) and of host memory; utility, bounds
    and counters as of `verify`; frequency int64 [E] counts pairs. streams int32 [E + 1]: how many
    of n missing experts the GPU reads from host memory itself. Those of the most pairs are read,
    ties in order of their ids; their number is added to streamed int64 [1].

    With `places` (spac.pull) no more are read than there are, and what counts is an expert's pairs
    plus its value. The i-th one takes the slot of the i-th resident without a pair in this window,
    the lowest value first, if it counts more than that; address, places.target and places.exchanged
    (newcomer, victim; else -1) say so. Else it goes to the place's own memory. Flags are 0
    afterwards. The rule is that of spac.keep.

    Returns where the GPU finds each expert, int64 [E] (0: the CPU computes it), and cpu_ids
    int32 [W, k] (-1 = not its).
    """
    counts = verify(ids, address, utility, bounds, counters, max_utility)[2]
    frequency += counts
    E = address.numel()
    missing = (counts > 0) & (address == 0)
    take = int(streams[missing.sum()])
    value = torch.zeros_like(counts, dtype=torch.float32)
    if places is not None:
        take, value = min(take, len(places.source)), places.value
    n, worth, key, here = (t.cpu().numpy() for t in (counts, value, value + counts, address != 0))
    chosen = stream_and_keep(n, worth, key, here, take)
    coming, new, old = (torch.from_numpy(experts).to(ids.device) for experts in chosen)
    streamed += len(coming)
    targets = host[coming]
    if places is not None:
        _give_places(coming, new, old, address, host, places)
        targets = places.target[: len(coming)]
    where = address.clone()
    where[coming] = targets
    flat = ids.to(torch.int64)
    valid = (flat >= 0) & (flat < E)
    for_cpu = valid & (where[flat.clamp(0, E - 1)] == 0)
    return where, torch.where(for_cpu, flat, -1).to(torch.int32)


def _give_places(
    coming: Tensor, new: Tensor, old: Tensor, address: Tensor, host: Tensor, places: Places
) -> None:
    rank = torch.arange(len(places.source), device=host.device)
    places.target.copy_(places.memory.data_ptr() + rank * places.memory.stride(0))
    places.of.fill_(-1)
    places.of[coming] = rank[: len(coming)].to(torch.int32)
    places.source.zero_()
    places.source[: len(coming)] = host[coming]
    places.flags.zero_()
    places.exchanged.fill_(-1)
    stays = places.of[new].long()
    places.target[stays] = address[old]
    address[new] = address[old]
    address[old] = 0
    # Last: without it, who was interrupted finds things as they were (`Pull.resume`).
    places.exchanged[stays] = torch.stack([new, old], 1).to(places.exchanged)


def settle(
    utility: Tensor,
    before: Tensor,
    ids: Tensor,
    accepted: Tensor,
    bounds: Tensor,
    rejected_weight: float,
    max_utility: int,
) -> None:
    """Redo the utility update of one window, counting the pairs of rejected tokens less.

    utility, before int32 [L, E] (after and before the window), ids [L, W, k], accepted = number of
    drafted tokens accepted (rows 0..accepted of the window hold), bounds int32 [L, 2].
    n[e] = pairs in kept rows + rejected_weight * pairs in rejected rows, exact in fp64 with the
    weight rounded to fp32. utility changes in place.
    """
    E = utility.shape[1]
    weight = torch.tensor(rejected_weight, dtype=torch.float32).double()
    keep = torch.arange(ids.shape[1], device=ids.device) <= accepted
    for layer in range(ids.shape[0]):
        kept, rejected = (
            torch.bincount(rows[(rows >= 0) & (rows < E)], minlength=E).double()
            for rows in (ids[layer][keep].to(torch.int64), ids[layer][~keep].to(torch.int64))
        )
        n = kept + weight.to(kept.device) * rejected
        u = before[layer].double()
        up, down = bounds[layer].double()
        step = (n - u >= up).to(torch.int32) - (u - n >= down).to(torch.int32)
        utility[layer] = (before[layer] + step).clamp(0, max_utility)


def combine(partials: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of fp32 [T, H] partial results, in list order, cast once to `dtype`."""
    total = partials[0].float()
    for p in partials[1:]:
        total = total + p.float()
    return total.to(dtype)


def accept_greedy(logits: Tensor, draft: Tensor) -> Tensor:
    """Longest prefix of `draft` that the target's argmax agrees with, and the token after it.

    logits [W, V] with W = gamma + 1, draft int64 [gamma]. Returns int64 [2] =
    (accepted, next_token); the lowest index wins a tie, as in torch.argmax on CPU.
    """
    choice = logits.argmax(dim=-1)
    agree = (choice[:-1] == draft).to(torch.int64)
    accepted = agree.cumprod(0).sum()
    return torch.stack([accepted, choice[accepted]])


def accept_sample(logits: Tensor, draft: Tensor, draft_probs: Tensor | None, u: Tensor) -> Tensor:
    """Speculative sampling (Leviathan et al. 2023, algorithm 1): exact target distribution.

    logits [W, V] already warped (temperature, top-k, top-p as -inf), draft int64 [gamma],
    draft_probs fp32 [gamma, V] or None for a deterministic draft (one-hot), u fp32 [gamma + 1]
    uniform in [0, 1). Token i is accepted if u[i] * q_i(draft_i) < p_i(draft_i); the first
    rejected position samples from norm(max(p - q, 0)), the bonus position from p, by inverse CDF
    at u[gamma]. Returns int64 [2] = (accepted, next_token).
    """
    p = torch.softmax(logits.double(), dim=-1)
    gamma = draft.numel()
    accepted = gamma
    for i in range(gamma):
        q_i = 1.0 if draft_probs is None else draft_probs[i, draft[i]].double()
        if not bool(u[i].double() * q_i < p[i, draft[i]]):
            accepted = i
            break
    residual = p[accepted]
    if accepted < gamma:
        if draft_probs is None:
            residual = residual.clone()
            residual[draft[accepted]] = 0
        else:
            residual = (residual - draft_probs[accepted].double()).clamp(min=0)
    cdf = residual.cumsum(0)
    token = torch.searchsorted(cdf, u[gamma].double() * cdf[-1], right=True)
    last = torch.nonzero(residual)[-1, 0]  # rounding may point past the last possible token
    return torch.stack([torch.tensor(accepted, device=p.device), torch.minimum(token, last)])


def window_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 [W, heads * D], and the window's rows of the caches [kv_heads, W, D].

    Arguments as of kernels/window_attention.py; keys, values [kv_heads, n, D] as far as filled.
    """
    kv_heads, length, D = keys.shape
    W = qkv.shape[0]

    def turned(x: Tensor, norm: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.double()
        half = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
        return x * cos.double()[:, None] + half * sin.double()[:, None]

    x = qkv.double().view(W, -1, D)
    q = turned(x[:, : -2 * kv_heads], q_norm).transpose(0, 1)
    k = turned(x[:, -2 * kv_heads : -kv_heads], k_norm).transpose(0, 1)
    v = x[:, -kv_heads:].transpose(0, 1)
    groups = q.shape[0] // kv_heads
    all_k = torch.cat([keys.double(), k], 1).repeat_interleave(groups, 0)
    all_v = torch.cat([values.double(), v], 1).repeat_interleave(groups, 0)
    place = torch.arange(length + W, device=qkv.device)
    hidden = place > length + torch.arange(W, device=qkv.device)[:, None]
    scores = (q @ all_k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1) @ all_v
    return out.transpose(0, 1).reshape(W, -1), k, v

"""The kernels of a window and of training, each once at a small size, for compute-sanitizer:

compute-sanitizer --tool memcheck python -m spac.bench.gpu_once     (and --tool racecheck)
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from spac import ops
from spac.kernels.expert_ffn import expert_ffn, expert_ffn_train
from spac.kernels.expert_ffn_backward import expert_ffn_backward
from spac.kernels.handoff import join, send
from spac.kernels.split_window import split_window
from spac.layout import ExpertLayout, ExpertTable
from spac.pull import Pull
from spac.store import HostStore

DEV = "cuda"


def window(tokens: int = 5, top_k: int = 3) -> None:
    """Experts in slots, on their way and nowhere; then the CPU's answer."""
    layout = ExpertLayout(12, 96, 40, torch.bfloat16)
    E, H = layout.num_experts, layout.hidden
    store = HostStore([layout], pin=True)
    store.allocate().random_(0, 60)
    memory = torch.zeros(3, layout.blob_bytes, dtype=torch.uint8, device=DEV)
    exchanged = torch.full((1, 3, 2), -1, dtype=torch.int32, device=DEV)
    link = Pull(memory, exchanged, [layout])
    link.places[0].value.uniform_()
    slots = store.blobs[0][:4].to(DEV)
    address = torch.zeros(E, dtype=torch.int64, device=DEV)
    address[:4] = slots.data_ptr() + torch.arange(4, device=DEV) * slots.stride(0)
    utility, seen, waited = torch.zeros(3, E, dtype=torch.int32, device=DEV)
    bounds = torch.tensor([2, 1], dtype=torch.int32, device=DEV)
    counters, frequency, streamed = (
        torch.zeros(n, dtype=torch.int64, device=DEV) for n in (4, E, 1)
    )
    streams = torch.full((E + 1,), 3, dtype=torch.int32, device=DEV)
    state = utility, bounds, counters, frequency, streams, streamed
    ids = torch.randint(0, E, (tokens, top_k), device=DEV, dtype=torch.int32)
    host = store.table(0).address.to(DEV)
    where, cpu_ids = split_window(ids, address, host, *state, 5, link.places[0])
    link.start(0)
    table = replace(ExpertTable.from_blobs(layout, where, owner=store), places=link.places[0])
    for n in (tokens, 20):  # both paths wait for what is on its way
        x, chosen = torch.randn(n, H, device=DEV).bfloat16(), ids.repeat(n // tokens, 1)
        partial = ops.expert_ffn_table(x, chosen, torch.rand(n, top_k, device=DEV), table)
    link.finish()
    link.check()
    rest = torch.zeros(20, H, pin_memory=True)
    done = torch.ones(2, dtype=torch.int32, pin_memory=True)
    failed = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    number, arrived = torch.ones(1, dtype=torch.int32, device=DEV), torch.zeros_like(seen[:1])
    hidden, weights = torch.randn(64, H, device=DEV), torch.rand(tokens, top_k, device=DEV)
    rows = hidden, cpu_ids, weights
    x, i, w = (torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in rows)
    for n in (len(hidden), tokens):  # by several programs, and by one
        send(hidden[:n], cpu_ids, weights, (x, i, w), done, number, arrived, 0)
    join(partial, rest, cpu_ids, torch.bfloat16, done, failed, number, seen, waited, 0)


def training(tokens: int = 300, top_k: int = 2) -> None:
    """Forward and backward, through descriptors where the GPU has them."""
    E, H, inter = 4, 256, 128
    layout = ExpertLayout(E, H, inter, torch.bfloat16)
    gate_up = (0.05 * torch.randn(E, 2 * inter, H, device=DEV)).bfloat16()
    down = (0.05 * torch.randn(E, H, inter, device=DEV)).bfloat16()
    table = ExpertTable.from_parameters(layout, gate_up, down)
    x = torch.randn(tokens, H, device=DEV).bfloat16()
    ids = torch.randint(-1, E, (tokens, top_k), device=DEV)
    weights = torch.rand(tokens, top_k, device=DEV)
    _, saved = expert_ffn_train(x, ids, weights, table)
    dy = torch.randn_like(x)
    expert_ffn_backward(dy, x, ids, weights, table, gate_up, down, saved=saved)
    expert_ffn(x, ids, weights, table)


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_once: no CUDA device", file=sys.stderr)
        return 2
    window()
    training()
    torch.cuda.synchronize()
    print("every kernel ran")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

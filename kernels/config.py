"""Block sizes of the expert FFN: a pure function of the problem and the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

# Tokens that fit one matmul tile of the smallest height.
TOKEN_ROWS = 16
# Rows of an expert, on average, above which tiles of 128 rows through descriptors are faster.
DESCRIPTOR_ROWS = 48


@dataclass(frozen=True)
class Tile:
    """One matmul: `block_n` counts intermediate units for gate-up, hidden units for down.

    A tile with at most `small_m` rows, as the last one of an expert often is, is computed at that
    height (paths of sorted rows); 0: a quarter of block_m if that is at least 16.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    small_m: int = 0

    def launch(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def with_rows(self, block_m: int) -> dict[str, int]:
        """`launch` for the tiles of a plan, which have `block_m` rows."""
        small = self.small_m or (block_m // 4 if block_m >= 64 else block_m)
        return self.launch() | {"BLOCK_M": block_m, "SMALL_M": min(small, block_m)}


@dataclass(frozen=True)
class FFNConfig:
    """path "tokens" takes at most 16 tokens, "grouped" any number, "descriptors" the same of tables
    that `kernels/grouped_tma.py` can read. `hidden` and `outer` are for gradients: `outer` of the
    weights', where block_k counts rows and block_m the columns of the side by token.
    """

    path: str
    gate_up: Tile
    down: Tile
    outer: Tile = Tile(64, 64, 32, 4, 3)
    hidden: Tile | None = None  # of d_pre; None: gate_up, narrower


@dataclass(frozen=True)
class Device:
    """What a tile choice depends on. `shared` is the shared memory of one program, in bytes."""

    major: int
    minor: int
    shared: int


HOPPER = Device(9, 0, 227 * 1024)


@cache
def device_of(device: torch.device) -> Device:
    """Properties of a CUDA device; a CPU (the interpreter) is treated as an H200."""
    if device.type != "cuda":
        return HOPPER
    p = torch.cuda.get_device_properties(device)
    shared = getattr(p, "shared_memory_per_block_optin", 99 * 1024)
    return Device(p.major, p.minor, shared)


def fit(tile: Tile, columns: int, itemsize: int, shared: int) -> Tile:
    """Fewer stages, then shorter steps, until the pipeline's buffers fit shared memory."""
    while True:
        stage = (tile.block_m + columns * tile.block_n) * tile.block_k * itemsize
        stages = min(tile.num_stages, (shared - 4096) // stage)
        if stages >= 2 or tile.block_k <= 32:
            return replace(tile, num_stages=max(stages, 1))
        tile = replace(tile, block_k=tile.block_k // 2)


def select_config(
    tokens: int,
    top_k: int,
    layout: Any,
    device: Device,
    path: str | None = None,
    descriptors: bool = False,
) -> FFNConfig:
    """Tiles for `tokens` tokens of `top_k` experts each, over experts of `layout`.

    descriptors: the table can be read through them, and it may be if that is faster.
    """
    path = path or ("tokens" if tokens <= TOKEN_ROWS else "grouped")
    if layout.dtype == torch.float32:
        small, big = Tile(16, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2)
        tile = big if path == "grouped" else small
        return FFNConfig(path, tile, tile, tile)
    if path == "tokens":
        gate_up, down = Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)
    else:
        rows = tokens * top_k / layout.num_experts
        if descriptors and device.major == 9 and rows > DESCRIPTOR_ROWS:
            gate_up, down = Tile(128, 128, 64, 8, 4, 32), Tile(128, 256, 64, 8, 4, 32)
            if rows <= 96:
                gate_up, down = Tile(128, 128, 64, 8, 4, 64), Tile(128, 128, 64, 4, 3, 64)
            outer, hidden = Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4)
            return FFNConfig("descriptors", gate_up, down, outer, hidden)
        if rows <= 6:
            gate_up, down = Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)
        elif rows <= 24:
            gate_up, down = Tile(32, 64, 128, 4, 3), Tile(32, 64, 128, 4, 3)
        elif rows <= 96:
            gate_up, down = Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)
        elif device.major >= 9:
            gate_up, down = Tile(128, 128, 64, 8, 4), Tile(128, 256, 32, 8, 6)
        else:  # mma.sync keeps both operands in registers: larger tiles spill
            gate_up, down = Tile(128, 64, 32, 8, 4), Tile(128, 128, 32, 8, 4)
    size = layout.dtype.itemsize
    return FFNConfig(
        path,
        fit(gate_up, 2, size, device.shared),
        fit(down, 1, size, device.shared),
        fit(Tile(128, 128, 64, 8, 3), 1, size, device.shared),
    )

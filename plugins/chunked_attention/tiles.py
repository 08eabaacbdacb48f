"""Tile sizes by GPU generation, and into how many parts the keys of a decode step are split.

The tables were chosen so that ptxas spills no register (`artifacts`, `resources.json`); speed on a GPU has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_SPLITS = 64
BLOCK_SCAN = 2048  # positions that are looked at at a time to find what can be seen
SMALL_SHARED = 48 << 10  # shared memory that every launcher gives without being asked


@dataclass(frozen=True)
class Tile:
    """BLOCK_M rows (queries times heads of a group) by BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_for(cc: int, head_dim: int, num_rows: int, *, item: int = 2, scaled: bool = False) -> Tile:
    """Of compute capability `cc` (90 for 9.0), `num_rows` rows in all and elements of `item` bytes; few rows get a low tile.
    `scaled`: keys and values are converted as they are read."""
    if num_rows <= 16:
        return Tile(16, 64 if head_dim * item <= 256 and not scaled else 32, 4, 2)
    if item == 4 or head_dim > 128:
        return Tile(32, 32, 4, 2)
    if cc in (90, 100) and num_rows > 64:
        return Tile(128, 64, 8, 3 if head_dim > 64 else 4)
    return Tile(64, 64 if head_dim <= 64 and cc < 120 else 32, 4, 2)


def num_splits(num_slots: int, num_programs: int, num_sms: int, block_n: int) -> int:
    """Parts of the keys, so that twice as many programs run as there are multiprocessors, each with four blocks of keys at least."""
    wanted = -(-2 * num_sms // max(1, num_programs))
    return max(1, min(wanted, MOST_SPLITS, num_slots // (4 * block_n)))

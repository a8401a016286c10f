"""Slots of a generation state: sinks, a ring of tokens and, for each level, a ring of groups, side by side in one tensor."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """Which slot holds what: sink t is in slot ``t``, token t of a row, whether it is a sink or not, in slot ``sinks + t % ring``, summary
    r of group g of level l (counted from 0) in slot ``sinks + ring + (l * groups + g % groups) * rank + r``.
    """

    block_size: int
    rank: int
    spare: int  # blocks that can be taken back
    sinks: int = 0  # that there is room for

    @classmethod
    def for_rollback(cls, block_size: int, rank: int, rollback: int, sinks: int = 0) -> "Layout":
        """One from which ``rollback`` tokens can be taken back, rounded up to whole blocks."""
        return cls(block_size, rank, max(1, -(-rollback // block_size)), sinks)

    def holding(self, sinks: int, length: int) -> "Layout":
        """With room for those of ``sinks`` sinks that a row of ``length`` tokens has; a row that grows needs it anew as it doubles."""
        blocks = max(1, -(-length // self.block_size))
        return replace(self, sinks=min(sinks, self.block_size << (blocks - 1).bit_length()))

    @property
    def ring(self) -> int:
        """Tokens that are kept. Two blocks of them are seen."""
        return (2 + self.spare) * self.block_size

    @property
    def groups(self) -> int:
        """Groups of a level that are kept. Three of them are seen, or become children of a group."""
        return 3 + self.spare

    def slots(self, levels: int) -> int:
        return self.sinks + self.ring + levels * self.groups * self.rank

    def of_tokens(self, tokens: range, device: torch.device) -> torch.Tensor:
        return torch.arange(tokens.start, tokens.stop, device=device) % self.ring + self.sinks

    def of_next(self, past: list[int], device: torch.device) -> tuple:
        """Index of the slots of the tokens after ``past`` others in tensors ``(batch, heads, slots, ...)``."""
        slots = [self.sinks + length % self.ring for length in past]
        if len(set(past)) == 1:
            return slice(None), slice(None), slots[0]
        return torch.arange(len(past), device=device), slice(None), torch.tensor(slots, device=device)

    def of_groups(self, level: int, groups: range, device: torch.device) -> torch.Tensor:
        return _slots_of_groups(self, level, groups.start % self.groups, len(groups), device)

    def seen(self, past: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the token after ``past`` ``(batch,)`` others sees, bool: of the sinks, those before its near field, and of the ring of
        tokens, ``(batch, sinks + ring)``, and of those of groups, level after level, ``(batch, levels * groups)``.
        """
        last, m = past[:, None], self.block_size
        token = last - (last - torch.arange(self.ring, device=past.device)) % self.ring
        begin = (last // m - 1).clamp(min=0) * m
        near = torch.cat([torch.arange(self.sinks, device=past.device) < begin, token >= begin], 1)
        own = last // (m << torch.arange(levels, device=past.device).repeat_interleave(self.groups))
        group = own - 1 - (own - 1 - torch.arange(self.groups, device=past.device).repeat(levels)) % self.groups
        return near, (group >= 0) & (own - group >= 2) & (own // 2 - group // 2 <= 1)


@lru_cache(256)  # asked for again and again by the steps of all layers
@torch.inference_mode(False)
def _slots_of_groups(layout: Layout, level: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    group = torch.arange(first, first + count, device=device)[:, None] % layout.groups
    return (layout.slots(level) + group * layout.rank + torch.arange(layout.rank, device=device)).flatten()


class Rings:
    """Keys, or values, or masses of one layer in the slots of a layout.

    slots: ``(batch, kv_heads, slots, dim)``. sums: of the open groups of direct summaries after each of the last blocks, ``(blocks,
    batch, kv_heads, levels, rank, dim)``, or None. rows: numbers of some rows of the batch, or None for all. Gradients stop here.
    """

    def __init__(self, layout: Layout, slots: torch.Tensor, sums: torch.Tensor | None = None):
        self.layout, self.slots, self.sums = layout, slots, sums

    @property
    def levels(self) -> int:
        return (self.slots.shape[2] - self.layout.slots(0)) // (self.layout.groups * self.layout.rank)

    def sinks(self, rows: torch.Tensor | None, count: int) -> torch.Tensor:
        """The first of them, ``(batch, kv_heads, count, dim)``."""
        return self.slots[:, :, :count] if rows is None else self.slots[rows, :, :count]

    def tokens(self, rows: torch.Tensor | None, tokens: range) -> torch.Tensor:
        """``(batch, kv_heads, tokens, dim)``."""
        return self._read(rows, self.layout.of_tokens(tokens, self.slots.device))

    def groups(self, rows: torch.Tensor | None, level: int, groups: range) -> torch.Tensor:
        """Summaries of groups of one level, ``(batch, kv_heads, groups * rank, dim)``."""
        return self._read(rows, self.layout.of_groups(level, groups, self.slots.device))

    def keep_tokens(self, rows: torch.Tensor | None, last: int, x: torch.Tensor) -> None:
        """Keeps the sinks among the tokens ``(batch, kv_heads, tokens, dim)`` that end before token ``last``, and the newest."""
        first = last - x.shape[2]
        if first < self.layout.sinks:
            sinks = torch.arange(first, min(last, self.layout.sinks), device=self.slots.device)
            self._write(rows, sinks, x[:, :, : len(sinks)])
        count = min(x.shape[2], self.layout.ring)
        slots = self.layout.of_tokens(range(last - count, last), self.slots.device)
        self._write(rows, slots, x[:, :, x.shape[2] - count :])

    def keep_groups(self, rows: torch.Tensor | None, level: int, last: int, groups: torch.Tensor) -> None:
        """Keeps the newest of the groups ``(batch, kv_heads, groups, rank, dim)`` of one level that end before group ``last``."""
        count = min(groups.shape[2], self.layout.groups)
        slots = self.layout.of_groups(level, range(last - count, last), self.slots.device)
        self._write(rows, slots, groups[:, :, groups.shape[2] - count :].flatten(2, 3))

    def sums_after(self, rows: torch.Tensor | None, blocks: int) -> torch.Tensor:
        """Sums after so many blocks, ``(batch, kv_heads, levels, rank, dim)``."""
        sums = self.sums[blocks % len(self.sums)]
        return sums if rows is None else sums[rows]

    def keep_sums(self, rows: torch.Tensor | None, blocks: int, x: torch.Tensor) -> None:
        self.sums[blocks % len(self.sums)][slice(None) if rows is None else rows] = x.to(self.sums.dtype)

    # Not inference tensors, even when made in inference mode: they are written to outside of it, too.

    @torch.inference_mode(False)
    def lay_out(self, layout: Layout) -> None:
        """Makes room for more sinks."""
        sinks, others = self.slots.tensor_split([self.layout.sinks], 2)
        self.slots = torch.cat([nn.functional.pad(sinks, (0, 0, 0, layout.sinks - self.layout.sinks)), others], 2)
        self.layout = layout

    @torch.inference_mode(False)
    def add_level(self) -> None:
        """Makes room for the groups of one more level."""
        self.slots = nn.functional.pad(self.slots, (0, 0, 0, self.layout.groups * self.layout.rank))

    @torch.inference_mode(False)
    def select(self, index: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows of the batch."""
        index = index.to(self.slots.device, copy=True)
        self.slots = self.slots.index_select(0, index)
        self.sums = None if self.sums is None else self.sums.index_select(1, index)

    def _read(self, rows: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
        return self.slots.index_select(2, slots) if rows is None else self.slots[rows[:, None], :, slots].transpose(1, 2)

    def _write(self, rows: torch.Tensor | None, slots: torch.Tensor, x: torch.Tensor) -> None:
        x = x.detach().to(self.slots.dtype)
        if rows is None:
            self.slots.index_copy_(2, slots, x)
        else:
            self.slots[rows[:, None], :, slots] = x.transpose(1, 2)

"""Attention on a generation state: of new tokens in whole blocks, and of one more token on all slots at once."""

from typing import NamedTuple

import torch
from torch import nn

from .calls import Call
from .hierarchy import far_columns
from .multipole_attention import Listing, Sinks, attend_blocks, list_sinks, list_summaries, log_counts, run_kernels
from .state_slots import Layout, Rings


class Grid(NamedTuple):
    """New tokens of rows that have as many behind them, in whole blocks from the one before theirs on."""

    rows: torch.Tensor | None  # their numbers in the batch, or None for all
    past: int  # tokens behind the new ones
    new: torch.Tensor  # (batch, heads, n, dim), the new queries alone
    q: torch.Tensor  # (batch, heads, slots, dim)
    k: torch.Tensor  # (batch, kv_heads, slots, dim)
    v: torch.Tensor  # (batch, kv_heads, slots, value_dim)
    far_k: list[torch.Tensor]  # (batch, kv_heads, groups * rank, dim) of each level
    far_v: list[torch.Tensor]
    begins: list[int]  # the first of these groups, of each level
    counts: list[torch.Tensor] | None  # tokens that each of these summaries stands for, (batch, kv_heads, groups * rank); None: all alike
    sinks: Sinks | None


def attend_grid(grid: Grid, layout: Layout, call: Call, kernels: bool) -> torch.Tensor:
    """Attention in the blocks of a grid, ``(batch, heads, slots, value_dim)``."""
    m, rank, device = layout.block_size, layout.rank, grid.q.device
    first, n = max(0, grid.past // m - 1), grid.past + grid.new.shape[2]
    counts = [groups.shape[2] // rank for groups in grid.far_k]
    none = [x.new_zeros(*x.shape[:2], 0, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32)) for x in (grid.k, grid.v)]
    far_k, far_v = (torch.cat([empty, *far], 2) for empty, far in zip(none, (grid.far_k, grid.far_v)))
    stand_for = None if grid.counts is None else torch.cat([far_k.new_zeros(*far_k.shape[:2], 0), *grid.counts], 2)
    if kernels:
        listing = Listing(grid.begins[: len(counts)], counts, m, rank, first)
        logarithms = None if stand_for is None else log_counts(stand_for, call.options.size_weighting)
        return run_kernels(grid.q, grid.k, grid.v, far_k, far_v, listing, call, log_counts=logarithms, sinks=grid.sinks)[0]
    # Listed are the groups from ``begins`` on, one level after another.
    table = [(begin, count, sum(counts[:level])) for level, (begin, count) in enumerate(zip(grid.begins, counts))]
    columns = far_columns(n, m, len(counts), True, first, device)
    begin, count, before = torch.tensor(table, device=device).reshape(-1, 3).long()[columns.level - 1].unbind(1)
    columns = columns._replace(row=(columns.first // columns.width - begin).clamp(min=0).minimum(count - 1) + before)
    listed = list_summaries(far_k, far_v, columns, columns.hidden[None], rank, call, stand_for)
    return attend_blocks(grid.q, grid.k, grid.v, list_sinks(listed, grid.sinks), None, m, call)


class StepBias:
    """What is added to the logits of one more token in every row, -inf at slots that it does not see: worked out once a block."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        """To be called where rows changed by more than one token each, and where a block is finished."""
        self._bias: torch.Tensor | None = None
        self._counts: tuple = ()
        self._options: tuple = ()

    def of(self, past: list[int], rings: Rings, masses: Rings | None, heads: int, call: Call) -> torch.Tensor:
        """Of the token after ``past`` others of each row, ``(batch or 1, kv_heads, repeats, slots)``; its own slot is seen."""
        size, far_bias = call.options.size_weighting, call.far_bias
        if self._bias is None or not self._same(heads, size, far_bias):
            self._bias = self._visible([past[0]] if len(set(past)) == 1 else past, rings, masses, heads, call)
            self._options = heads, size, None if far_bias is None else far_bias.detach().clone()
        else:
            self._bias[rings.layout.of_next(past, rings.slots.device)] = 0
        return self._bias.unflatten(1, (rings.slots.shape[1], -1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def counts(self, masses: Rings | None, size_weighting: bool) -> torch.Tensor | None:
        """What size weighting adds to the logits of summaries, ``(batch, kv_heads, levels * groups * rank)``, -inf where they stand for
        nothing; None where tokens have no masses.
        """
        if masses is None:
            return None
        if self._counts[:1] != (size_weighting,):
            layout = masses.layout
            width = layout.block_size << torch.arange(masses.levels, device=masses.slots.device)
            segment = (width / layout.rank).to(masses.slots.dtype).repeat_interleave(layout.groups * layout.rank)
            self._counts = size_weighting, log_counts(masses.slots[:, :, layout.slots(0) :, 0] * segment, size_weighting)
        return self._counts[1]

    def _same(self, heads: int, size_weighting: bool, far_bias: torch.Tensor | None) -> bool:
        *kind, biased_by = self._options
        if kind != [heads, size_weighting] or biased_by is None or far_bias is None:
            return kind == [heads, size_weighting] and biased_by is far_bias
        return torch.equal(biased_by, far_bias)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _visible(self, past: list[int], rings: Rings, masses: Rings | None, heads: int, call: Call) -> torch.Tensor:
        """``(batch, heads, slots)``."""
        layout, device, dtype = rings.layout, rings.slots.device, rings.slots.dtype
        near, seen = layout.seen(torch.tensor(past, device=device), rings.levels)
        near = torch.where(near, 0.0, -torch.inf).to(dtype)[:, None].expand(-1, heads, -1)
        level = torch.arange(rings.levels, device=device).repeat_interleave(layout.groups)
        width = layout.block_size << level
        far = (width.to(dtype) / layout.rank).log() if call.options.size_weighting else torch.zeros_like(width, dtype=dtype)
        if masses is not None:
            far = torch.zeros_like(far)
        if call.far_bias is not None:
            far = far + call.far_bias.to(dtype)[:, level.clamp(max=call.far_bias.shape[1] - 1)]
        far = torch.where(seen[:, None], far, -torch.inf).expand(-1, heads, -1).repeat_interleave(layout.rank, -1)
        counts = self.counts(masses, call.options.size_weighting)
        if counts is not None:
            far = far + counts.repeat_interleave(heads // counts.shape[1], 1)
        return torch.cat([near.expand(len(far), -1, -1), far], -1)


def attend_slots(q: torch.Tensor, keys: Rings, values: Rings, bias: torch.Tensor, call: Call) -> torch.Tensor:
    """Attention of one token a row on all slots, ``(batch, kv_heads, repeats, dim)``; bias: as from :class:`StepBias`."""
    k, v = keys.slots[..., : q.shape[-1]], values.slots
    if call.softcap is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=call.scale)
    logits = call.softcap * torch.tanh(q @ k.transpose(2, 3) * call.scale / call.softcap) + bias
    return torch.softmax(logits, -1) @ v


def attend_slots_on_gpu(
    q: torch.Tensor, keys: Rings, values: Rings, past: list[int], call: Call, counts=None, far: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of one token a row, ``(batch, heads, dim)``, after ``past`` others; counts: as from :class:`StepBias`; far: see the
    kernel, in place of the summaries.
    """
    from .state_triton import Step, step

    layout = keys.layout
    seen = slice(None if far is None else layout.slots(0))
    given = Step(
        q=q,
        keys=keys.slots[:, :, seen, : q.shape[-1]],
        values=values.slots[:, :, seen],
        lengths=None if len(set(past)) == 1 else torch.tensor(past, dtype=torch.int32, device=q.device),
        length=past[0],
        far_bias=None if call.far_bias is None else call.far_bias.float(),
        far=far,
        log_counts=counts,
        sinks=layout.sinks,
        ring=layout.ring,
        groups=layout.groups,
        block_size=layout.block_size,
        rank=layout.rank,
        size_weighting=call.options.size_weighting,
        scale=call.scale,
        softcap=call.softcap,
    )
    return step(*given)

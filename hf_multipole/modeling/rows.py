"""Rows of multipole attention: how tokens lie in whole blocks, and their sinks, the first tokens of documents, which all queries see.

Dimensions: ``n`` tokens, ``slots`` of whole blocks.
"""

from typing import NamedTuple

import torch
from torch import nn

from .calls import Call
from .hierarchy import Alignment, block_of, level_count


class Rows(NamedTuple):
    """How rows of ``n`` tokens, of which the last ``queries`` ask, lie in slots: whole blocks of ``block_size``.

    Tokens and slots are ``(batch, heads, n or slots, dim)``; of the blocks before ``first`` there are keys and values only.
    """

    alignment: Alignment | None  # of padded or packed rows
    n: int
    queries: int
    block_size: int
    rank: int
    first: int
    slots: int
    levels: int
    causal: bool
    sinks: int  # of each document

    @property
    def blocks(self) -> int:
        """Blocks that are run."""
        return self.slots // self.block_size - self.first

    @property
    def before(self) -> int:
        """Slots of the blocks that are run, before those of the queries."""
        return self.n - self.queries - self.first * self.block_size

    def place_queries(self, q: torch.Tensor) -> torch.Tensor:
        """Queries in the slots of the blocks that are run, zeros in others."""
        return self.place(nn.functional.pad(q, (0, 0, self.before, 0)) if self.before else q)

    def place(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens in their slots, zeros in empty ones."""
        if self.alignment is None:
            missing = -x.shape[2] % self.block_size
            return nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
        batch, heads, n, dim = x.shape
        row = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * n
        placed = x.flatten(0, 2).index_select(0, (row + self.alignment.index[:, None]).flatten()).view(batch, heads, -1, dim)
        return placed.masked_fill(self.alignment.document[:, None, :, None] < 0, 0)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """What the blocks that are run hold, of the queries: ``(batch, heads, queries, dim)``, zeros where padding."""
        if self.alignment is None:
            return x[:, :, self.before : self.before + self.queries]
        batch, heads, slots, dim = x.shape
        row = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * slots
        slot = self.alignment.slot[:, None, -self.queries :]
        taken = x.flatten(0, 2).index_select(0, (row + slot).flatten()).view(batch, heads, self.queries, dim)
        return taken.masked_fill(~self.alignment.valid[:, None, -self.queries :, None], 0)

    def validity(self, device: torch.device) -> torch.Tensor | None:
        """``(batch or 1, slots)`` bool, which slots hold tokens; None where only full groups are seen: always, in the causal case."""
        if self.causal:
            return None
        if self.alignment is not None:
            return self.alignment.document >= 0
        full = self.n % (self.block_size << (self.levels - 1)) == 0
        return None if full else (torch.arange(self.slots, device=device) < self.n)[None]

    def masses(self, log_masses: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """What the tokens of the slots weigh in summaries, ``(batch or 1, kv_heads or 1, slots)`` in the compute dtype: 0 in empty slots,
        and for sinks; None where all weigh the same.
        """
        if log_masses is None and not self.sinks:
            return None
        slot = torch.arange(self.slots, device=like.device)[None]
        if self.alignment is None:
            none, place = slot >= self.n, slot
        else:
            none, place = self.alignment.document < 0, slot - self.alignment.first.repeat_interleave(self.block_size, 1)
        dtype = torch.promote_types(like.dtype, torch.float32)
        if log_masses is None:
            masses = torch.ones(1, 1, 1, dtype=dtype, device=like.device)
        else:
            masses = self.place(log_masses[..., None].to(dtype)).squeeze(-1).exp()
        return masses.masked_fill((none | (place < self.sinks))[:, None], 0)

    def sink_slots(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of the sinks of the blocks that are run, ``(batch or 1, blocks or 1, sinks)``, and which of them a block does not see as
        such, ``(batch or 1, blocks, sinks)`` bool: there is none, or it lies in the near field.
        """
        block = torch.arange(self.first, self.first + self.blocks, device=device)[None, :, None]
        slots, there = torch.arange(self.sinks, device=device)[None, None], torch.ones((), dtype=torch.bool, device=device)
        if self.alignment is not None:
            document = self.alignment.document
            slots = self.alignment.first[..., None] + slots
            held = document.gather(1, slots.flatten(1).clamp(max=self.slots - 1)).view(slots.shape)
            there = (slots < self.slots) & (held == document[:, :: self.block_size, None]) & (held >= 0)
            slots = slots.clamp(max=self.slots - 1)
        beside = slots // self.block_size - block
        return slots, ~there | ((beside >= -1) if self.causal else (beside.abs() <= 1))

    def document(self, device: torch.device) -> torch.Tensor | None:
        """Numbers of documents, negative in empty slots, ``(batch or 1, 1, blocks, block_size)``; None where that makes no difference."""
        if self.alignment is not None:
            return self.alignment.document.view(-1, 1, self.blocks, self.block_size)
        if self.causal or self.slots == self.n:
            return None
        empty = torch.arange(self.slots, device=device) >= self.n
        return -empty.long().view(1, 1, -1, self.block_size)[:, :, self.first :]


def lay_out(n: int, queries: int, alignment: Alignment | None, call: Call) -> Rows:
    """The rows of a call. A row that the near field covers is one block, which is exact attention."""
    block_size, rank = call.options.block_size, call.options.rank
    if block_of(n, block_size) != block_size:
        block_size, rank = n, 1
    # Without an alignment only the blocks of the queries, and one before for the near field, are run.
    first = 0 if alignment is not None else max(0, (n - queries) // block_size - 1)
    slots = -(-n // block_size) * block_size if alignment is None else alignment.index.shape[1]
    # A document has no more levels than a row of n tokens, though a packed grid is longer.
    levels = min(level_count(n, block_size, call.max_levels), level_count(slots, block_size))
    sinks = min(call.options.sinks(call.causal), n) if slots > 2 * block_size else 0
    return Rows(alignment, n, queries, block_size, rank, first, slots, levels, call.causal, sinks)


class Sinks(NamedTuple):
    """The first tokens of documents, as blocks of queries see them beside their near field."""

    keys: torch.Tensor  # (batch, kv_heads, lists, sinks, dim): one list for all blocks, or one for each
    values: torch.Tensor
    hidden: torch.Tensor  # (batch or 1, blocks, sinks) bool: there is none, or the block has it in its near field

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to their logits, ``(batch or 1, blocks, sinks)``: -inf where they are hidden."""
        return torch.zeros_like(self.hidden, dtype=dtype).masked_fill(self.hidden, -torch.inf)


class _Picked(torch.autograd.Function):
    """Tokens of some slots ``(batch or 1, picked)``; also returns the tokens, whose gradient is completed in place (see summaries.py)."""

    @staticmethod
    def forward(ctx, tokens, slots):
        ctx.save_for_backward(slots)
        return tokens.view_as(tokens), _picked(tokens, slots)[1]

    @staticmethod
    def backward(ctx, grad, picked):
        (slots,) = ctx.saved_tensors
        grad.scatter_add_(2, _over_channels(slots, grad), picked)
        return grad, None


def _picked(tokens: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens, tokens.gather(2, _over_channels(slots, tokens))


def _over_channels(slots: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    batch, heads, _, dim = tokens.shape
    return slots[:, None, :, None].expand(batch, heads, -1, dim)


def find_sinks(k, v, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, Sinks | None]:
    """Keys and values in their slots, for further use, and their sinks."""
    if not rows.sinks:
        return k, v, None
    slots, hidden = rows.sink_slots(k.device)
    # Compiled code cannot complete a gradient in two places.
    pick = _picked if torch.compiler.is_compiling() else _Picked.apply
    k, keys = pick(k, slots.flatten(1))
    v, values = pick(v, slots.flatten(1))
    return k, v, Sinks(keys.unflatten(2, slots.shape[1:]), values.unflatten(2, slots.shape[1:]), hidden)

"""One call of multipole attention: what it depends on beside its tokens, and how these lie in blocks."""

from typing import NamedTuple

import torch
from torch import nn

from .hierarchy import Alignment, block_of, level_count
from .options import MultipoleOptions


class Call(NamedTuple):
    """What a call depends on beside its tokens; the arguments of :func:`multipole_attention`, which explains them."""

    options: MultipoleOptions
    key_summary: nn.Module | None = None
    value_summary: nn.Module | None = None
    query_summary: nn.Module | None = None
    far_bias: torch.Tensor | None = None
    max_levels: int | None = None
    causal: bool = True
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    backend: str = "auto"


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
    return Rows(alignment, n, queries, block_size, rank, first, slots, levels, call.causal)

"""How a generation state summarises: the groups that new tokens finish, from what its rings hold of those before."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .state_slots import Rings
from .summaries import Past


class Finished(NamedTuple):
    """What whole blocks bring; nothing of it is kept yet."""

    groups: list[torch.Tensor]  # new groups of each level that has some, (rows, kv_heads, groups, rank, dim), as they are kept
    sums: list[tuple[int, torch.Tensor]]  # of direct summaries: a number of blocks, and the sums after them, which allow to go back


class Summariser(NamedTuple):
    """Keys, or values, of one call: the rings, and how groups of them are summarised. rows: as in :class:`Rings`."""

    rings: Rings
    summary: nn.Module
    kernels: bool  # the GPU kernels run
    rotary: Callable | None = None  # (x, positions) -> x for keys summarised before their rotation; the rings hold both, rotated first
    origins: list[int] | None = None  # with rotary: position id of the first token of each row of the batch

    def extend(self, rows: torch.Tensor | None, tokens: torch.Tensor, block: int) -> Finished:
        """Summarises the whole blocks of ``tokens`` ``(batch, kv_heads, n, dim)``, of which the first is ``block``."""
        blocks, plain = block + tokens.shape[2] // self.rings.layout.block_size, self._plain(tokens)
        groups: list[torch.Tensor] = []
        sums: list = []
        if self.rings.levels and self.rings.sums is None:
            groups = self._merge(rows, plain, block, blocks)
        elif self.rings.levels:
            groups, sums = self._weigh(rows, plain, block, blocks)
        return Finished([self._placed(rows, level, blocks >> level, x) for level, x in enumerate(groups)], sums)

    def keep(self, rows: torch.Tensor | None, blocks: int, finished: Finished) -> None:
        """Keeps what ``extend`` returned; there are ``blocks`` whole blocks by now."""
        for level, groups in enumerate(finished.groups):
            self.rings.keep_groups(rows, level, blocks >> level, groups)
        for count, sums in finished.sums:
            self.rings.keep_sums(rows, count, sums)

    def fill_level(self, rows: torch.Tensor | None, level: int, finished: int) -> None:
        """Makes the first ``finished`` groups of a level that is new, of those of the level below, which must all be there."""
        if finished:
            children = self._groups(rows, level - 1, range(2 * finished))
            made = self._summaries(None, 2, Past(0, [children]))[0][1]
            self.rings.keep_groups(rows, level, finished, self._placed(rows, level, finished, made))

    def _summaries(self, tokens: torch.Tensor | None, levels: int, past: Past) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self.summary(tokens, None, levels, past=past, kernels=self.kernels)

    def _merge(self, rows, tokens: torch.Tensor, block: int, blocks: int) -> list[torch.Tensor]:
        """New groups of each level, of those of the level below."""
        levels = sum(blocks >> level > block >> level for level in range(self.rings.levels))
        # The child that the open group of the next level has, if any.
        children = [range((block >> level) // 2 * 2, block >> level) for level in range(levels - 1)]
        held = [self._groups(rows, level, groups) for level, groups in enumerate(children)]
        return self._summaries(tokens, levels, Past(block, held))[0]

    def _weigh(self, rows, tokens: torch.Tensor, block: int, blocks: int) -> tuple[list[torch.Tensor], list]:
        """New groups of each level, all of their own tokens, and the sums after each block that can be gone back to."""
        m, levels, held = self.rings.layout.block_size, self.rings.levels, list(self.rings.sums_after(rows, block).unbind(2))
        single = min(self.rings.layout.spare, blocks - block)
        pieces, sums = [], []
        for count in [blocks - block - single] * (blocks - block > single) + [1] * single:
            piece, tokens = tokens.split([count * m, tokens.shape[2] - count * m], 2)
            groups, held = self._summaries(piece, levels, Past(block, held))
            block += count
            pieces.append(groups)
            sums.append((block, torch.stack(held, 2).detach()))
        return [torch.cat(parts, 2) for parts in zip(*pieces)], sums

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rotary is None else x.chunk(2, -1)[1]

    def _groups(self, rows, level: int, groups: range) -> torch.Tensor:
        """Kept groups of one level as they were summarised, ``(batch, kv_heads, groups, rank, dim)``."""
        return self._plain(self.rings.groups(rows, level, groups)).unflatten(2, (-1, self.rings.layout.rank))

    def _placed(self, rows, level: int, last: int, groups: torch.Tensor) -> torch.Tensor:
        """New groups, which end before group ``last``, as they are kept: with the rotated ones before them where keys have both."""
        if self.rotary is None:
            return groups
        device, rank, width = groups.device, self.rings.layout.rank, self.rings.layout.block_size << level
        origin = torch.tensor(self.origins, device=device)
        origin = origin if rows is None else origin[rows]
        group = torch.arange(last - groups.shape[2], last, device=device)[:, None]
        centre = group * width + (torch.arange(rank, device=device) + 0.5) * (width / rank) - 0.5
        return torch.cat([self.rotary(groups, origin[:, None, None, None] + centre), groups], -1)

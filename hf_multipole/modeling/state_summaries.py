"""How a generation state summarises: the groups that new tokens finish, from what its rings hold of those before."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .private import times_written
from .state_slots import Rings
from .summaries import Grown, Past, even_share


class Finished(NamedTuple):
    """What whole blocks bring; nothing of it is kept yet."""

    groups: list[torch.Tensor]  # new groups of each level that has some, (rows, kv_heads, groups, rank, dim), as they are kept
    sums: list[tuple[int, torch.Tensor]]  # of direct summaries: a number of blocks, and the sums after them, which allow to go back
    masses: list[torch.Tensor]  # where tokens have masses: the mean ones of these groups, (rows, kv_heads, groups, rank)
    mass_sums: list[tuple[int, torch.Tensor]]


class Shares:
    """:func:`even_share` of weights, worked out once as long as these stay what they are: it reads all of them."""

    def __init__(self):
        self._known: Any = WeakTensorKeyDictionary()

    def __getstate__(self):
        return {}  # a copy has other weights, maybe

    def __setstate__(self, _):
        self.__init__()

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or weight.is_inference():
            return even_share(weight)
        now = times_written(weight), weight.data_ptr(), weight.dtype
        known, share = self._known.get(weight, (None, None))
        if known != now:
            with torch.inference_mode(False), torch.no_grad():
                share = even_share(weight)
            self._known[weight] = now, share
        return share


class Summariser(NamedTuple):
    """Keys, or values, of one call: the rings, and how groups of them are summarised. rows: as in :class:`Rings`."""

    rings: Rings
    summary: nn.Module
    kernels: bool  # the GPU kernels run
    rotary: Callable | None = None  # (x, positions) -> x for keys summarised before their rotation; the rings hold both, rotated first
    origins: list[int] | None = None  # with rotary: position id of the first token of each row of the batch
    masses: Rings | None = None  # where tokens have masses
    channel: int = 0  # of these, which is that of keys, or of values
    shares: Callable = even_share

    def _masses(self) -> Rings:
        """A view of the own masses, ``(batch, kv_heads, slots, 1)``."""
        own = slice(self.channel, self.channel + 1)
        sums = self.masses.sums
        return Rings(self.masses.layout, self.masses.slots[..., own], None if sums is None else sums[..., own])

    def extend(self, rows: torch.Tensor | None, tokens: torch.Tensor, block: int, token_masses: torch.Tensor | None = None) -> Finished:
        """Summarises the whole blocks of ``tokens`` ``(batch, kv_heads, n, dim)``, of which the first is ``block``; token_masses:
        ``(batch, kv_heads, n)``.
        """
        blocks, plain = block + tokens.shape[2] // self.rings.layout.block_size, self._plain(tokens)
        found = Finished([], [], [], [])
        if self.rings.levels and self.rings.sums is None:
            found = self._merge(rows, plain, block, blocks, token_masses)
        elif self.rings.levels:
            found = self._weigh(rows, plain, block, blocks, token_masses)
        return found._replace(groups=[self._placed(rows, level, blocks >> level, x) for level, x in enumerate(found.groups)])

    def keep(self, rows: torch.Tensor | None, blocks: int, finished: Finished) -> None:
        """Keeps what ``extend`` returned; there are ``blocks`` whole blocks by now."""
        for level, groups in enumerate(finished.groups):
            self.rings.keep_groups(rows, level, blocks >> level, groups)
        for count, sums in finished.sums:
            self.rings.keep_sums(rows, count, sums)
        if self.masses is not None:
            for level, masses in enumerate(finished.masses):
                self._masses().keep_groups(rows, level, blocks >> level, masses[..., None])
            for count, sums in finished.mass_sums:
                self._masses().keep_sums(rows, count, sums)

    def fill_level(self, rows: torch.Tensor | None, level: int, finished: int) -> None:
        """Makes the first ``finished`` groups of a level that is new, of those of the level below, which must all be there."""
        if finished:
            made = self._summaries(None, 2, self._past(rows, 0, [range(2 * finished)], level - 1))
            self.rings.keep_groups(rows, level, finished, self._placed(rows, level, finished, made.groups[1]))
            if self.masses is not None:
                self._masses().keep_groups(rows, level, finished, made.masses[1][..., None])

    def group_masses(self, rows, level: int, groups: range) -> torch.Tensor:
        """Mean masses of kept summaries of one level, ``(batch, kv_heads, groups * rank)``."""
        return self._masses().groups(rows, level, groups).squeeze(-1)

    def _summaries(self, tokens: torch.Tensor | None, levels: int, past: Past, token_masses: torch.Tensor | None = None) -> Grown:
        return self.summary(tokens, None, levels, past=past, kernels=self.kernels, token_masses=token_masses)

    def _past(self, rows, block: int, children: list[range], first: int = 0) -> Past:
        """What is there of groups that are open, level after level from ``first`` on."""
        held = [self._groups(rows, level, groups) for level, groups in enumerate(children, first)]
        if self.masses is None:
            return Past(block, held)
        masses = [
            self.group_masses(rows, level, groups).unflatten(2, (-1, self.rings.layout.rank))
            for level, groups in enumerate(children, first)
        ]
        return Past(block, held, masses, self.shares)

    def _merge(self, rows, tokens: torch.Tensor, block: int, blocks: int, token_masses) -> Finished:
        """New groups of each level, of those of the level below."""
        levels = sum(blocks >> level > block >> level for level in range(self.rings.levels))
        # The child that the open group of the next level has, if any.
        children = [range((block >> level) // 2 * 2, block >> level) for level in range(levels - 1)]
        made = self._summaries(tokens, levels, self._past(rows, block, children), token_masses)
        return Finished(made.groups, [], made.masses or [], [])

    def _weigh(self, rows, tokens: torch.Tensor, block: int, blocks: int, token_masses) -> Finished:
        """New groups of each level, all of their own tokens, and the sums after each block that can be gone back to."""
        m, levels, held = self.rings.layout.block_size, self.rings.levels, list(self.rings.sums_after(rows, block).unbind(2))
        heavy = None if self.masses is None else list(self._masses().sums_after(rows, block).squeeze(-1).unbind(2))
        single = min(self.rings.layout.spare, blocks - block)
        pieces, found, first = [], Finished([], [], [], []), 0
        for count in [blocks - block - single] * (blocks - block > single) + [1] * single:
            own = slice(first * m, (first + count) * m)
            past = Past(block, held, heavy, self.shares)
            made = self._summaries(tokens[:, :, own], levels, past, None if token_masses is None else token_masses[:, :, own])
            held, heavy, first, block = made.sums, made.mass_sums, first + count, block + count
            pieces.append((made.groups, made.masses or []))
            found.sums.append((block, torch.stack(held, 2).detach()))
            if heavy is not None:
                found.mass_sums.append((block, torch.stack(heavy, 2).detach()[..., None]))
        groups, masses = ([torch.cat(parts, 2) for parts in zip(*levels)] for levels in zip(*pieces))
        return found._replace(groups=groups, masses=masses)

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

"""Generation state of multipole attention: what a causal layer needs of the past, O(log n) of it, and attention on it.

A query in block b sees the tokens of blocks b - 1 and b, and of each level only finished groups, none older than the third before
its own. So a layer keeps, for each head, a ring of tokens and a ring of group summaries for each level, side by side in one tensor
(:mod:`state_slots`): a decoding step is ordinary attention over all of its slots, with a bias that hides what the query does not see.
A block is summarised when its last token has come (:mod:`state_summaries`). Everything older is dropped for good, but for a few
blocks that allow to go back.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .backends import takes_kernels
from .calls import Call
from .hierarchy import level_count
from .kept import Kept
from .multipole_attention import Sinks
from .state_attention import Grid, StepBias, attend_grid, attend_slots, attend_slots_on_gpu
from .state_slots import Layout, Rings
from .state_summaries import Shares, Summariser


class NewTokens(NamedTuple):
    """What one row of the batch brings to a forward pass."""

    start: int  # column of its first real token among the new ones
    count: int  # type: ignore[assignment]  # real tokens
    position: int | None = None  # position id of the first; None where they do not go up by one


@dataclass
class Row:
    """How far one row of the batch has come."""

    length: int = 0  # real tokens
    begin: int = 0  # column of the first of them; without any, how many columns there were
    longest: int = 0  # its length before anything was taken back
    position: int | None = None  # position id of the next token


class _Work(NamedTuple):
    """What one call of the attention is done with."""

    keys: Summariser
    values: Summariser
    new: list[NewTokens]
    call: Call  # with its scale
    kernels: bool  # the GPU kernels run


class _Brought(NamedTuple):
    """Keys, or values, of rows for a grid of new tokens."""

    near: torch.Tensor  # tokens from the block before the new ones on
    far: list[torch.Tensor]  # summaries of each level, (rows, kv_heads, groups * rank, dim)
    counts: list[torch.Tensor] | None  # where tokens have masses: for how many tokens these stand
    writes: list[Callable]  # what is to be kept


def alike(keys: Sequence[Hashable], device: torch.device) -> list[tuple]:
    """The distinct keys, one of which each row was given, and the rows of each: their numbers, or None for all."""
    found: dict = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return [(key, None if len(rows) == len(keys) else torch.tensor(rows, device=device)) for key, rows in found.items()]


class MultipoleState(Kept):
    """The past of one layer, in float32 (float64 for float64). Gradients stop here.

    q, k, v: tensors like those of the tokens to come. layout: with the sinks of a row of any length; there is room for those that rows
    have. levels: those that there is room for; others are added as rows grow, up to ``max_levels`` (None: as many as there are), except
    in direct summaries. rotated: k holds keys twice, see :meth:`attend`. salient: tokens have masses of their own.
    """

    linear = False  # whether it is that of the O(n) form

    def __init__(
        self,
        q,
        k,
        v,
        layout: Layout,
        levels: int,
        *,
        direct: bool = False,
        rotated: bool = False,
        max_levels: int | None = None,
        salient: bool = False,
    ):
        self.max_levels, self.sink_tokens, self.salient = max_levels, layout.sinks, salient
        layout = layout.holding(self.sink_tokens, 0)
        like = {"dtype": torch.promote_types(k.dtype, torch.float32), "device": k.device}
        # Of keys, of values, and where there are any, of masses: how wide they are, and what of that is summarised.
        sizes = [(k.shape[-1], k.shape[-1] // (2 if rotated else 1)), (v.shape[-1], v.shape[-1])]
        sizes += [(2, 2)] if salient or self.sink_tokens else []
        rings = []
        # Not inference tensors, even when made in inference mode: they are written to outside of it, too.
        with torch.inference_mode(False):
            for width, plain in sizes:
                sums = torch.zeros(layout.spare + 1, *k.shape[:2], levels, layout.rank, plain, **like) if direct else None
                rings.append(Rings(layout, torch.zeros(*k.shape[:2], layout.slots(levels), width, **like), sums))
        # Masses: logarithms of those of tokens (of sinks, too), and the mean ones of the summaries of keys, and of values.
        self.keys, self.values, *masses = rings
        self.masses: Rings | None = masses[0] if masses else None
        self.seen = 0
        self.rows = [Row() for _ in range(len(k))]
        self._begin()

    def _begin(self) -> None:
        """What is worked out anew by a copy."""
        self.bias, self.shares = StepBias(), Shares()

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def layout(self) -> Layout:
        return self.keys.layout

    @property
    def _rings(self) -> list[Rings]:
        return [self.keys, self.values] + ([] if self.masses is None else [self.masses])

    @property
    def direct(self) -> bool:
        return self.keys.sums is not None

    @property
    def levels(self) -> int:
        return self.keys.levels

    @property
    def device(self) -> torch.device:
        return self.keys.slots.device

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {"keys": self.keys.slots, "values": self.values.slots, "key_sums": self.keys.sums, "value_sums": self.values.sums}
        if self.masses is not None:
            found |= {"masses": self.masses.slots, "mass_sums": self.masses.sums}
        return {name: x for name, x in found.items() if x is not None}

    def description(self) -> dict:
        sizes = {name: getattr(self.layout, name) for name in ("block_size", "rank", "spare", "sinks", "ring", "groups")}
        sizes |= {name: getattr(self, name) for name in ("max_levels", "sink_tokens", "salient", "direct", "seen")}
        return sizes | {"rows": [vars(row) for row in self.rows]}

    @classmethod
    def restored(cls, description: dict, tensors: dict[str, torch.Tensor]) -> "MultipoleState":
        state = cls.__new__(cls)
        description = {"sinks": 0, "sink_tokens": 0, "salient": False} | description  # saved before there were any
        layout = Layout(*(description[name] for name in ("block_size", "rank", "spare", "sinks")))
        for name in ("max_levels", "sink_tokens", "salient", "seen"):
            setattr(state, name, description[name])
        state.rows = [Row(**row) for row in description["rows"]]
        state.keys = Rings(layout, tensors["keys"], tensors.get("key_sums"))
        state.values = Rings(layout, tensors["values"], tensors.get("value_sums"))
        state.masses = Rings(layout, tensors["masses"], tensors.get("mass_sums")) if "masses" in tensors else None
        state._begin()
        return state

    def select(self, index: torch.Tensor) -> None:
        for rings in self._rings:
            rings.select(index)
        self.rows = [Row(**vars(self.rows[row])) for row in index.tolist()]
        self.bias.forget()

    def check_take_back(self, tokens: int) -> None:
        super().check_take_back(tokens)
        for row in self.rows:
            if tokens and 0 < row.begin + row.length < self.seen:
                raise ValueError("the cache has rows with padding behind their tokens and cannot take tokens back")
            kept = row.length - (row.longest - self.layout.spare * self.layout.block_size if row.longest >= self.layout.ring else 0)
            if min(tokens, row.length) > kept:
                raise ValueError(
                    f"the cache can take back {kept} more tokens, but {tokens} were asked for: older keys are dropped. "
                    f"MultipoleCache(config=model.config, rollback={tokens + row.longest - row.length}) keeps more"
                )

    def take_back(self, tokens: int) -> None:
        self.check_take_back(tokens)
        self.seen -= tokens
        for row in self.rows:
            if row.position is not None:
                row.position -= min(tokens, row.length)
            row.length = max(0, row.length - tokens)
            row.begin = min(row.begin, self.seen)
            if row.length == 0:
                row.position = None
        self.bias.forget()

    # Checks, before anything is changed

    def check(self, new: list[NewTokens]) -> None:
        """Raises ValueError where new tokens do not continue the state."""
        if len(new) != self.batch:
            raise ValueError(f"the cache holds a batch of {self.batch} rows, but the input has {len(new)}; use a new cache")
        for i, (row, x) in enumerate(zip(self.rows, new)):
            if row.length and x.count and (x.start or row.begin + row.length < self.seen):
                raise ValueError(f"attention_mask has padding between the tokens of the cache and the new ones in row {i}: pad on the left")
            if x.count and None not in (row.position, x.position) and x.position != row.position:
                way = "go backwards" if x.position < row.position else "leave a gap"
                raise ValueError(f"position_ids {way}: row {i} continues at {x.position}, but the cache is at {row.position}")

    def check_masses(self, sink_tokens: int, salient: bool) -> None:
        """Raises ValueError where sinks or masses are not those that the state was begun with."""
        if (self.sink_tokens, self.salient) != (sink_tokens, salient):
            held, given = (
                f"{sinks} sinks and {'' if masses else 'no '}masses"
                for sinks, masses in ((self.sink_tokens, self.salient), (sink_tokens, salient))
            )
            raise ValueError(f"the cache was filled by another model: it has {held} of tokens, but this model has {given}; use a new cache")

    def check_levels(self, new: list[NewTokens], summary: Any) -> None:
        """Raises ValueError where direct summaries have too few levels."""
        if self.direct:
            summary.check_levels(level_count(self._longest(new), self.layout.block_size))

    def check_tokens(self, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """Raises ValueError where tokens are of another kind than those that are kept."""
        keys, values = self.keys.slots, self.values.slots
        held = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        given = (kv_heads, key_dim, value_dim, torch.promote_types(dtype, torch.float32))
        if held != given or device not in (None, self.device):
            raise ValueError(
                "the cache was filled by another model: it holds (key heads, key width, value width, dtype) "
                f"{held} on {self.device}, but this model has {given}; use a new cache"
            )

    # Attention

    def attend(self, q, k, v, new: list[NewTokens], call: Call, rotary: Callable | None = None) -> torch.Tensor:
        """Takes in new tokens and returns their attention ``(batch, heads, n, value_dim)``, zeros at padding.

        q: ``(batch, heads, n, dim)``; k, v: ``(batch, kv_heads, n, dim)``; new: which of the columns are tokens, row by row.
        call: with its summaries; its log_masses are those of the new columns. rotary: (x, positions) -> x where k holds the rotated keys
        and, behind them, the plain ones.
        """
        self.check_tokens(k.shape[1], k.shape[-1], v.shape[-1], k.dtype, k.device)
        self.check_masses(call.options.sinks(causal=True), call.log_masses is not None)
        self.check(new)
        if rotary is not None and any(x.count and x.position is None for x in new):
            raise ValueError("rotate_summaries needs position_ids that go up by one where there is a cache; pass use_cache=False")
        self.check_levels(new, call.key_summary)
        if self.keys.slots.is_inference() and not torch.is_inference_mode_enabled():
            self.select(torch.arange(self.batch))
        work = self._work(q, v, new, call, rotary)
        recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, call.log_masses))
        with torch.autocast(q.device.type, enabled=False):
            if q.shape[2] == 1 and all(x.count for x in new) and not recorded:
                out = self._step(q, k, v, work)
            else:
                out = self._chunk(q, k, v, work)
        self._advance(q.shape[2], new)
        return out

    def _work(self, q, v, new: list[NewTokens], call: Call, rotary: Callable | None) -> _Work:
        kernels = takes_kernels("auto", q, {"q": q.shape[-1], "v": v.shape[-1]})
        origins = None
        if rotary is not None:
            first = [(x.position or 0) if row.position is None else row.position for row, x in zip(self.rows, new)]
            origins = [position - row.length for row, position in zip(self.rows, first)]
        keys = Summariser(self.keys, call.key_summary, kernels, rotary, origins, self.masses, 0, self.shares)
        values = Summariser(self.values, call.value_summary, kernels, None, None, self.masses, 1, self.shares)
        call = call._replace(scale=q.shape[-1] ** -0.5 if call.scale is None else call.scale)
        return _Work(keys, values, new, call, kernels)

    def _advance(self, columns: int, new: list[NewTokens]) -> None:
        """Counts tokens that were taken in."""
        for row, x in zip(self.rows, new):
            if row.length == 0:
                row.begin = self.seen + (x.start if x.count else columns)
            if x.count and x.position is not None:
                row.position = x.position + x.count
            row.length += x.count
            row.longest = max(row.longest, row.length)
        self.seen += columns

    def _longest(self, new: list[NewTokens]) -> int:
        return max(row.length + x.count for row, x in zip(self.rows, new))

    def _grow(self, length: int, work: _Work) -> None:
        """Makes room for every sink and level that the token after ``length`` tokens can see, in any row."""
        layout = self.layout.holding(self.sink_tokens, length + 1)
        if layout.sinks > self.layout.sinks:
            self.bias.forget()
            for rings in self._rings:
                rings.lay_out(layout)
        while not self.direct and self.levels < level_count(length + 1, self.layout.block_size, self.max_levels):
            level = self.levels
            self.bias.forget()
            for rings in self._rings:
                rings.add_level()
            for side in (work.keys, work.values):
                # No row is longer than two groups of the new level, so that all groups of the level below are there.
                for past, rows in alike([row.length for row in self.rows], self.device):
                    side.fill_level(rows, level, past // (self.layout.block_size << level))

    # Any number of tokens

    def _chunk(self, q, k, v, work: _Work) -> torch.Tensor:
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        self._grow(self._longest(work.new), work)
        writes = []
        for (past, start, count), rows in alike([(row.length, x.start, x.count) for row, x in zip(self.rows, work.new)], self.device):
            part = slice(start, start + count)
            if count:
                masses = self._log_masses(k, work.call) if self.masses is not None else None
                some = [x if x is None else x[:, :, part] if rows is None else x[rows, :, part] for x in (q, k, v, masses)]
                got, kept = self._attend_rows(rows, past, some[0], some[1], some[2], some[3], work)
                out[slice(None) if rows is None else rows, :, part] = got
                writes += kept
        # After all that can fail.
        self.bias.forget()
        for write in writes:
            write()
        return out

    def _log_masses(self, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Those of new tokens, ``(batch, kv_heads, n)``."""
        like = self.keys.slots.dtype
        return k.new_zeros(k.shape[:3], dtype=like) if call.log_masses is None else call.log_masses.to(like)

    def _attend_rows(self, rows, past: int, q, k, v, masses, work: _Work) -> tuple[torch.Tensor, list[Callable]]:
        """Attention of new tokens of rows that all have ``past`` tokens behind them, and what is to be kept: calls that write it."""
        m, dim, n = self.layout.block_size, q.shape[-1], past + q.shape[2]
        writes, open_masses = [], None
        if masses is not None:
            # From the beginning of the open block on.
            open_masses = torch.cat([self.masses.tokens(rows, range(past // m * m, past))[..., 0], masses], 2)
            writes.append(partial(self.masses.keep_tokens, rows, n, masses[..., None].expand(-1, -1, -1, 2)))
        of_keys, of_values = (self._bring(side, rows, past, x, open_masses) for side, x in ((work.keys, k), (work.values, v)))
        before, after = past - max(0, past // m - 1) * m, -n % m
        grid = Grid(
            rows,
            past,
            q,
            nn.functional.pad(q, (0, 0, before, after)),
            nn.functional.pad(of_keys.near[..., :dim], (0, 0, 0, after)),
            nn.functional.pad(of_values.near, (0, 0, 0, after)),
            [x[..., :dim] for x in of_keys.far],
            of_values.far,
            [groups.start for groups in self._at_hand(past)],
            of_keys.counts,
            self._sinks(rows, past, k[..., :dim], v),
        )
        out, more = self._attend_grid(grid, work)
        return out[:, :, before : before + n - past], writes + of_keys.writes + of_values.writes + more

    def _sinks(self, rows, past: int, k, v) -> Sinks | None:
        """Those that blocks from the one before the new tokens ``k``, ``v`` on see beside their near field."""
        m, last, device = self.layout.block_size, past + k.shape[2] - 1, self.device
        count = min(self.sink_tokens, max(0, (last // m - 1) * m))
        if not count:
            return None
        held = min(past, count)
        keys, values = (
            torch.cat([rings.sinks(rows, held)[..., : x.shape[-1]].to(x.dtype), x[:, :, : count - held]], 2)[:, :, None]
            for rings, x in ((self.keys, k), (self.values, v))
        )
        block = torch.arange(max(0, past // m - 1), last // m + 1, device=device)[:, None]
        return Sinks(keys, values, (torch.arange(count, device=device) // m >= block - 1)[None])

    def _at_hand(self, past: int) -> list[range]:
        """Groups of each level that rows of ``past`` tokens keep."""
        whole = [past // self.layout.block_size >> level for level in range(self.levels)]
        return [range(max(0, count - self.layout.groups), count) for count in whole]

    def _bring(self, side: Summariser, rows, past: int, x: torch.Tensor, masses: torch.Tensor | None) -> _Brought:
        """Keys, or values, of the grid of new tokens ``x``. masses: what the tokens weigh from the beginning of the open block on."""
        m, n = self.layout.block_size, past + x.shape[2]
        first, levels = max(0, past // m - 1), level_count(n, m)
        near = torch.cat([side.rings.tokens(rows, range(first * m, past)).to(x.dtype), x], 2)
        far = [side.rings.groups(rows, level, groups) for level, groups in enumerate(self._at_hand(past))]
        means = None if masses is None else [side.group_masses(rows, level, groups) for level, groups in enumerate(self._at_hand(past))]
        writes: list[Callable] = []
        if n // m > past // m:
            whole = near[:, :, (past // m - first) * m : (n // m - first) * m]
            finished = side.extend(rows, whole, past // m, None if masses is None else self._of_summaries(masses, past // m, n // m))
            far[: len(finished.groups)] = [torch.cat([old, new.flatten(2, 3)], 2) for old, new in zip(far, finished.groups)]
            if means is not None:
                means[: len(finished.masses)] = [torch.cat([old, new.flatten(2)], 2) for old, new in zip(means, finished.masses)]
            writes.append(partial(side.keep, rows, n // m, finished))
        writes.append(partial(side.rings.keep_tokens, rows, n, x))
        segment = m / self.layout.rank
        counts = None if means is None else [mean * (segment * 2**level) for level, mean in enumerate(means[:levels])]
        return _Brought(near, far[:levels], counts, writes)

    def _of_summaries(self, log_masses: torch.Tensor, block: int, blocks: int) -> torch.Tensor:
        """What the tokens from ``block`` on, up to ``blocks``, weigh in summaries: sinks nothing."""
        m = self.layout.block_size
        masses = log_masses[:, :, : (blocks - block) * m].exp()
        if block * m >= self.sink_tokens:
            return masses
        return masses.masked_fill(torch.arange(block * m, blocks * m, device=masses.device) < self.sink_tokens, 0)

    def _attend_grid(self, grid: Grid, work: _Work) -> tuple[torch.Tensor, list[Callable]]:
        """Attention in the blocks of a grid, and what is to be kept of it beside tokens and groups."""
        return attend_grid(grid, self.layout, work.call, work.kernels), []

    # One more token in every row

    def _step(self, q, k, v, work: _Work) -> torch.Tensor:
        past = [row.length for row in self.rows]
        at = self.layout.of_next(past, self.device)
        for side, x in zip((work.keys, work.values), (k, v)):
            side.rings.slots[at] = x[:, :, 0].to(side.rings.slots.dtype)
        if self.salient:
            self.masses.slots[at] = work.call.log_masses.to(self.masses.slots.dtype)
        if min(past) < self.sink_tokens:
            self._keep_sinks(past, k, v)
        if work.kernels:
            out = self._attend_on_gpu(q[:, :, 0], past, work)
        else:
            # The query heads of one key head are its queries.
            grouped = q.reshape(len(q), k.shape[1], -1, q.shape[-1]).to(self.keys.slots.dtype)
            out = self._attend_slots(grouped, self.bias.of(past, self.keys, self.masses, q.shape[1], work.call), past, work)
        self._finish_blocks([length + 1 for length in past], work)
        return out.reshape(*q.shape[:3], -1).to(k.dtype)

    def _keep_sinks(self, past: list[int], k, v) -> None:
        """Keeps the one token of each row beside those of its ring, where it is a sink."""
        for length, rows in alike(past, self.device):
            if length < self.sink_tokens:
                for rings, x in ((self.keys, k), (self.values, v)):
                    rings.slots[slice(None) if rows is None else rows, :, length] = (x if rows is None else x[rows])[:, :, 0].to(
                        rings.slots.dtype
                    )

    def _finish_blocks(self, lengths: list[int], work: _Work) -> None:
        """Summarises the last block of the rows in which it is full."""
        m = self.layout.block_size
        if all(length % m for length in lengths):
            return
        self.bias.forget()
        self._grow(max(lengths), work)
        for length, rows in alike(lengths, self.device):
            if length % m:
                continue
            tokens, blocks, masses = range(length - m, length), length // m, None
            if self.masses is not None:
                masses = self._of_summaries(self.masses.tokens(rows, tokens)[..., 0], blocks - 1, blocks)
            for side in (work.keys, work.values):
                side.keep(rows, blocks, side.extend(rows, side.rings.tokens(rows, tokens), blocks - 1, masses))

    def _attend_slots(self, q, bias, past: list[int], work: _Work) -> torch.Tensor:
        """Attention of one token after ``past`` others of each row, ``(batch, kv_heads, repeats, dim)``."""
        return attend_slots(q, self.keys, self.values, bias, work.call)

    def _attend_on_gpu(self, q, past: list[int], work: _Work) -> torch.Tensor:
        """The same of queries ``(batch, heads, dim)``."""
        counts = self.bias.counts(self.masses, work.call.options.size_weighting)
        return attend_slots_on_gpu(q, self.keys, self.values, past, work.call, counts)

"""Generation state of multipole attention: what a causal layer needs of the past, O(log n) of it, and attention on it.

A query in block b sees the tokens of blocks b - 1 and b, and of each level only finished groups, none older than the third before
its own. So a layer keeps, for each head, a ring of tokens and a ring of group summaries for each level, side by side in one tensor:
a decoding step is ordinary attention over all of its slots, with a bias that hides what the query does not see. A block is
summarised when its last token has come. Everything older is dropped for good, but for a few blocks that allow to go back.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .backends import takes_kernels
from .hierarchy import far_columns, level_count
from .multipole_attention import Listing, attend_blocks, list_summaries, run_kernels
from .multipole_rows import Call
from .options import MultipoleOptions
from .summaries import Past, compute_dtype


class NewTokens(NamedTuple):
    """What one row of the batch brings to a forward pass."""

    start: int  # column of its first real token among the new ones
    count: int  # real tokens
    position: int | None = None  # position id of the first; None where they do not go up by one


@dataclass
class Row:
    """How far one row of the batch has come."""

    length: int = 0  # real tokens
    begin: int = 0  # column of the first of them; without any, how many columns there were
    longest: int = 0  # its length before anything was taken back
    position: int | None = None  # position id of the next token


@dataclass
class _Side:
    """Keys, or values, of one call: where they are kept, and how groups of them are summarised."""

    store: "_Store"
    summary: nn.Module
    rotary: object  # (x, positions) -> x for keys that are summarised before their rotation; the store holds both, rotated first

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rotary is None else x.chunk(2, -1)[1]


@dataclass
class _Store:
    """``slots`` ``(batch, kv_heads, slots, dim)``; ``sums`` of the open groups of direct summaries after each of the last blocks,
    ``(blocks, batch, kv_heads, levels, rank, dim)``.
    """

    slots: torch.Tensor
    sums: torch.Tensor | None


class _Call(NamedTuple):
    """What a call of the attention depends on beside tokens."""

    sides: tuple[_Side, _Side]
    new: list[NewTokens]
    size_weighting: bool
    far_bias: torch.Tensor | None
    softcap: float | None
    scale: float
    kernels: bool  # the GPU kernels run


class MultipoleState:
    """The past of one layer.

    Keys and values are kept in float32 (float64 for float64): token t of a row in slot ``t % ring``, summary r of group g of level
    l (counted from 0) in slot ``ring + (l * groups + g % groups) * rank + r``. Gradients stop here.
    """

    linear = False  # whether it is that of the O(n) form

    def __init__(
        self,
        key,
        value,
        block_size: int,
        rank: int,
        levels: int,
        rollback: int,
        direct: bool,
        rotated: bool = False,
        max_levels: int | None = None,
    ):
        self.max_levels = max_levels  # of rows of any length, or None for all
        self.spare = max(1, -(-rollback // block_size))  # blocks that can be taken back
        self.block_size, self.rank, self.direct = block_size, rank, direct
        self.ring, self.groups = (2 + self.spare) * block_size, 3 + self.spare
        batch, heads = key.shape[:2]
        like = {"dtype": compute_dtype(key.dtype), "device": key.device}
        slots = self.ring + levels * self.groups * rank
        stores = []
        # Not inference tensors, even when made in inference mode: they are written to outside of it, too.
        with torch.inference_mode(False):
            for width, plain in ((key.shape[-1], key.shape[-1] // (2 if rotated else 1)), (value.shape[-1], value.shape[-1])):
                sums = torch.zeros(self.spare + 1, batch, heads, levels, rank, plain, **like) if direct else None
                stores.append(_Store(torch.zeros(batch, heads, slots, width, **like), sums))
        self.keys, self.values = stores
        self.seen = 0  # columns, padding included
        self.rows = [Row() for _ in range(batch)]
        self._bias = self._bias_of = None

    @property
    def levels(self) -> int:
        return (self.keys.slots.shape[2] - self.ring) // (self.groups * self.rank)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {"keys": self.keys.slots, "values": self.values.slots, "key_sums": self.keys.sums, "value_sums": self.values.sums}
        return {name: x for name, x in found.items() if x is not None}

    def description(self) -> dict:
        """All but the tensors, as plain numbers; :meth:`restored` takes it back."""
        sizes = {name: getattr(self, name) for name in ("block_size", "rank", "max_levels", "direct", "spare", "ring", "groups", "seen")}
        return sizes | {"rows": [vars(row) for row in self.rows]}

    @classmethod
    def restored(cls, description: dict, tensors: dict[str, torch.Tensor]) -> "MultipoleState":
        state = cls.__new__(cls)
        vars(state).update(description)
        state.rows = [Row(**row) for row in description["rows"]]
        state.keys = _Store(tensors["keys"], tensors.get("key_sums"))
        state.values = _Store(tensors["values"], tensors.get("value_sums"))
        state._bias = state._bias_of = None
        return state

    def select(self, index: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows of the batch."""
        with torch.inference_mode(False):
            index = index.to(self.keys.slots.device, copy=True)
            for store in (self.keys, self.values):
                store.slots = store.slots.index_select(0, index)
                store.sums = None if store.sums is None else store.sums.index_select(1, index)
        self.rows = [Row(**vars(self.rows[row])) for row in index.tolist()]
        self._bias = None

    def check_take_back(self, tokens: int) -> None:
        """Raises ValueError where what came before the last ``tokens`` columns is gone."""
        if tokens > self.seen:
            raise ValueError(f"the cache has seen {self.seen} tokens and cannot take back {tokens}")
        for row in self.rows:
            if tokens and 0 < row.begin + row.length < self.seen:
                raise ValueError("the cache has rows with padding behind their tokens and cannot take tokens back")
            kept = row.length - (row.longest - self.spare * self.block_size if row.longest >= self.ring else 0)
            if min(tokens, row.length) > kept:
                raise ValueError(
                    f"the cache can take back {kept} more tokens, but {tokens} were asked for: older keys are dropped. "
                    f"MultipoleCache(config=model.config, rollback={tokens + row.longest - row.length}) keeps more"
                )

    def take_back(self, tokens: int) -> None:
        """Forgets the last ``tokens`` columns."""
        self.check_take_back(tokens)
        self.seen -= tokens
        for row in self.rows:
            if row.position is not None:
                row.position -= min(tokens, row.length)
            row.length = max(0, row.length - tokens)
            row.begin = min(row.begin, self.seen)
            if row.length == 0:
                row.position = None
        self._bias = None

    def attend(
        self, q, k, v, new: list[NewTokens], *, key_summary, value_summary, size_weighting, far_bias, softcap, scale, rotary
    ) -> torch.Tensor:
        """Takes in new tokens and returns their attention ``(batch, heads, n, value_dim)``, zeros at padding.

        q: ``(batch, heads, n, dim)``; k, v: ``(batch, kv_heads, n, dim)``. The other arguments are those of
        :func:`multipole_attention`; with ``rotary`` (x, positions) -> x, k holds the rotated keys and, behind them, the plain ones.
        """
        self.check_tokens(k.shape[1], k.shape[-1], v.shape[-1], k.dtype, k.device)
        self.check(new)
        if rotary is not None and any(x.count and x.position is None for x in new):
            raise ValueError("rotate_summaries needs position_ids that go up by one where there is a cache; pass use_cache=False")
        self.check_levels(new, key_summary)
        if self.keys.slots.is_inference() and not torch.is_inference_mode_enabled():
            self.select(torch.arange(len(self.rows)))
        sides = (_Side(self.keys, key_summary, rotary), _Side(self.values, value_summary, None))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        call = _Call(sides, new, size_weighting, far_bias, softcap, scale, takes_kernels("auto", q, {"q": q.shape[-1], "v": v.shape[-1]}))
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            if q.shape[2] == 1 and all(x.count for x in new) and not recorded:
                out = self._step(q, k, v, call)
            else:
                out = self._chunk(q, k, v, call)
        for row, x in zip(self.rows, new):
            if row.length == 0:
                row.begin = self.seen + (x.start if x.count else q.shape[2])
            if x.count and x.position is not None:
                row.position = x.position + x.count
            row.length += x.count
            row.longest = max(row.longest, row.length)
        self.seen += q.shape[2]
        return out

    # Checks, before anything is changed

    def check(self, new: list[NewTokens]) -> None:
        """Raises ValueError where new tokens do not continue the state."""
        if len(new) != len(self.rows):
            raise ValueError(f"the cache holds a batch of {len(self.rows)} rows, but the input has {len(new)}; use a new cache")
        for i, (row, x) in enumerate(zip(self.rows, new)):
            if row.length and x.count and (x.start or row.begin + row.length < self.seen):
                raise ValueError(f"attention_mask has padding between the tokens of the cache and the new ones in row {i}: pad on the left")
            if x.count and None not in (row.position, x.position) and x.position != row.position:
                way = "go backwards" if x.position < row.position else "leave a gap"
                raise ValueError(f"position_ids {way}: row {i} continues at {x.position}, but the cache is at {row.position}")

    def check_levels(self, new: list[NewTokens], summary: nn.Module) -> None:
        """Raises ValueError where direct summaries have too few levels."""
        if self.direct:
            summary.check_levels(level_count(max(row.length + x.count for row, x in zip(self.rows, new)), self.block_size))

    def check_tokens(self, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """Raises ValueError where tokens are of another kind than those that are kept."""
        held = (self.keys.slots.shape[1], self.keys.slots.shape[3], self.values.slots.shape[3], self.keys.slots.dtype)
        given = (kv_heads, key_dim, value_dim, compute_dtype(dtype))
        if held != given or device not in (None, self.keys.slots.device):
            raise ValueError(
                "the cache was filled by another model: it holds (key heads, key width, value width, dtype) "
                f"{held} on {self.keys.slots.device}, but this model has {given}; use a new cache"
            )

    # Slots

    def _group_slots(self, level: int, groups: range) -> torch.Tensor:
        first = self.ring + level * self.groups * self.rank
        device = self.keys.slots.device
        group = torch.arange(groups.start, groups.stop, device=device)[:, None] % self.groups
        return (first + group * self.rank + torch.arange(self.rank, device=device)).flatten()

    def _token_slots(self, tokens: range) -> torch.Tensor:
        return torch.arange(tokens.start, tokens.stop, device=self.keys.slots.device) % self.ring

    @staticmethod
    def _read(store: _Store, rows: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
        """``(rows, kv_heads, slots, dim)`` of some rows, or (None) of all."""
        return store.slots.index_select(2, slots) if rows is None else store.slots[rows[:, None], :, slots].transpose(1, 2)

    @staticmethod
    def _write(store: _Store, rows: torch.Tensor | None, slots: torch.Tensor, x: torch.Tensor) -> None:
        x = x.detach().to(store.slots.dtype)
        if rows is None:
            store.slots.index_copy_(2, slots, x)
        else:
            store.slots[rows[:, None], :, slots] = x.transpose(1, 2)

    def _alike(self, keys: list) -> list:
        """The distinct keys, one of which each row was given, and the rows of each: their numbers, or None for all."""
        found = {}
        for i, key in enumerate(keys):
            found.setdefault(key, []).append(i)
        device = self.keys.slots.device
        return [(key, None if len(rows) == len(keys) else torch.tensor(rows, device=device)) for key, rows in found.items()]

    # Summaries

    def _groups_of(self, side: _Side, rows, level: int, groups: range) -> torch.Tensor:
        """Kept groups of one level as they were summarised, ``(rows, kv_heads, groups, rank, dim)``."""
        return side.plain(self._read(side.store, rows, self._group_slots(level, groups))).unflatten(2, (-1, self.rank))

    def _placed(self, side: _Side, rows, level: int, last: int, groups: torch.Tensor, new) -> torch.Tensor:
        """New groups, which end before group ``last``, as they are kept: with the rotated ones before them where keys have both."""
        if side.rotary is None:
            return groups
        # Position id of each row's first token.
        known = [(x.position if row.position is None else row.position) - row.length for row, x in zip(self.rows, new)]
        origin = torch.tensor(known, device=groups.device)
        origin = origin if rows is None else origin[rows]
        width = self.block_size << level
        group = torch.arange(last - groups.shape[2], last, device=groups.device)[:, None]
        centre = group * width + (torch.arange(self.rank, device=groups.device) + 0.5) * (width / self.rank) - 0.5
        return torch.cat([side.rotary(groups, origin[:, None, None, None] + centre), groups], -1)

    def _keep(self, side: _Side, rows, level: int, last: int, groups: torch.Tensor) -> None:
        """Writes the newest of the groups that end before group ``last``."""
        count = min(groups.shape[2], self.groups)
        slots = self._group_slots(level, range(last - count, last))
        self._write(side.store, rows, slots, groups[:, :, groups.shape[2] - count :].flatten(2, 3))

    def _grow(self, length: int, call: _Call) -> None:
        """Makes room for every level that the token after ``length`` tokens can see, in any row."""
        while not self.direct and self.levels < level_count(length + 1, self.block_size, self.max_levels):
            level = self.levels
            self._bias = None
            with torch.inference_mode(False):
                for side in call.sides:
                    side.store.slots = nn.functional.pad(side.store.slots, (0, 0, 0, self.groups * self.rank))
            # No row is longer than two groups of the new level, so that all groups of the level below are there.
            for past, rows in self._alike([row.length for row in self.rows]):
                finished = past // (self.block_size << level)
                for side in call.sides if finished else ():
                    children = self._groups_of(side, rows, level - 1, range(2 * finished))
                    made = side.summary(None, None, 2, past=Past(0, [children]), kernels=call.kernels)[0][1]
                    self._keep(side, rows, level, finished, self._placed(side, rows, level, finished, made, call.new))

    def _extend(self, side: _Side, rows, tokens: torch.Tensor, block: int, call: _Call) -> tuple[list[torch.Tensor], list]:
        """Summarises the whole blocks of ``tokens`` ``(rows, kv_heads, n, dim)``, of which the first is ``block``.

        Returns the new groups of each level that has some, ``(rows, kv_heads, groups, rank, dim)``, and, of direct summaries, the
        sums after each of the last blocks, which are needed to go back: ``(number of blocks, sums)``. Nothing is kept yet.
        """
        blocks, plain, sums = tokens.shape[2] // self.block_size, side.plain(tokens), []
        if self.levels == 0:
            made = []
        elif not self.direct:
            levels = sum((block + blocks) >> level > block >> level for level in range(self.levels))
            # The child that the open group of the next level has, if any.
            children = [range((block >> level) // 2 * 2, block >> level) for level in range(levels - 1)]
            held = [self._groups_of(side, rows, level, groups) for level, groups in enumerate(children)]
            made, _ = side.summary(plain, None, levels, past=Past(block, held), kernels=call.kernels)
        else:
            held = side.store.sums[block % len(side.store.sums)]
            held, pieces = (held if rows is None else held[rows]).unbind(2), []
            single = min(self.spare, blocks)
            for count in [blocks - single] * (blocks > single) + [1] * single:
                piece, plain = plain.split([count * self.block_size, plain.shape[2] - count * self.block_size], 2)
                part, held = side.summary(
                    piece, None, self.levels, past=Past(block + sum(n for n, _ in pieces), held), kernels=call.kernels
                )
                pieces.append((count, part))
                sums.append((block + sum(n for n, _ in pieces), torch.stack(held, 2).detach()))
            made = [torch.cat(parts, 2) for parts in zip(*(part for _, part in pieces))]
        return [self._placed(side, rows, level, (block + blocks) >> level, x, call.new) for level, x in enumerate(made)], sums

    def _keep_all(self, side: _Side, rows, blocks: int, made: list[torch.Tensor], sums: list) -> None:
        """Keeps what ``_extend`` returned; there are ``blocks`` whole blocks by now."""
        for level, groups in enumerate(made):
            self._keep(side, rows, level, blocks >> level, groups)
        for count, x in sums:
            store = side.store.sums[count % len(side.store.sums)]
            store[slice(None) if rows is None else rows] = x.to(store.dtype)

    # Attention

    def _chunk(self, q, k, v, call: _Call) -> torch.Tensor:
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        self._grow(max(row.length + x.count for row, x in zip(self.rows, call.new)), call)
        writes = []
        for (past, start, count), rows in self._alike([(row.length, x.start, x.count) for row, x in zip(self.rows, call.new)]):
            part = [x[:, :, start : start + count] if rows is None else x[rows, :, start : start + count] for x in (q, k, v)]
            if count:
                got = self._attend_rows(rows, past, *part, call, writes)
                out[slice(None) if rows is None else rows, :, start : start + count] = got
        # After all that can fail.
        self._bias = None
        for write, *arguments in writes:
            write(*arguments)
        return out

    def _attend_rows(self, rows, past: int, q, k, v, call: _Call, writes: list) -> torch.Tensor:
        """Attention of new tokens of rows that all have ``past`` tokens behind them; what is to be kept is added to ``writes``."""
        m, dim, n = self.block_size, q.shape[-1], past + q.shape[2]
        first = max(0, past // m - 1)
        kept = [range(max(0, (past // m >> level) - self.groups), past // m >> level) for level in range(self.levels)]
        local, far = [], []
        for side, x in zip(call.sides, (k, v)):
            near = torch.cat([self._read(side.store, rows, self._token_slots(range(first * m, past))).to(x.dtype), x], 2)
            groups = [self._read(side.store, rows, self._group_slots(level, at_hand)) for level, at_hand in enumerate(kept)]
            if n // m > past // m:
                whole = near[:, :, (past // m - first) * m : (n // m - first) * m]
                made, sums = self._extend(side, rows, whole, past // m, call)
                groups[: len(made)] = [torch.cat([old, more.flatten(2, 3)], 2) for old, more in zip(groups, made)]
                writes.append((self._keep_all, side, rows, n // m, made, sums))
            fresh = range(max(past, n - self.ring), n)
            writes.append((self._write, side.store, rows, self._token_slots(fresh), x[:, :, fresh.start - past :]))
            empty = x.new_zeros(*x.shape[:2], 0, x.shape[-1], dtype=side.store.slots.dtype)
            local.append(near)
            far.append([empty, *groups[: level_count(n, m)]])

        before, after = past - first * m, -n % m
        padded = [nn.functional.pad(x, (0, 0, pad, after)) for x, pad in ((q, before), (local[0][..., :dim], 0), (local[1], 0))]
        far[0] = [x[..., :dim] for x in far[0]]
        begins = [groups.start for groups in kept]
        return self._attend_grid(rows, past, q, padded, far, begins, call, writes)[:, :, before : before + n - past]

    def _attend_grid(self, rows, past: int, q, padded: list, far: list, begins: list[int], call: _Call, writes: list) -> torch.Tensor:
        """Attention of the new queries after ``past`` tokens: they, keys and values ``padded`` to whole blocks, from the one before theirs
        on; far: keys and values of the listed groups of each level, from ``begins`` on, after an empty one.
        """
        n, counts = past + q.shape[2], [groups.shape[2] // self.rank for groups in far[0][1:]]
        first = max(0, past // self.block_size - 1)
        far = [torch.cat(groups, 2) for groups in far]
        if call.kernels:
            listing = Listing(begins[: len(counts)], counts, self.block_size, self.rank, first)
            return run_kernels(*padded, *far, listing, self._operator_call(call))[0]
        return attend_blocks(*padded, self._listed(n, first, begins, counts, far, call), None, self.block_size, self._operator_call(call))

    def _operator_call(self, call: _Call) -> Call:
        options = MultipoleOptions(block_size=self.block_size, rank=self.rank, size_weighting=call.size_weighting)
        return Call(options, far_bias=call.far_bias, softcap=call.softcap, scale=call.scale)

    def _listed(self, n: int, first: int, begins: list[int], counts: list[int], far: list, call: _Call):
        """The summaries that the blocks from ``first`` on see, where of each level ``counts`` groups from ``begins`` on are at hand, one
        after another: ``far``, keys and values.
        """
        device = far[0].device
        columns = far_columns(n, self.block_size, len(counts), True, first, device)
        table = [(begin, count, sum(counts[:level])) for level, (begin, count) in enumerate(zip(begins, counts))]
        begin, count, before = torch.tensor(table, device=device).reshape(-1, 3).long()[columns.level - 1].unbind(1)
        row = (columns.first // columns.width - begin).clamp(min=0).minimum(count - 1) + before
        return list_summaries(*far, columns._replace(row=row), columns.hidden[None], self.rank, self._operator_call(call))

    def _step(self, q, k, v, call: _Call) -> torch.Tensor:
        """Attention of one more token in every row: all slots at once."""
        batch, heads, _, dim = q.shape
        m = self.block_size
        past = [row.length for row in self.rows]
        alike = len(set(past)) == 1
        every, slot = slice(None), past[0] % self.ring
        if not alike:
            every, slot = torch.arange(batch, device=q.device), torch.tensor(past, device=q.device) % self.ring
        for side, x in zip(call.sides, (k, v)):
            side.store.slots[every, :, slot] = x[:, :, 0].to(side.store.slots.dtype)
        if call.kernels:
            out = self._attend_slots_on_gpu(q[:, :, 0], past, call)
        else:
            bias = self._step_bias(past, every, slot, heads, call)
            # The query heads of one key head are its queries.
            q = q.reshape(batch, bias.shape[1], -1, dim).to(self.keys.slots.dtype)
            out = self._attend_slots(q, bias, past, call)

        if any((length + 1) % m == 0 for length in past):
            self._grow(max(past) + 1, call)
            for length, rows in self._alike([length + 1 for length in past]):
                for side in call.sides if length % m == 0 else ():
                    block = self._read(side.store, rows, self._token_slots(range(length - m, length)))
                    self._keep_all(side, rows, length // m, *self._extend(side, rows, block, length // m - 1, call))
        return out.reshape(batch, heads, 1, -1).to(k.dtype)

    def _step_bias(self, past: list[int], every, slot, heads: int, call: _Call) -> torch.Tensor:
        """What is added to the logits of one more token in every row, ``(batch or 1, kv_heads, repeats, slots)``."""
        alike = len(set(past)) == 1
        if self._bias is None or not self._biased_by(heads, call) or any(length % self.block_size == 0 for length in past):
            self._bias = self._visible([past[0]] if alike else past, heads, call)
            self._bias_of = heads, call.size_weighting, None if call.far_bias is None else call.far_bias.detach().clone()
        else:
            self._bias[every, :, slot] = 0
        return self._bias.unflatten(1, (self.keys.slots.shape[1], -1))

    def _biased_by(self, heads: int, call: _Call) -> bool:
        """Whether the bias that is kept is that of this call."""
        *kind, far_bias = self._bias_of
        if kind != [heads, call.size_weighting] or far_bias is None or call.far_bias is None:
            return kind == [heads, call.size_weighting] and far_bias is call.far_bias
        return torch.equal(far_bias, call.far_bias)

    def _attend_slots_on_gpu(self, q, past: list[int], call: _Call, far: torch.Tensor | None = None) -> torch.Tensor:
        """:meth:`_attend_slots` of queries ``(batch, heads, dim)``; far: see the kernel, in place of the summaries."""
        from .state_triton import step

        lengths = None if len(set(past)) == 1 else torch.tensor(past, dtype=torch.int32, device=q.device)
        far_bias = None if call.far_bias is None else call.far_bias.float()
        seen = slice(None if far is None else self.ring)
        keys, values = self.keys.slots[:, :, seen, : q.shape[-1]], self.values.slots[:, :, seen]
        sizes = (self.ring, self.groups, self.block_size, self.rank)
        return step(q, keys, values, lengths, past[0], far_bias, far, *sizes, call.size_weighting, call.scale, call.softcap)

    def _attend_slots(self, q, bias, past: list[int], call: _Call) -> torch.Tensor:
        """Attention of one query after ``past`` tokens of each row, ``(batch, kv_heads, repeats, dim)``; bias: of its logits."""
        keys, values = self.keys.slots[..., : q.shape[-1]], self.values.slots
        if call.softcap is None:
            return nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=call.scale)
        logits = call.softcap * torch.tanh(q @ keys.transpose(2, 3) * call.scale / call.softcap) + bias
        return torch.softmax(logits, -1) @ values

    @torch.inference_mode(False)
    @torch.no_grad()
    def _visible(self, past: list[int], heads: int, call: _Call) -> torch.Tensor:
        """What is added to the logits of the token after ``past`` others, ``(rows, heads, slots)``: -inf where it does not see."""
        device, dtype, m = self.keys.slots.device, self.keys.slots.dtype, self.block_size
        last = torch.tensor(past, device=device)[:, None]
        token = last - (last - torch.arange(self.ring, device=device)) % self.ring
        near = torch.where(token >= (last // m - 1).clamp(min=0) * m, 0.0, -torch.inf).to(dtype)
        near = near[:, None].expand(-1, heads, -1)
        if self.levels == 0:
            return near.contiguous()
        level = torch.arange(self.levels, device=device).repeat_interleave(self.groups)
        width = m << level
        finished = last // width
        group = finished - 1 - (finished - 1 - torch.arange(self.groups, device=device).repeat(self.levels)) % self.groups
        own = last // width
        seen = (group >= 0) & (own - group >= 2) & (own // 2 - group // 2 <= 1)
        far = (width.to(dtype) / self.rank).log() if call.size_weighting else torch.zeros_like(width, dtype=dtype)
        if call.far_bias is not None:
            far = far + call.far_bias.to(dtype)[:, level.clamp(max=call.far_bias.shape[1] - 1)]
        far = torch.where(seen[:, None], far, -torch.inf).expand(-1, heads, -1)
        return torch.cat([near, far.repeat_interleave(self.rank, -1)], -1)

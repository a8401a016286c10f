"""Generation state of multipole attention: what a causal layer needs of the past, O(log n) of it, and attention on it.

A query in block b sees the tokens of blocks b - 1 and b, and of each level only finished groups, none older than the third before
its own. So a layer keeps, for each head, a ring of tokens and a ring of group summaries for each level, side by side in one tensor:
a decoding step is ordinary attention over all of its slots, with a bias that hides what the query does not see. A block is
summarised when its last token has come. Everything older is dropped for good, but for a few blocks that allow to go back.
"""

from typing import NamedTuple

import torch
from torch import nn

from .hierarchy import far_columns, level_count
from .multipole_attention import attend_blocks, far_field
from .summaries import Past, compute_dtype


class NewTokens(NamedTuple):
    """What one row of the batch brings to a forward pass."""

    start: int  # column of its first real token among the new ones
    count: int  # real tokens
    position: int | None = None  # position id of the first


class MultipoleState:
    """The past of one layer.

    ``keys`` and ``values`` ``(batch, kv_heads, slots, dim)``, float32 (float64 for float64): token t of a row lies in slot
    ``t % ring``, summary r of group g of level l (counted from 0) in slot ``ring + (l * groups + g % groups) * rank + r``. Keys
    that are summarised before their rotation are kept twice as wide, behind the rotated ones. Gradients stop here.
    """

    def __init__(self, key, value, block_size: int, rank: int, levels: int, rollback: int, direct: bool):
        self.spare = max(1, -(-rollback // block_size))  # blocks that can be taken back
        self.block_size, self.rank, self.direct = block_size, rank, direct
        self.ring, self.groups = (2 + self.spare) * block_size, 3 + self.spare
        batch, heads = key.shape[:2]
        like = {"dtype": compute_dtype(key.dtype), "device": key.device}
        slots = self.ring + levels * self.groups * rank
        # Not inference tensors, even when made in inference mode: they are written to outside of it, too.
        with torch.inference_mode(False):
            self.keys, self.values = (torch.zeros(batch, heads, slots, x.shape[-1], **like) for x in (key, value))
            # Direct summaries: sums of the open groups, after each of the last blocks.
            sums = (self.spare + 1, batch, heads, levels, rank) if direct else (0,)
            self.key_sums, self.value_sums = (torch.zeros(*sums, x.shape[-1], **like) for x in (key, value))
        self.seen = 0  # columns, padding included
        self.lengths = [0] * batch  # real tokens of each row
        self.longest = [0] * batch  # before anything was taken back
        self.positions = [None] * batch  # position id of the next token
        self.closed = [False] * batch  # padding came after the tokens
        self._bias = None

    @property
    def levels(self) -> int:
        return (self.keys.shape[2] - self.ring) // (self.groups * self.rank)

    def select(self, index: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows of the batch."""
        with torch.inference_mode(False):
            index = index.to(self.keys.device, copy=True)
            self.keys, self.values = (x.index_select(0, index) for x in (self.keys, self.values))
            if self.direct:
                self.key_sums, self.value_sums = (x.index_select(1, index) for x in (self.key_sums, self.value_sums))
        rows = index.tolist()
        for name in ("lengths", "longest", "positions", "closed"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        self._bias = None

    def take_back(self, tokens: int) -> None:
        """Forgets the last ``tokens`` columns; raises ValueError where what came before them is gone."""
        if tokens > self.seen:
            raise ValueError(f"the cache has seen {self.seen} tokens and cannot take back {tokens}")
        if tokens and any(self.closed):
            raise ValueError("the cache has rows with padding behind their tokens and cannot take tokens back")
        for length, longest in zip(self.lengths, self.longest):
            kept = length - (longest - self.spare * self.block_size if longest > self.ring else 0)
            if min(tokens, length) > kept:
                raise ValueError(
                    f"the cache can take back {kept} more tokens, but {tokens} were asked for: older keys are dropped. "
                    f"Make it as MultipoleCache(config=model.config, rollback={tokens}), which keeps more"
                )
        self.seen -= tokens
        self.positions = [p if p is None else p - min(tokens, n) for p, n in zip(self.positions, self.lengths)]
        self.lengths = [max(0, length - tokens) for length in self.lengths]
        self._bias = None

    def attend(
        self, q, k, v, new: list[NewTokens], *, key_summary, value_summary, size_weighting, far_bias, softcap, scale, rotary
    ) -> torch.Tensor:
        """Takes in new tokens and returns their attention ``(batch, heads, n, value_dim)``, zeros at padding.

        q: ``(batch, heads, n, dim)``; k, v: ``(batch, kv_heads, n, dim)``. The other arguments are those of
        :func:`multipole_attention`; with ``rotary`` (x, positions) -> x, k holds the rotated keys and, behind them, the plain ones.
        """
        self._check_tokens(k, v)
        self.check(new)
        if self.direct:
            longest = max(length + row.count for length, row in zip(self.lengths, new))
            key_summary.check_levels(level_count(longest, self.block_size))
        options = {"size_weighting": size_weighting, "far_bias": far_bias}
        sides = {"keys": (key_summary, rotary), "values": (value_summary, None)}
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            if q.shape[2] == 1 and all(row.count for row in new) and not recorded:
                out = self._step(q, k, v, new, sides, options, softcap, scale)
            else:
                out = self._chunk(q, k, v, new, sides, options, softcap, scale)
        self.seen += q.shape[2]
        self.lengths = [length + row.count for length, row in zip(self.lengths, new)]
        self.longest = [max(pair) for pair in zip(self.lengths, self.longest)]
        self.closed = [closed or 0 < row.start + row.count < q.shape[2] for closed, row in zip(self.closed, new)]
        for i, row in enumerate(new):
            if row.count and row.position is not None:
                self.positions[i] = row.position + row.count
        return out

    def check_batch(self, batch: int) -> None:
        if batch != len(self.lengths):
            raise ValueError(f"the cache holds a batch of {len(self.lengths)} rows, but the input has {batch}; use a new cache")

    def check(self, new: list[NewTokens]) -> None:
        """Raises ValueError where new tokens do not continue the state."""
        self.check_batch(len(new))
        for i, (row, length, closed, position) in enumerate(zip(new, self.lengths, self.closed, self.positions)):
            if row.count and length and (closed or row.start):
                raise ValueError(f"attention_mask has padding between the tokens of the cache and the new ones in row {i}: pad on the left")
            if row.count and None not in (position, row.position) and row.position < position:
                raise ValueError(f"position_ids go backwards: row {i} continues at {row.position}, but the cache is at {position}")

    def _check_tokens(self, k: torch.Tensor, v: torch.Tensor) -> None:
        held, given = (
            (x.shape[1], x.shape[3], y.shape[3], compute_dtype(x.dtype), x.device) for x, y in ((self.keys, self.values), (k, v))
        )
        if held != given:
            raise ValueError(
                "the cache was filled by another model: key heads, key and value width, dtype and device of the state are "
                f"{', '.join(map(str, held))}, but those of this model {', '.join(map(str, given))}; use a new cache"
            )

    # Slots

    def _group_slots(self, level: int, groups: range) -> torch.Tensor:
        first = self.ring + level * self.groups * self.rank
        group = torch.arange(groups.start, groups.stop, device=self.keys.device)[:, None] % self.groups
        return (first + group * self.rank + torch.arange(self.rank, device=self.keys.device)).flatten()

    def _token_slots(self, tokens: range) -> torch.Tensor:
        return torch.arange(tokens.start, tokens.stop, device=self.keys.device) % self.ring

    def _read(self, buffer: torch.Tensor, rows: torch.Tensor | None, slots: torch.Tensor) -> torch.Tensor:
        """``(rows, kv_heads, slots, dim)`` of some rows, or (None) of all."""
        return buffer.index_select(2, slots) if rows is None else buffer[rows[:, None], :, slots].transpose(1, 2)

    def _write(self, buffer: torch.Tensor, rows: torch.Tensor | None, slots: torch.Tensor, x: torch.Tensor) -> None:
        x = x.detach().to(buffer.dtype)
        if rows is None:
            buffer.index_copy_(2, slots, x)
        else:
            buffer[rows[:, None], :, slots] = x.transpose(1, 2)

    # Summaries

    def _grow(self, length: int, sides, new) -> None:
        """Makes room for every level that the token after ``length`` tokens can see, in any row."""
        while not self.direct and self.levels < level_count(length + 1, self.block_size):
            level = self.levels
            with torch.inference_mode(False):
                self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, self.groups * self.rank)) for x in (self.keys, self.values))
            self._bias = None
            # No row is longer than two groups of the new level, so that all groups of the level below are there.
            for past, rows in self._alike(self.lengths):
                finished = past // (self.block_size << level)
                if finished:
                    for name, side in sides.items():
                        children = self._groups_of(name, side, rows, level - 1, range(2 * finished))
                        made = side[0](None, None, 2, past=Past(0, [children]))[0][1]
                        self._keep(name, side, rows, level, finished, made, self._origin(side, rows, new))

    def _alike(self, keys: list) -> list:
        """The distinct keys, one a row was given, and the rows of each: their numbers, or None for all."""
        found = {}
        for i, key in enumerate(keys):
            found.setdefault(key, []).append(i)
        device = self.keys.device
        return [(key, None if len(rows) == len(keys) else torch.tensor(rows, device=device)) for key, rows in found.items()]

    def _groups_of(self, name: str, side, rows, level: int, groups: range) -> torch.Tensor:
        """Kept groups of one level as they were summarised, ``(rows, kv_heads, groups, rank, dim)``."""
        kept = self._read(getattr(self, name), rows, self._group_slots(level, groups)).unflatten(2, (-1, self.rank))
        return kept if side[1] is None else kept.chunk(2, -1)[1]

    def _keep(self, name: str, side, rows, level: int, last: int, groups: torch.Tensor, origin) -> torch.Tensor:
        """Keeps the newest of new groups, which end before group ``last``; returns them all, rotated where they have to be."""
        if side[1] is not None:
            width = self.block_size << level
            group = torch.arange(last - groups.shape[2], last, device=groups.device)[:, None]
            centre = group * width + (torch.arange(self.rank, device=groups.device) + 0.5) * (width / self.rank) - 0.5
            groups = torch.cat([side[1](groups, origin[:, None, None, None] + centre), groups], -1)
        count = min(groups.shape[2], self.groups)
        slots = self._group_slots(level, range(last - count, last))
        self._write(getattr(self, name), rows, slots, groups[:, :, groups.shape[2] - count :].flatten(2, 3))
        return groups

    def _extend(self, name: str, side, rows, tokens: torch.Tensor, block: int, origin) -> list[torch.Tensor]:
        """Summarises the whole blocks of ``tokens`` ``(rows, kv_heads, n, dim)``, of which the first is ``block``, and keeps what
        may be needed. Returns the new groups of each level that has some, ``(rows, kv_heads, groups, rank, dim)``.
        """
        blocks = tokens.shape[2] // self.block_size
        plain = tokens if side[1] is None else tokens.chunk(2, -1)[1]
        if not self.direct:
            levels = sum((block + blocks) >> level > block >> level for level in range(self.levels))
            # The child that the open group of the next level has, if any.
            children = [range((block >> level) // 2 * 2, block >> level) for level in range(levels - 1)]
            held = [self._groups_of(name, side, rows, level, groups) for level, groups in enumerate(children)]
            new, _ = side[0](plain, None, levels, past=Past(block, held))
            return [self._keep(name, side, rows, level, (block + blocks) >> level, x, origin) for level, x in enumerate(new)]
        if self.levels == 0:
            return []
        sums, out = getattr(self, name[:-1] + "_sums"), []
        # To go back, the sums after each of the last blocks are needed: these come one by one.
        single = min(self.spare, blocks)
        for count in [blocks - single] * (blocks > single) + [1] * single:
            piece, plain = plain.split([count * self.block_size, plain.shape[2] - count * self.block_size], 2)
            held = sums[block % len(sums)] if rows is None else sums[block % len(sums)][rows]
            new, held = side[0](piece, None, self.levels, past=Past(block, held.unbind(2)))
            block += count
            sums[block % len(sums), slice(None) if rows is None else rows] = torch.stack(held, 2).detach().to(sums.dtype)
            out.append([self._keep(name, side, rows, level, block >> level, x, origin) for level, x in enumerate(new)])
        return [torch.cat(pieces, 2) for pieces in zip(*out)]

    # Attention

    def _chunk(self, q, k, v, new, sides, options, softcap, scale) -> torch.Tensor:
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        self._grow(max(length + row.count for length, row in zip(self.lengths, new)), sides, new)
        self._bias = None
        for (past, start, count), rows in self._alike([(length, row.start, row.count) for length, row in zip(self.lengths, new)]):
            part = [x[:, :, start : start + count] if rows is None else x[rows, :, start : start + count] for x in (q, k, v)]
            if count:
                got = self._attend_rows(rows, past, *part, new, sides, options, softcap, scale)
                out[slice(None) if rows is None else rows, :, start : start + count] = got
        return out

    def _attend_rows(self, rows, past: int, q, k, v, new, sides, options, softcap, scale) -> torch.Tensor:
        """Attention of new tokens of rows that all have ``past`` tokens behind them."""
        m, dim, n = self.block_size, q.shape[-1], past + q.shape[2]
        first = max(0, past // m - 1)
        slots = self._token_slots(range(first * m, past))
        local, far, begin = {}, {}, []
        for name, x in (("keys", k), ("values", v)):
            side = sides[name]
            near = local[name] = torch.cat([self._read(getattr(self, name), rows, slots).to(x.dtype), x], 2)
            kept = [range(max(0, (past // m >> level) - self.groups), past // m >> level) for level in range(self.levels)]
            begin = [groups.start for groups in kept]
            groups = [self._read(getattr(self, name), rows, self._group_slots(level, groups)) for level, groups in enumerate(kept)]
            if n // m > past // m:
                whole = near[:, :, (past // m - first) * m : (n // m - first) * m]
                made = self._extend(name, side, rows, whole, past // m, self._origin(side, rows, new))
                groups[: len(made)] = [torch.cat([old, more.flatten(2, 3)], 2) for old, more in zip(groups, made)]
            far[name] = groups[: level_count(n, m)]
            fresh = range(max(past, n - self.ring), n)
            self._write(getattr(self, name), rows, self._token_slots(fresh), x[:, :, fresh.start - past :])

        columns = far_columns(n, m, level_count(n, m), True, first, q.device)
        # The groups at hand of all levels, one after another.
        count = [groups.shape[2] // self.rank for groups in far["keys"]]
        table = torch.tensor([(i, c, sum(count[:level])) for level, (i, c) in enumerate(zip(begin, count))], device=q.device)
        begin, count, before = table.reshape(-1, 3).long()[columns.level - 1].unbind(1)
        row = (columns.first // columns.width - begin).clamp(min=0).minimum(count - 1) + before
        row, bias = far_field(columns._replace(row=row), None, None, self.rank, kv_heads=k.shape[1], dtype=self.keys.dtype, **options)
        empty = (x.new_zeros(*x.shape[:2], 0, x.shape[-1], dtype=self.keys.dtype) for x in (k, v))
        far_k, far_v = (torch.cat([none, *groups], 2) for none, groups in zip(empty, far.values()))
        before, after = past - first * m, -n % m
        q, k, v = (nn.functional.pad(x, (0, 0, pad, after)) for x, pad in ((q, before), (local["keys"], 0), (local["values"], 0)))
        out = attend_blocks(q, k[..., :dim], v, far_k[..., :dim], far_v, row, bias, None, m, True, scale, softcap)
        return out[:, :, before : before + n - past]

    def _origin(self, side, rows, new) -> torch.Tensor | None:
        """Position id of the first token of each row, where summaries are rotated."""
        if side[1] is None:
            return None
        known = [
            (row.position if position is None else position) - length for row, position, length in zip(new, self.positions, self.lengths)
        ]
        origin = torch.tensor(known, device=self.keys.device)
        return origin if rows is None else origin[rows]

    def _step(self, q, k, v, new, sides, options, softcap, scale) -> torch.Tensor:
        """Attention of one more token in every row: all slots at once."""
        batch, heads, _, dim = q.shape
        kv_heads, m = k.shape[1], self.block_size
        lengths = [length + 1 for length in self.lengths]
        if len(set(lengths)) == 1:
            slot = self.lengths[0] % self.ring
            self.keys[:, :, slot], self.values[:, :, slot] = k[:, :, 0], v[:, :, 0]
        else:
            slot = torch.tensor([length % self.ring for length in self.lengths], device=q.device)
            every = torch.arange(batch, device=q.device)
            self.keys[every, :, slot], self.values[every, :, slot] = (x[:, :, 0].to(self.keys.dtype) for x in (k, v))
        if any(length % m == 0 for length in lengths):
            self._grow(max(lengths), sides, new)
            for length, rows in self._alike(lengths):
                for name, side in sides.items() if length % m == 0 else ():
                    block = self._read(getattr(self, name), rows, self._token_slots(range(length - m, length)))
                    self._extend(name, side, rows, block, length // m - 1, self._origin(side, rows, new))
        if self._bias is None or any(length % m == 1 or m == 1 for length in lengths):
            self._bias = self._visible(lengths, heads, **options)
        elif isinstance(slot, int):
            self._bias[..., slot] = 0
        else:
            self._bias[every, :, slot] = 0
        # The query heads of one key head are its queries.
        q = q.reshape(batch, kv_heads, heads // kv_heads, dim).to(self.keys.dtype)
        bias = self._bias.view(-1, kv_heads, heads // kv_heads, self._bias.shape[-1])
        keys = self.keys[..., :dim]
        if softcap is None:
            out = nn.functional.scaled_dot_product_attention(q, keys, self.values, attn_mask=bias, scale=scale)
        else:
            logits = softcap * torch.tanh(q @ keys.transpose(2, 3) * scale / softcap) + bias
            out = torch.softmax(logits, -1) @ self.values
        return out.reshape(batch, heads, 1, -1).to(k.dtype)

    def _visible(self, lengths: list[int], heads: int, size_weighting: bool, far_bias) -> torch.Tensor:
        """What is added to the logits of the last of ``lengths`` tokens, ``(batch or 1, heads, slots)``: -inf where it does not see."""
        with torch.inference_mode(False), torch.no_grad():
            return self._make_bias(lengths, heads, size_weighting, far_bias)

    def _make_bias(self, lengths, heads, size_weighting, far_bias):
        device, m = self.keys.device, self.block_size
        last = torch.tensor(sorted(set(lengths)) if len(set(lengths)) == 1 else lengths, device=device)[:, None] - 1
        token = last - (last - torch.arange(self.ring, device=device)) % self.ring
        near = torch.where(token >= (last // m - 1).clamp(min=0) * m, 0.0, -torch.inf).to(self.keys.dtype)
        near = near[:, None].expand(-1, heads, -1)
        if self.levels == 0:
            return near.contiguous()
        level = torch.arange(self.levels, device=device).repeat_interleave(self.groups)
        width = m << level
        finished = (last + 1) // width
        group = finished - 1 - (finished - 1 - torch.arange(self.groups, device=device).repeat(self.levels)) % self.groups
        own = last // width
        seen = (group >= 0) & (own - group >= 2) & (own // 2 - group // 2 <= 1)
        far = (width.to(near.dtype) / self.rank).log() if size_weighting else torch.zeros_like(width, dtype=near.dtype)
        if far_bias is not None:
            far = far + far_bias.to(far.dtype)[:, level.clamp(max=far_bias.shape[1] - 1)]
        far = torch.where(seen[:, None], far, -torch.inf).expand(-1, heads, -1)
        return torch.cat([near, far.repeat_interleave(self.rank, -1)], -1)

"""Generation state of the O(n) form of multipole attention: that of the other form, and the far results of the last segments."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .calls import Call
from .multipole_attention import attend_segments, log_counts
from .multipole_state import MultipoleState
from .shared_query_torch import HIDDEN, merge, partial_softmax
from .state_attention import Grid, StepBias, attend_slots_on_gpu


class LinearState(MultipoleState):
    """``far`` ``(batch, heads, levels, segments, value_dim + 1)``: mean and log-sum-exp of the far field of segment s of each level, of
    that level and all coarser ones, in slot ``s % segments``. It is computed when the first token of the segment comes, for all of them.
    """

    linear = True

    def __init__(self, q, k, v, *args, **kwargs):
        super().__init__(q, k, v, *args, **kwargs)
        self.segments = self.layout.spare * self.layout.rank + 1  # those of the blocks that can be taken back, and of the next token
        with torch.inference_mode(False):
            self.far = self._nothing(*q.shape[:2], self.levels, self.segments)

    def _nothing(self, *shape: int) -> torch.Tensor:
        far = self.values.slots.new_zeros(*shape, self.values.slots.shape[-1] + 1)
        far[..., -1] = HIDDEN
        return far

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | {"far": self.far}

    def description(self) -> dict:
        return super().description() | {"segments": self.segments}

    @classmethod
    def restored(cls, description: dict, tensors: dict[str, torch.Tensor]) -> "LinearState":
        state: Any = super().restored(description, tensors)
        state.segments, state.far = description["segments"], tensors["far"]
        return state

    def select(self, index: torch.Tensor) -> None:
        super().select(index)
        with torch.inference_mode(False):
            self.far = self.far.index_select(0, index.to(self.far.device, copy=True))

    def _grow(self, length: int, work) -> None:
        super()._grow(length, work)
        missing = self.levels - self.far.shape[2]
        if missing:
            # No token so far is long enough to see anything of the new level.
            with torch.inference_mode(False):
                self.far = torch.cat([self.far, self._nothing(*self.far.shape[:2], missing, self.segments)], 2)

    def _width(self, level: int) -> int:
        """Tokens of a segment."""
        return (self.layout.block_size << level) // self.layout.rank

    def _keep_segments(self, rows, level: int, last: int, far: torch.Tensor) -> None:
        """Keeps the newest of the segments ``(batch, heads, segments, value_dim + 1)`` that end before segment ``last``."""
        far = far.detach()[:, :, -self.segments :]
        slots = torch.arange(last - far.shape[2], last, device=far.device) % self.segments
        if rows is None:
            self.far[:, :, level, slots] = far
        else:
            self.far[rows[:, None], :, level, slots] = far.transpose(1, 2)

    def _results(self, level: int, segment: torch.Tensor, grid: Grid, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Far results, of this level alone, of the segments of a grid with numbers ``(segments,)``: mean and log-sum-exp."""
        dtype, kv_heads, rank, device = self.values.slots.dtype, grid.k.shape[1], self.layout.rank, segment.device
        width = self._width(level)
        # Queries are the first tokens of the segments.
        q = grid.new[:, :, -(-grid.past // width) * width - grid.past :: width].to(dtype).unflatten(1, (kv_heads, -1)).transpose(2, 3)
        own = segment[:, None] // rank
        group = 2 * (own // 2 - 1) + torch.arange(2, device=device)
        seen = ((group >= 0) & (own - group >= 2)).repeat_interleave(rank, 1)[:, None]
        listed = (group - grid.begins[level]).clamp(min=0)
        if grid.counts is None:
            bias = torch.tensor(math.log(width) if call.options.size_weighting else 0.0, dtype=dtype, device=device)
        else:
            counts = grid.counts[level].unflatten(2, (-1, rank))[:, :, listed].flatten(3)
            bias = log_counts(counts, call.options.size_weighting)[..., None, :]
        if call.far_bias is not None:
            bias = bias + call.far_bias[:, min(level, call.far_bias.shape[1] - 1)].to(dtype).view(kv_heads, 1, -1, 1)
        bias = torch.where(seen, bias, HIDDEN).clamp(min=HIDDEN)
        k, v = (x[level].to(dtype).unflatten(2, (-1, rank))[:, :, listed].flatten(3, 4) for x in (grid.far_k, grid.far_v))
        mean, total = partial_softmax(q, k, v, bias, call.scale, call.softcap)
        return mean.transpose(2, 3).flatten(1, 2), total.transpose(2, 3).flatten(1, 2)

    def _attend_grid(self, grid: Grid, work) -> tuple[torch.Tensor, list[Callable]]:
        m, rank, past, n = self.layout.block_size, self.layout.rank, grid.past, grid.past + grid.new.shape[2]
        whole = range(max(0, past // m - 1) * rank, -(-n // m) * rank)  # segments of level 1
        merged, known = self._nothing(*grid.q.shape[:2], len(whole)), whole.start  # of the level above, from its segment ``known`` on
        writes: list[Callable] = []
        for level in reversed(range(self.levels)):
            width = self._width(level)
            begin, fresh, end = past // width, -(-past // width), -(-n // width)
            segment = torch.arange(fresh, end, device=grid.q.device)
            new = self._nothing(*grid.q.shape[:2], len(segment))
            if level < len(grid.far_k) and end > fresh:
                results = self._results(level, segment, grid, work.call)
                if level + 1 < self.levels:
                    above = merged[:, :, segment // 2 - known]
                    results = merge(results, (above[..., :-1], above[..., -1]))
                new = torch.cat([results[0], results[1][..., None]], -1)
            if end > fresh:
                writes.append(partial(self._keep_segments, grid.rows, level, end, new))
            if begin < fresh:
                held = self.far[slice(None) if grid.rows is None else grid.rows, :, level, begin % self.segments]
                new = torch.cat([held[:, :, None], new], 2)
            merged, known = new, begin
        around = (known - whole.start, whole.stop - known - merged.shape[2])
        mean, total = nn.functional.pad(merged[..., :-1], (0, 0, *around)), nn.functional.pad(merged[..., -1], around, value=HIDDEN)
        return attend_segments(grid.q, grid.k, grid.v, (mean, total), grid.sinks, None, m, work.call, work.kernels), writes

    def _begin_segments(self, q, bias: torch.Tensor, past: list[int], call: Call) -> None:
        """Far results of the segments, of whichever level and row, whose first token this is."""
        length = torch.tensor(past, device=q.device)[:, None]
        width = self._width(0) << torch.arange(self.levels, device=q.device)
        begins, slot = length % width == 0, length // width % self.segments  # (batch, levels)
        fine = self.layout.slots(0)
        k, v = (x.slots[:, :, fine:].unflatten(2, (self.levels, -1)) for x in (self.keys, self.values))
        bias = bias[..., fine:].unflatten(-1, (self.levels, -1)).transpose(2, 3).clamp(min=HIDDEN)
        results = partial_softmax(q[:, :, None], k[..., : q.shape[-1]], v, bias, call.scale, call.softcap)
        mean, total = (x.detach().transpose(2, 3).flatten(1, 2) for x in results)  # (batch, heads, levels, ...)
        merged, row = self._nothing(*mean.shape[:2]), torch.arange(len(past), device=q.device)
        for level in reversed(range(self.levels)):
            at = (row, slice(None), level, slot[:, level])
            new = merge((mean[:, :, level], total[:, :, level]), (merged[..., :-1], merged[..., -1]))
            merged = torch.where(begins[:, level, None, None], torch.cat([new[0], new[1][..., None]], -1), self.far[at])
            self.far[at] = merged

    def _begins(self, past: list[int]) -> bool:
        """Whether the token after ``past`` others begins a segment, in any row."""
        return self.levels > 0 and any(length % self._width(0) == 0 for length in past)

    def _attend_on_gpu(self, q, past, work):
        if self._begins(past):
            grouped = q.unflatten(1, (self.keys.slots.shape[1], -1)).to(self.keys.slots.dtype)
            bias = StepBias().of(past, self.keys, self.masses, q.shape[1], work.call)
            self._begin_segments(grouped, bias, past, work.call)
        return attend_slots_on_gpu(q, self.keys, self.values, past, work.call, far=self.far[:, :, 0] if self.levels else None)

    def _attend_slots(self, q, bias, past, work):
        fine, call = self.layout.slots(0), work.call
        near = q @ self.keys.slots[:, :, :fine, : q.shape[-1]].transpose(2, 3) * call.scale
        if call.softcap is not None:
            near = call.softcap * torch.tanh(near / call.softcap)
        near, values = near + bias[..., :fine], self.values.slots[:, :, :fine]
        if not self.levels:
            return torch.softmax(near, -1) @ values
        if self._begins(past):
            self._begin_segments(q, bias, past, call)
        slots = [length // self._width(0) % self.segments for length in past]
        rows, slot = (slice(None), slots[0]) if len(set(slots)) == 1 else (range(len(slots)), slots)
        far = self.far[rows, :, 0, slot].unflatten(1, q.shape[1:3])
        weights = torch.softmax(torch.cat([near, far[..., -1:]], -1), -1)
        return weights[..., :-1] @ values + weights[..., -1:] * far[..., :-1]

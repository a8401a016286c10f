"""Cache layers of tensor attention: all keys, those of a window, or the sums of the polynomial."""

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

from .backends import takes_kernels
from .multipole_cache import ROLLBACK, PastTokens, to_take_back
from .multipole_state import NewTokens
from .polynomial_attention import Approximation, attend, feature_count


class TensorLayer(DynamicLayer):
    """Cache layer of tensor attention, which DynamicCache makes from ``config.layer_types``.

    Keys and values of all indices are kept side by side, as heads. Where ``update`` is given a ``window``, only its last tokens are,
    and ``rollback`` more that allow to go back. For the polynomial the tokens are summed up instead, in ``sums`` ``(indices, batch,
    kv_heads, features, value_dim + 1)`` float64: the size does not depend on the length, no token can be taken back, and no
    gradient passes through.
    """

    _layer_type = "tensor_attention"
    supports_early_init = False
    rollback = ROLLBACK

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._clear()

    def _clear(self) -> None:
        self.seen = 0  # columns, padding included
        self.keys = self.values = self.window = None
        self.is_initialized = False
        self.sums: torch.Tensor | None = None
        self.entry_bound: float | None = None  # what keys are divided by before they are summed
        self.counts: list[int] = []  # real tokens of each row that are in the sums

    @property
    def is_croppable(self) -> bool:
        return self.sums is None

    # Its numbers change at every step, and must not become part of compiled code.
    @torch.compiler.disable
    def update(self, key_states, value_states, *args, window: int | None = None, sums: bool = False, **kwargs):
        """Keys and values for the attention function; with ``sums``, it takes a :class:`PastTokens` in place of keys."""
        if sums:
            return PastTokens(self, key_states), value_states
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.seen, self.window = self.seen + key_states.shape[2], window
        if window is not None:
            kept = max(0, keys.shape[2] - (window - 1 + self.rollback))
            # A copy: a view would keep the dropped tokens alive.
            self.keys, self.values = (x[:, :, kept:].clone() if kept else x for x in (keys, values))
        return keys, values

    @torch.compiler.disable
    def attend(self, q, keys, values, new: list[NewTokens], approximation: Approximation) -> torch.Tensor:
        """Near-linear attention of new tokens to all so far, which they join.

        q: ``(batch, heads, queries, dim)``; keys and values: ``(indices, batch, kv_heads, queries, dim)``; new: which of the columns
        are tokens, row by row. Returns ``(batch, heads, queries, value_dim)``, zeros at padding.
        """
        (indices, batch, kv_heads, _, dim), width = keys.shape, values.shape[-1] + 1
        if self.sums is None:
            features = feature_count(dim, len(approximation.coefficients) - 1)
            sums = q.new_zeros(indices, batch, kv_heads, features, width, dtype=torch.float64)
        else:
            sums = self.sums.clone()
        out = q.new_zeros(*q.shape[:3], values.shape[-1])
        kernels = takes_kernels("auto", q, {}, order=indices + 1)
        for start, count in {(row.start, row.count) for row in new if row.count}:
            rows = torch.tensor([i for i, row in enumerate(new) if (row.start, row.count) == (start, count)], device=q.device)
            part = slice(start, start + count)
            tokens = q[rows, :, part], keys[:, rows, :, part], values[:, rows, :, part]
            found, after = attend(*tokens, approximation, causal=True, state=sums[:, rows], kernels=kernels)
            out[rows, :, part] = found
            sums[:, rows] = after
        counts = self.counts or [0] * batch
        # After all that can fail.
        self.counts = [count + row.count for count, row in zip(counts, new)]
        self.sums, self.entry_bound, self.is_initialized = sums, approximation.entry_bound, True
        self.seen += q.shape[2]
        return out

    def check(self, attention, counts: list[int]) -> None:
        """Raises ValueError where what is kept is not that of the attention module, or of its batch.

        counts: tokens of each row before the new ones, by the mask of all tokens so far.
        """
        if not self.is_initialized:
            return
        config, window = attention.config, attention.kept_tokens
        method = "exact" if self.sums is None else "polynomial"
        if method != config.tensor_method:
            raise ValueError(f"the cache was filled with tensor_method={method!r}, not {config.tensor_method!r}; use a new cache")
        indices, kv_heads, rows = attention.indices, config.num_key_value_heads, len(counts)
        if self.sums is None:
            what, held = "rows, key heads, key width, value width", (*self.keys.shape[:2], self.keys.shape[3], self.values.shape[3])
            given = rows, indices * kv_heads, attention.score_dim, attention.head_dim
        else:
            what = "indices, rows, key heads, features, value width, entry bound"
            held = (*self.sums.shape[:4], self.sums.shape[4] - 1, self.entry_bound)
            features = feature_count(attention.score_dim, len(attention.approximation(torch.float32).coefficients) - 1)
            given = indices, rows, kv_heads, features, attention.head_dim, config.tensor_entry_bound
        if held != given:
            raise ValueError(
                f"the cache was filled by another model, or other rows: it holds ({what}) {held}, but is given {given}; use a new cache"
            )
        if self.sums is None and window != self.window and self.keys.shape[2] < self.seen:
            raise ValueError(f"the cache keeps a window of {self.window} tokens, but {window or 'all'} are asked for; use a new cache")
        if self.sums is not None and counts != self.counts:
            raise ValueError(
                f"attention_mask contradicts the cache: its rows have {counts} tokens before the new ones, but {self.counts} were read; "
                "pass the mask of all tokens so far"
            )

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def tensors(self) -> dict[str, torch.Tensor]:
        if self.sums is not None:
            return {"sums": self.sums}
        return {"keys": self.keys, "values": self.values} if self.is_initialized else {}

    def description(self) -> dict:
        """All but the tensors, as plain numbers; :meth:`restore` takes it back."""
        return {name: getattr(self, name) for name in ("seen", "window", "entry_bound", "counts")}

    def restore(self, description: dict, tensors: dict[str, torch.Tensor]) -> None:
        vars(self).update(description)
        if "sums" in tensors:
            self.sums, self.is_initialized = tensors["sums"], True
        else:
            self.lazy_initialization(tensors["keys"], tensors["values"])
            self.keys, self.values = tensors["keys"], tensors["values"]

    def check_crop(self, tokens: int) -> None:
        """Raises ValueError where ``tokens`` cannot be taken back."""
        if tokens and self.sums is not None:
            raise ValueError(
                "tensor_method='polynomial' keeps sums, from which no token can be taken back (crop, assisted decoding): read the text "
                "that is to be kept into a new cache"
            )
        if tokens > self.seen:
            raise ValueError(f"the cache has seen {self.seen} tokens and cannot take back {tokens}")
        if self.is_initialized and self.sums is None and self.keys.shape[2] < self.seen:
            spare = self.keys.shape[2] - (self.window - 1) if self.window else 0
            if tokens > spare:
                raise ValueError(
                    f"the cache can take back {spare} more tokens, but {tokens} were asked for: older keys are dropped. "
                    f"MultipoleCache(config=model.config, rollback={tokens}) keeps more"
                )

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back ``-tokens_to_remove`` tokens; a positive number is the length to keep, as in Transformers before 5.23."""
        count = to_take_back(tokens_to_remove, self.seen)
        self.check_crop(count)
        if count:
            super().crop(-count)
            self.seen -= count

    def reset(self) -> None:
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx) if self.sums is None else self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices) if self.sums is None else self._select(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.sums is None:
            return super().batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.counts)).repeat_interleave(repeats))

    def _select(self, index: torch.Tensor) -> None:
        index = torch.arange(len(self.counts))[index.cpu()]
        self.sums = self.sums.index_select(1, index.to(self.sums.device))
        self.counts = [self.counts[row] for row in index.tolist()]

    # Sums are small: they stay on their device.
    def offload(self) -> None:
        if self.sums is None:
            super().offload()

    def prefetch(self) -> None:
        if self.sums is None:
            super().prefetch()


class TensorStaticLayer(StaticLayer):
    """Says what to use instead."""

    _layer_type = "tensor_attention"

    def __init__(self, *args, **kwargs):
        raise ValueError("tensor attention has no static cache: leave out cache_implementation='static'; windows and sums are small anyway")

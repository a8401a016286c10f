"""Cache layers of tensor attention: all keys, those of a window, or the sums of the polynomial."""

import torch
from transformers.cache_utils import StaticLayer

from .backends import takes_kernels
from .kept import Kept
from .kept_layer import KeptLayer, PastTokens
from .multipole_state import NewTokens
from .polynomial_attention import Approximation, attend, feature_count


class Sums(Kept):
    """Of all tokens so far, for the polynomial: ``sums`` ``(indices, batch, kv_heads, features, value_dim + 1)`` float64. The size does
    not depend on the length, no token can be taken back, and no gradient passes through.

    entry_bound: what keys are divided by before they are summed. counts: real tokens of each row that are in the sums.
    """

    croppable = False

    def __init__(self, sums: torch.Tensor, entry_bound: float, counts: list[int], seen: int = 0):
        self.sums, self.entry_bound, self.counts, self.seen = sums, entry_bound, counts, seen

    @classmethod
    def of_nothing(cls, keys: torch.Tensor, values: torch.Tensor, approximation: Approximation) -> "Sums":
        """Before the first tokens, which are like those of :meth:`attend`."""
        (indices, batch, kv_heads, _, dim), width = keys.shape, values.shape[-1] + 1
        features = feature_count(dim, len(approximation.coefficients) - 1)
        sums = keys.new_zeros(indices, batch, kv_heads, features, width, dtype=torch.float64)
        return cls(sums, approximation.entry_bound, [0] * batch)

    @property
    def batch(self) -> int:
        return len(self.counts)

    def attend(self, q, keys, values, new: list[NewTokens], approximation: Approximation) -> torch.Tensor:
        """Near-linear attention of new tokens to all so far, which they join.

        q: ``(batch, heads, queries, dim)``; keys and values: ``(indices, batch, kv_heads, queries, dim)``; new: which of the columns
        are tokens, row by row. Returns ``(batch, heads, queries, value_dim)``, zeros at padding.
        """
        sums = self.sums.clone()
        out = q.new_zeros(*q.shape[:3], values.shape[-1])
        kernels = takes_kernels("auto", q, {}, order=len(keys) + 1)
        for start, count in {(row.start, row.count) for row in new if row.count}:
            rows = torch.tensor([i for i, row in enumerate(new) if (row.start, row.count) == (start, count)], device=q.device)
            part = slice(start, start + count)
            tokens = q[rows, :, part], keys[:, rows, :, part], values[:, rows, :, part]
            found, after = attend(*tokens, approximation, causal=True, state=sums[:, rows], kernels=kernels)
            out[rows, :, part] = found
            sums[:, rows] = after
        # After all that can fail.
        self.sums, self.counts = sums, [count + row.count for count, row in zip(self.counts, new)]
        self.seen += q.shape[2]
        return out

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"sums": self.sums}

    def description(self) -> dict:
        return {name: getattr(self, name) for name in ("seen", "entry_bound", "counts")}

    @classmethod
    def restored(cls, description: dict, tensors: dict[str, torch.Tensor]) -> "Sums":
        return cls(tensors["sums"], *(description[name] for name in ("entry_bound", "counts", "seen")))

    def select(self, index: torch.Tensor) -> None:
        self.sums = self.sums.index_select(1, index.to(self.sums.device))
        self.counts = [self.counts[row] for row in index.tolist()]

    def check_take_back(self, tokens: int) -> None:
        if tokens:
            raise ValueError(
                "tensor_method='polynomial' keeps sums, from which no token can be taken back (crop, assisted decoding): read the text "
                "that is to be kept into a new cache"
            )

    def take_back(self, tokens: int) -> None:
        self.check_take_back(tokens)


class TensorLayer(KeptLayer):
    """Cache layer of tensor attention, which DynamicCache makes from ``config.layer_types``.

    Keys and values of all indices are kept side by side, as heads. Where ``update`` is given a ``window``, only its last tokens are,
    and ``rollback`` more that allow to go back. For the polynomial the tokens are summed up instead.
    """

    layer_type = "tensor_attention"

    # Its numbers change at every step, and must not become part of compiled code.
    @torch.compiler.disable
    def update(self, key_states, value_states, *args, window: int | None = None, sums: bool = False, **kwargs):
        """Keys and values for the attention function; with ``sums``, it takes a :class:`PastTokens` in place of keys."""
        return (PastTokens(self, key_states), value_states) if sums else self.keep_tokens(key_states, value_states, window)

    @torch.compiler.disable
    def attend(self, q, keys, values, new: list[NewTokens], approximation: Approximation) -> torch.Tensor:
        """:meth:`Sums.attend`, after making the sums where there are none yet."""
        sums = Sums.of_nothing(keys, values, approximation) if self.kept is None else self.kept
        out = sums.attend(q, keys, values, new, approximation)
        self.kept = sums
        return out

    def check(self, attention, counts: list[int]) -> None:
        """Raises ValueError where what is kept is not that of the attention module, or of its batch.

        counts: tokens of each row before the new ones, by the mask of all tokens so far.
        """
        kept, config = self.kept, attention.config
        if kept is None:
            return
        method = "exact" if kept.has_keys else "polynomial"
        if method != config.tensor_method:
            raise ValueError(f"the cache was filled with tensor_method={method!r}, not {config.tensor_method!r}; use a new cache")
        indices, kv_heads, rows, window = attention.indices, config.num_key_value_heads, len(counts), attention.kept_tokens
        if kept.has_keys:
            held: tuple
            given: tuple
            what, held = "rows, key heads, key width, value width", (*kept.keys.shape[:2], kept.keys.shape[3], kept.values.shape[3])
            given = rows, indices * kv_heads, attention.score_dim, attention.head_dim
        else:
            what = "indices, rows, key heads, features, value width, entry bound"
            held = (*kept.sums.shape[:4], kept.sums.shape[4] - 1, kept.entry_bound)
            features = feature_count(attention.score_dim, len(attention.approximation(torch.float32).coefficients) - 1)
            given = indices, rows, kv_heads, features, attention.head_dim, config.tensor_entry_bound
        if held != given:
            raise ValueError(
                f"the cache was filled by another model, or other rows: it holds ({what}) {held}, but is given {given}; use a new cache"
            )
        if kept.has_keys and kept.dropped and window != kept.window:
            raise ValueError(f"the cache keeps a window of {kept.window} tokens, but {window or 'all'} are asked for; use a new cache")
        if not kept.has_keys and counts != kept.counts:
            raise ValueError(
                f"attention_mask contradicts the cache: its rows have {counts} tokens before the new ones, but {kept.counts} were read; "
                "pass the mask of all tokens so far"
            )


class TensorStaticLayer(StaticLayer):
    """Says what to use instead."""

    def __init__(self, *args, **kwargs):
        raise ValueError("tensor attention has no static cache: leave out cache_implementation='static'; windows and sums are small anyway")

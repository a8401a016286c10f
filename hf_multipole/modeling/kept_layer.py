"""A layer of a cache of Transformers that hands all that is asked of it on to what it keeps."""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicLayer

from .kept import KeptTokens

# Tokens that can be taken back (assisted decoding), rounded up to whole blocks.
ROLLBACK = 64


class PastTokens(NamedTuple):
    """What a layer of the cache hands to the attention function in place of keys: itself, and the new ones."""

    layer: "KeptLayer"
    new: torch.Tensor


class KeptLayer(DynamicLayer):
    """What is kept is known when the first tokens come."""

    supports_early_init = False
    rollback = ROLLBACK
    kept: Any = None  # a Kept, of a kind that the layer knows

    def __init__(self, *args, **kwargs):
        """Not that of Transformers, which sets what are properties here."""

    @property
    def is_initialized(self) -> bool:
        return self.kept is not None

    @property
    def keys(self) -> torch.Tensor | None:
        return self.kept.keys if self.kept is not None and self.kept.has_keys else None

    @property
    def values(self) -> torch.Tensor | None:
        return self.kept.values if self.kept is not None and self.kept.has_keys else None

    @property
    def is_croppable(self) -> bool:
        return self.kept is None or self.kept.croppable

    def keep_tokens(self, keys: torch.Tensor, values: torch.Tensor, window: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`KeptTokens.extend`, also for the first tokens."""
        if self.kept is None:
            self.kept = KeptTokens(keys[:, :, :0], values[:, :, :0])
        return self.kept.extend(keys, values, window, self.rollback)

    def get_seq_length(self) -> int:
        return 0 if self.kept is None else self.kept.seen

    def check_crop(self, tokens: int) -> None:
        """Raises ValueError where ``tokens`` cannot be taken back."""
        if self.kept is not None:
            self.kept.check_take_back(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back ``-tokens_to_remove`` tokens; a positive number is the length to keep, as in Transformers before 5.23."""
        if self.kept is not None:
            self.kept.take_back(to_take_back(tokens_to_remove, self.kept.seen))

    def reset(self) -> None:
        self.kept = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.kept is not None:
            indices = torch.as_tensor(indices)
            self.kept.select(torch.arange(self.kept.batch, device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kept is not None:
            self.kept.select(torch.arange(self.kept.batch).repeat_interleave(repeats))

    def offload(self) -> None:
        if self.kept is not None:
            self.kept.offload()

    def prefetch(self) -> None:
        if self.kept is not None:
            self.kept.prefetch()


def to_take_back(tokens_to_remove: int, seen: int) -> int:
    count = int(tokens_to_remove)  # some versions of generate pass a tensor
    return -count if count <= 0 else max(0, seen - count)

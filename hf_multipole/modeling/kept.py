"""What a layer of a cache keeps of the past: the interface of all kinds, and the simplest of them, keys and values themselves."""

import torch


class Kept:
    """The past of one layer: all keys, those of a window, a generation state, or sums.

    Rows of the batch are told apart by their numbers; columns are tokens, padding included.
    """

    croppable = True  # whether tokens can be taken back at all
    seen: int  # columns so far

    @property
    def batch(self) -> int:
        """Rows; 0 where nothing was kept yet."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name; none where nothing was kept yet."""
        raise NotImplementedError

    def description(self) -> dict:
        """All but the tensors, as plain numbers; ``restored`` takes it back."""
        raise NotImplementedError

    def select(self, index: torch.Tensor) -> None:
        """Keeps, repeats or reorders rows: their numbers ``(rows,)`` int64."""
        raise NotImplementedError

    def check_take_back(self, tokens: int) -> None:
        """Raises ValueError where what came before the last ``tokens`` columns is gone."""
        if tokens > self.seen:
            raise ValueError(f"the cache has seen {self.seen} tokens and cannot take back {tokens}")

    def take_back(self, tokens: int) -> None:
        """Forgets the last ``tokens`` columns."""
        raise NotImplementedError

    # What is small stays on its device.
    def offload(self) -> None:
        """Moves the tensors to the CPU."""

    def prefetch(self) -> None:
        """Moves them back."""

"""What a layer of a cache keeps of the past: the interface of all kinds, and the simplest of them, keys and values themselves."""

import torch


class Kept:
    """The past of one layer: all keys, those of a window, a generation state, or sums.

    Rows of the batch are told apart by their numbers; columns are tokens, padding included.
    """

    croppable = True  # whether tokens can be taken back at all
    has_keys = False  # whether exact attention can go on from it
    seen: int  # columns so far

    @property
    def batch(self) -> int:
        """Rows."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        raise NotImplementedError

    def description(self) -> dict:
        """All but the tensors, as plain numbers."""
        raise NotImplementedError

    @classmethod
    def restored(cls, description: dict, tensors: dict[str, torch.Tensor]) -> "Kept":
        """What was described."""
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


class KeptTokens(Kept):
    """Keys and values themselves, ``(batch, kv_heads, tokens, dim)``: all of them, or the last ones where there is a window."""

    has_keys = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, window: int | None = None, dropped: int = 0):
        self.keys, self.values, self.device = keys, values, keys.device
        self.window, self.dropped = window, dropped

    @property
    def seen(self) -> int:  # type: ignore[override]  # others count
        return self.dropped + self.keys.shape[2]

    @property
    def batch(self) -> int:
        return len(self.keys)

    def extend(self, keys: torch.Tensor, values: torch.Tensor, window: int | None = None, spare: int = 0) -> tuple:
        """Takes in new tokens, and returns keys and values of these and all that were kept.

        window: tokens that a query sees, itself included; with it, no more are kept than the next one needs, and ``spare`` more that can
        be taken back.
        """
        keys, values = (torch.cat(pair, 2) for pair in ((self.keys, keys), (self.values, values)))
        surplus = 0 if window is None else max(0, keys.shape[2] - (window - 1 + spare))
        # A copy: a view would keep the dropped tokens alive.
        self.keys, self.values = (x[:, :, surplus:].clone() if surplus else x for x in (keys, values))
        self.window, self.dropped = window, self.dropped + surplus
        return keys, values

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"keys": self.keys, "values": self.values}

    def description(self) -> dict:
        return {"seen": self.seen, "window": self.window}

    @classmethod
    def restored(cls, description: dict, tensors: dict[str, torch.Tensor]) -> "KeptTokens":
        keys, values = tensors["keys"], tensors["values"]
        return cls(keys, values, description.get("window"), description["seen"] - keys.shape[2])

    def select(self, index: torch.Tensor) -> None:
        self.keys, self.values = (x.index_select(0, index.to(x.device)) for x in (self.keys, self.values))

    def check_take_back(self, tokens: int) -> None:
        super().check_take_back(tokens)
        spare = self.keys.shape[2] - (self.window - 1) if self.dropped else self.seen
        if tokens > spare:
            raise ValueError(
                f"the cache can take back {spare} more tokens, but {tokens} were asked for: older keys are dropped. "
                f"MultipoleCache(config=model.config, rollback={tokens}) keeps more"
            )

    def take_back(self, tokens: int) -> None:
        self.check_take_back(tokens)
        left = self.keys.shape[2] - tokens
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]

    def offload(self) -> None:
        self.keys, self.values = (x.to("cpu", non_blocking=True) for x in (self.keys, self.values))

    def prefetch(self) -> None:
        self.keys, self.values = (x.to(self.device, non_blocking=True) for x in (self.keys, self.values))

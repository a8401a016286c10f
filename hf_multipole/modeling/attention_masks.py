"""The mask function of "multipole" for Transformers' mask interface, and the masks that it makes."""

from dataclasses import dataclass, field, replace

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from .calls import refuse_shards
from .configuration_multipole import multipole_options
from .hierarchy import Alignment, align_rows, block_of, check_rows, real_tokens
from .multipole_state import MultipoleState, NewTokens
from .private import implementation_of, packed_documents
from .tensor_attention import document_numbers


class NoTensorError(ValueError, AttributeError):
    """For models that take a mask of ours for a tensor; an AttributeError, too, for those that ask whether it has an attribute."""


class _Opaque:
    """A mask that models must hand on to the attention function as it is."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise NoTensorError(_OPAQUE)

    def __getitem__(self, index):
        raise NoTensorError(_OPAQUE)

    def __getattr__(self, name):
        if hasattr(torch.Tensor, name) and not name.startswith("__"):
            raise NoTensorError(_OPAQUE)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


_OPAQUE = (
    "this model works with its attention mask itself instead of handing it to Transformers' attention interface, "
    "so that attn_implementation='multipole' cannot run it; use 'sdpa' or 'eager'"
)


@dataclass(eq=False)
class MultipoleMask(_Opaque):
    """What the mask function hands to every layer: the direction, and where padded or packed tokens lie.

    What is worked out of it is worked out once a forward, when the first layer asks for it.
    """

    causal: bool
    batch: int
    queries: int  # new tokens in a row
    length: int | None  # tokens in a row of keys; None where only a compiled step on a state will use it
    block_size: int
    attention_mask: torch.Tensor | None = None  # (batch, n) bool; None where there is no padding
    segment_ids: torch.Tensor | None = None  # (batch, n): documents of packed rows
    position_ids: torch.Tensor | None = None  # (batch or 1, queries)

    def to(self, *args, **kwargs) -> "MultipoleMask":
        given = {name: getattr(self, name) for name in ("attention_mask", "segment_ids", "position_ids")}
        moved = replace(self, **{name: x.to(*args, **kwargs) for name, x in given.items() if x is not None})
        if self._alignment is not None:
            moved._alignment = Alignment(*(x.to(*args, **kwargs) for x in self._alignment))
        return moved

    _alignment: Alignment | None = field(default=None, init=False, repr=False)
    _documents: torch.Tensor | None = field(default=None, init=False, repr=False)
    _pairs: torch.Tensor | None = field(default=None, init=False, repr=False)
    _new_tokens: list[NewTokens] | None = field(default=None, init=False, repr=False)
    _past_checked: bool = field(default=False, init=False, repr=False)
    _positions_checked: bool = field(default=False, init=False, repr=False)

    @property
    def alignment(self) -> Alignment | None:
        if self._alignment is None and not (self.attention_mask is None and self.segment_ids is None):
            if not torch.compiler.is_compiling():
                check_rows(self.attention_mask, self.segment_ids)
            self._alignment = align_rows(self.attention_mask, self.segment_ids, block_of(self.length, self.block_size))
        return self._alignment

    def check_positions(self, position_ids: torch.Tensor | None) -> None:
        """Raises ValueError where positions ``(batch or 1, queries)`` start anew in rows that the mask takes for one document each."""
        if self._positions_checked or self.segment_ids is not None or torch.compiler.is_compiling():
            return
        self._positions_checked = True
        if (
            self.causal
            and self.queries > 1
            and position_ids is not None
            and position_ids.shape in ((1, self.queries), (self.batch, self.queries))
        ):
            check_one_document(position_ids, None if self.attention_mask is None else self.attention_mask[:, -self.queries :])

    @property
    def documents(self) -> torch.Tensor | None:
        """For tensor layers: numbers of documents, -1 at padding, ``(batch, n)``; None where a row is one document."""
        if self._documents is None:
            self._documents = document_numbers(self.attention_mask, self.segment_ids)
        return self._documents

    def pairs(self, device: torch.device) -> torch.Tensor | None:
        """``(batch or 1, 1, queries, n)`` bool for layers with exact attention, True where a query sees a key; None where
        all is seen, or what ``is_causal`` says.
        """
        if self.attention_mask is None and self.segment_ids is None and (not self.causal or self.queries == self.length):
            return None
        if self._pairs is None:
            key = torch.arange(self.length, device=device)
            query = key[-self.queries :, None]
            seen = (key <= query if self.causal else torch.ones_like(key <= query))[None, None]
            if self.attention_mask is not None:
                real = self.attention_mask.to(device)
                seen = seen & real[:, None, None] & real[:, None, -self.queries :, None]
            if self.segment_ids is not None:
                document = self.segment_ids.to(device)
                seen = seen & (document[:, None, None] == document[:, None, -self.queries :, None])
            self._pairs = seen
        return self._pairs

    @property
    def new_tokens(self) -> list[NewTokens]:
        """What each row brings to a generation state."""
        if self._new_tokens is None:
            self._new_tokens = self._find_new_tokens()
        return self._new_tokens

    def _find_new_tokens(self) -> list[NewTokens]:
        if self.attention_mask is not None:
            new = self.attention_mask[:, -self.queries :]
            check_rows(new, None)
            count = new.sum(1)
            start = new.int().argmax(1)
        else:
            start = torch.zeros(self.batch, dtype=torch.long)
            count = torch.full_like(start, self.queries)
        if self.position_ids is None:
            return [NewTokens(*row) for row in torch.stack([start, count], 1).tolist()]
        positions = self.position_ids.expand(self.batch, -1)
        start, count = (x.to(positions.device) for x in (start, count))
        column = torch.arange(1, self.queries, device=positions.device)
        real = (column > start[:, None]) & (column < (start + count)[:, None])
        even = ((positions.diff(dim=1) == 1) | ~real).all(1)
        rows = torch.stack([start, count, positions.gather(1, start[:, None])[:, 0], even], 1).tolist()
        return [NewTokens(start, count, position if even else None) for start, count, position, even in rows]

    def check_past(self, state: MultipoleState) -> None:
        """Raises ValueError where the mask contradicts a generation state, or the tokens do not continue it. A few columns are
        looked at, so that the cost of a step does not grow with the length: not holes in what was read before.
        """
        if len(state.rows) == self.batch and not self._past_checked:
            self._check_mask(state)
            self._past_checked = True
        state.check(self.new_tokens)

    def _check_mask(self, state: MultipoleState) -> None:
        past = state.seen
        if past == 0:
            return
        if self.attention_mask is None:
            wrong = [i for i, row in enumerate(state.rows) if row.length != past]
        else:
            columns = [[max(row.begin - 1, 0), min(row.begin, past - 1)] for row in state.rows]
            found = self.attention_mask.gather(1, torch.tensor(columns, device=self.attention_mask.device)).tolist()
            wrong = [i for i, row in enumerate(state.rows) if found[i] != [row.begin == 0 and row.length > 0, row.length > 0]]
        if wrong:
            raise ValueError(
                f"attention_mask contradicts the cache: row {wrong[0]} began with {state.rows[wrong[0]].begin} padding tokens when it "
                "was filled; pass the mask of all tokens so far"
            )


@dataclass(eq=False)
class WindowMask(_Opaque):
    """Mask of the layers of a model that see a window only, which is cheap: they stay exact."""

    mask: torch.Tensor  # (batch, 1, queries, n) bool, True where a query sees a key

    def to(self, *args, **kwargs) -> "WindowMask":
        return replace(self, mask=self.mask.to(*args, **kwargs))


@dataclass(eq=False)
class TensorMask(_Opaque):
    """Mask of the layers of a stock model that has tensor branches."""

    exact: torch.Tensor | None  # what "sdpa" would be given
    tokens: MultipoleMask | None  # for the tensor branch; None for layers with a window, which stay exact

    def to(self, *args, **kwargs) -> "TensorMask":
        exact = None if self.exact is None else self.exact.to(*args, **kwargs)
        return replace(self, exact=exact, tokens=None if self.tokens is None else self.tokens.to(*args, **kwargs))


def check_one_document(position_ids: torch.Tensor, real: torch.Tensor | None) -> None:
    """Raises ValueError where positions ``(batch or 1, n)`` go back from one real token to the next; real: ``(batch, n)`` bool, or all."""
    back = position_ids.diff(dim=1) <= 0
    if real is not None:
        back = back & (real[:, 1:] & real[:, :-1]).to(back.device)
    if back.any():
        raise ValueError(
            "position_ids start anew within a row, as those of packed documents do, which need use_cache=False, no past_key_values and no "
            "attention_mask; or give each document its own row"
        )


def asked_for(config) -> str:
    """What the user has to change, for messages."""
    return f"attn_implementation={implementation_of(config)!r}"


def refuse_cross_attention(config) -> None:
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"{asked_for(config)} does not support cross-attention, which this model has; use 'sdpa'")


def multipole_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    config=None,
    **kwargs,
) -> MultipoleMask | WindowMask:
    """Mask function of "multipole" for Transformers' mask interface.

    attention_mask: ``(batch, n)`` padding; from our own models, segment_ids ``(batch, n)`` of packed rows and position_ids
    ``(batch or 1, queries)``. Windows (``local_size``) give the mask of exact attention.

    Raises ValueError for patterns other than causal, bidirectional, windows and packed rows, for padding inside a row, and for parts of
    rows.
    """
    refuse_shards()
    causal = mask_function is causal_mask_function
    if not causal and mask_function is not bidirectional_mask_function:
        if kwargs.pop("local_size", None) is not None:
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
            return WindowMask(sdpa_mask(*sizes, mask_function=mask_function, attention_mask=attention_mask, **kwargs))
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{asked_for(config)} has no packed rows under torch.compile, and without an attention_mask Transformers "
                "takes all rows for packed: pass one, with ones for all tokens"
            )
        causal, segment_ids = True, packed_documents(mask_function)
        if segment_ids is None:
            raise ValueError(
                f"{asked_for(config)} has causal and bidirectional masks, with padding, and packed rows, but this model "
                f"asks for another pattern ({getattr(mask_function, '__qualname__', mask_function)}); use 'sdpa' for it"
            )
    refuse_cross_attention(config)
    # Static caches give their offset as a tensor, and hold keys of tokens that are still to come.
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            f"{asked_for(config)} needs the queries to be the last of the {kv_length} tokens of the keys: "
            "static caches and cross-attention are not supported; use a dynamic cache, or 'sdpa'"
        )
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but must be (batch, n): masks over pairs need 'sdpa'"
            )
        attention_mask = real_tokens(attention_mask[:, kv_offset : kv_offset + kv_length], q_length)
        if attention_mask.shape[1] != kv_length:
            raise ValueError(f"attention_mask has {attention_mask.shape[1]} tokens, but there are {kv_length} keys")
        # Not in a step of generation, whose cost must not grow with the length.
        if q_length == kv_length and not torch.compiler.is_compiling() and bool(attention_mask.all()):
            attention_mask = None
    block_size = multipole_options(config).block_size
    return MultipoleMask(causal, batch_size, q_length, kv_length, block_size, attention_mask, segment_ids, position_ids)

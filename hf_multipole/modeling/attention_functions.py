"""Multipole attention as an attention implementation of Transformers: the attention function and its mask function."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from .cache_multipole import NO_DROPOUT, OUT_OF_STEP, numbered
from .hierarchy import Alignment, align_rows, block_of, check_rows
from .multipole_attention import aligned_attention, check_sizes
from .state_multipole import MultipoleState, NewTokens
from .summaries import compute_dtype

# What other models pass for features that this attention does not have; None or False means that the feature is off.
_UNSUPPORTED = {
    "sliding_window": "the model passed it to a layer whose mask has no window; use 'sdpa'",
    "position_bias": "models with an additive position bias need 'eager' or 'sdpa'",
    "s_aux": "models with attention sinks need 'eager' or 'sdpa'",
    "head_mask": "prune heads instead",
}


@dataclass(eq=False)
class MultipoleMask:
    """What the mask function hands to every layer: the direction, and where padded or packed tokens lie.

    What is worked out of it is worked out once a forward, when the first layer asks for it.
    """

    causal: bool
    batch: int
    queries: int  # new tokens in a row
    length: int | None  # tokens in a row of keys; None where only a compiled step on a state will use it
    block_size: int
    attention_mask: torch.Tensor | None = None  # (batch, length) bool; None where there is no padding
    segment_ids: torch.Tensor | None = None  # (batch, length): documents of packed rows
    position_ids: torch.Tensor | None = None  # (batch or 1, queries)

    def to(self, *args, **kwargs) -> "MultipoleMask":
        given = {name: getattr(self, name) for name in ("attention_mask", "segment_ids", "position_ids")}
        moved = replace(self, **{name: x.to(*args, **kwargs) for name, x in given.items() if x is not None})
        if self._alignment is not None:
            moved._alignment = Alignment(*(x.to(*args, **kwargs) for x in self._alignment))
        return moved

    _alignment: Alignment | None = field(default=None, init=False, repr=False)
    _new_tokens: list[NewTokens] | None = field(default=None, init=False, repr=False)
    _past_checked: bool = field(default=False, init=False, repr=False)

    @property
    def alignment(self) -> Alignment | None:
        if self._alignment is None and not (self.attention_mask is None and self.segment_ids is None):
            if not torch.compiler.is_compiling():
                check_rows(self.attention_mask, self.segment_ids)
            self._alignment = align_rows(self.attention_mask, self.segment_ids, block_of(self.length, self.block_size))
        return self._alignment

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
class WindowMask:
    """Mask of the layers of a model that see a window only, which is cheap: they stay exact."""

    mask: torch.Tensor  # (batch, 1, queries, keys) bool, True where a query sees a key

    def to(self, *args, **kwargs) -> "WindowMask":
        return replace(self, mask=self.mask.to(*args, **kwargs))


def attention_options(config) -> dict:
    """The multipole options of a configuration: of our own models, or of ``config.multipole`` on others."""
    options = {"block_size": 64, "rank": 4, "size_weighting": True}
    if config.model_type == "multipole":
        return {name: getattr(config, name) for name in options}
    given = getattr(config, "multipole", None) or {}
    unknown = sorted(set(given) - set(options))
    if unknown:
        raise ValueError(f"config.multipole has {unknown[0]!r}, but the options are {', '.join(map(repr, options))}")
    options |= given
    check_sizes(options["block_size"], options["rank"])
    return options


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
    ``(batch or 1, queries)``.

    Raises ValueError for patterns other than causal and bidirectional, and for padding inside a row.
    """
    name = getattr(mask_function, "__name__", "a custom pattern")
    if name not in (causal_mask_function.__name__, bidirectional_mask_function.__name__):
        if kwargs.pop("local_size", None) is not None:
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
            return WindowMask(sdpa_mask(*sizes, mask_function=mask_function, attention_mask=attention_mask, **kwargs))
        raise ValueError(
            f"attn_implementation='multipole' has causal and bidirectional masks, with padding, but this model asks for {name!r} "
            "(packed rows or a custom pattern); use attn_implementation='sdpa' for it. Under torch.compile, rows "
            "without an attention_mask count as packed: pass one"
        )
    causal = name == causal_mask_function.__name__
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError("attn_implementation='multipole' does not support cross-attention, which this model has; use 'sdpa'")
    # Static caches give their offset as a tensor, and hold keys of tokens that are still to come.
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            f"attn_implementation='multipole' needs the queries to be the last of the {kv_length} tokens of the keys: "
            "static caches and cross-attention are not supported; use a dynamic cache, or 'sdpa'"
        )
    if attention_mask is not None:
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        if attention_mask.shape[1] != kv_length:
            raise ValueError(f"attention_mask has {attention_mask.shape[1]} tokens, but there are {kv_length} keys")
        # Not in a step of generation, whose cost must not grow with the length.
        if q_length == kv_length and not torch.compiler.is_compiling() and bool(attention_mask.all()):
            attention_mask = None
    block_size = attention_options(config)["block_size"]
    return MultipoleMask(causal, batch_size, q_length, kv_length, block_size, attention_mask, segment_ids, position_ids)


@torch.compiler.disable
def _attend_past(module, layer, q, k, v, mask: MultipoleMask, softcap, scale, rotary) -> torch.Tensor:
    """Attention on the state of a cache layer."""
    length = layer.get_seq_length()
    if mask.length != length + q.shape[2]:
        raise ValueError(OUT_OF_STEP)
    if layer.state is not None:
        mask.check_past(layer.state)
    options = _options(module, softcap, scale) | {"max_length": getattr(module.config, "max_position_embeddings", 1)}
    return layer.attend(q, k, v, mask.new_tokens, rotary=rotary, **options)


@torch.library.custom_op(__name__.replace(".", "_") + "::attend_state", mutates_args=("layer",))
def attend_state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    softcap: float | None,
    scale: float | None,
    layer: torch.Tensor,
    module: int,
    rotary: int | None,
) -> torch.Tensor:
    """Attention on a state from within compiled code, which names the cache layer, the attention module and the model that
    rotates its summaries by their numbers. That the layer changes is said of the tensor that holds its number.
    """
    state_layer, attention = numbered(int(layer)), numbered(module)
    seen = state_layer.get_seq_length()
    length = seen + q.shape[2] if attention_mask is None else attention_mask.shape[1]
    if length != seen + q.shape[2]:
        raise ValueError(f"attention_mask has {length} tokens, but the cache and the input have {seen} + {q.shape[2]}")
    block_size = attention_options(attention.config)["block_size"]
    mask = MultipoleMask(True, len(q), q.shape[2], length, block_size, attention_mask, None, position_ids)
    rotary = None if rotary is None else numbered(rotary).rotate_at
    return _attend_past(attention, state_layer, q, k, v, mask, softcap, scale, rotary).contiguous()


@attend_state.register_fake
def _(q, k, v, *_):
    return q.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.custom_op(__name__.replace(".", "_") + "::seen", mutates_args=())
def seen(layer: torch.Tensor) -> torch.Tensor:
    """Tokens that a cache layer has seen, ``()`` int64."""
    return torch.tensor(numbered(int(layer)).get_seq_length())


@seen.register_fake
def _(layer):
    return torch.empty((), dtype=torch.long)


def _options(module, softcap, scale, key_summary=None) -> dict:
    """What the attention depends on beside tokens and masks: learned parts are attributes of ``module``."""
    return attention_options(module.config) | {
        "key_summary": getattr(module, "key_summary", None) if key_summary is None else key_summary,
        "value_summary": getattr(module, "value_summary", None),
        "far_bias": getattr(module, "far_bias", None),
        "softcap": softcap,
        "scale": scale,
    }


def _window_attention(q, k, v, mask, dropout, scale, softcap, output_attentions):
    """Exact attention ``(batch, queries, heads, value_dim)`` of a layer with a window, and its weights if asked for."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if softcap is None and not output_attentions:
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        return out.transpose(1, 2).contiguous(), None
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1, dtype=compute_dtype(q.dtype)).to(q.dtype)
    # A padding query sees nothing.
    weights = nn.functional.dropout(weights.masked_fill(~mask, 0), dropout)
    return (weights @ v).transpose(1, 2).contiguous(), weights


def multipole_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MultipoleMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    far_keys: torch.Tensor | None = None,
    key_summary=None,
    output_attentions: bool | None = False,
    rotary=None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function of "multipole": see :func:`multipole_attention`; learned parts are attributes of ``module``.

    query: ``(batch, heads, queries, head_dim)``, key and value ``(batch, kv_heads, n, head_dim)``; or, with a generation state,
    key is the cache layer's PastTokens and value holds the new tokens.
    Returns the output ``(batch, queries, heads, head_dim)`` and, if asked for, the weights of tokens and summaries.
    """
    windowed = isinstance(attention_mask, WindowMask)
    for name, remedy in _UNSUPPORTED.items():
        if kwargs.get(name) is not None and not (windowed and name == "sliding_window"):
            raise ValueError(f"attn_implementation='multipole' does not support {name}: {remedy}")
    if windowed:
        return _window_attention(query, key, value, attention_mask.mask, dropout, scaling, softcap, output_attentions)
    if not isinstance(attention_mask, MultipoleMask):
        got = f"a mask of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, torch.Tensor) else repr(attention_mask)
        raise ValueError(
            f"attn_implementation='multipole' needs the mask that its own mask function makes, but the model passed {got}; "
            "masks over pairs of tokens are not supported, and models that make their own masks need 'sdpa'"
        )
    past = getattr(key, "layer", None)
    if past is None and attention_mask.length != key.shape[2]:
        raise ValueError(
            f"the mask is for {attention_mask.length} keys, but there are {key.shape[2]}: "
            "cross-attention and static caches are not supported by attn_implementation='multipole'"
        )
    if kwargs.get("is_causal") not in (None, attention_mask.causal) and query.shape[2] > 1:
        raise ValueError(
            f"is_causal={kwargs['is_causal']} contradicts the mask that the model made; set is_causal in the configuration instead"
        )
    if kwargs.get("cu_seq_lens_q") is not None and attention_mask.segment_ids is None:
        raise ValueError(
            "attn_implementation='multipole' supports packed rows (cu_seq_lens_q) in the multipole models only; "
            "give each document its own row, or use 'flash_attention_2'"
        )
    tokens = key if past is None else key.new
    if torch.is_autocast_enabled(query.device.type):
        query, tokens, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, tokens, value))
    if past is not None:
        if dropout:
            raise ValueError(NO_DROPOUT)
        if attention_mask.length is None:
            mask = attention_mask
            numbers = (past.number, module.number, None if rotary is None else rotary.__self__.number)
            out = attend_state(query, tokens, value, mask.attention_mask, mask.position_ids, softcap, scaling, *numbers)
        else:
            out = _attend_past(module, past, query, tokens, value, attention_mask, softcap, scaling, rotary)
        return out.transpose(1, 2).contiguous(), None
    out, weights = aligned_attention(
        query,
        tokens,
        value,
        attention_mask.alignment,
        far_keys=far_keys,
        causal=attention_mask.causal,
        dropout_p=dropout,
        return_weights=bool(output_attentions),
        **_options(module, softcap, scaling, key_summary),
    )
    return out.transpose(1, 2).contiguous(), weights


def register() -> None:
    """Makes "multipole" known to Transformers. Doing it again changes nothing: this file may also be loaded from a checkpoint, and
    masks must come from the same copy of it as the attention function, for models that are already there too.
    """
    if "multipole" not in AttentionInterface():
        AttentionInterface.register("multipole", multipole_attention_forward)
        AttentionMaskInterface.register("multipole", multipole_mask)


register()

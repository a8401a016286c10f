"""Multipole and tensor attention as attention implementations of Transformers: the attention functions."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from .attention_masks import MultipoleMask, TensorMask, WindowMask, asked_for, multipole_mask, refuse_cross_attention
from .calls import Call
from .configuration_multipole import has_tensor_options, multipole_options
from .hierarchy import level_count, real_tokens
from .learned import trained_length, trained_levels
from .multipole_attention import aligned_attention
from .multipole_cache import NO_DROPOUT, OUT_OF_STEP, numbered
from .tensor_attention import check_dropout, document_attention

logger = logging.get_logger(__name__)

# What other models pass for features that this attention does not have; None or False means that the feature is off.
_UNSUPPORTED = {
    "sliding_window": "the model passed it to a layer whose mask has no window; use 'sdpa'",
    "position_bias": "models with an additive position bias need 'eager' or 'sdpa'",
    "s_aux": "models with attention sinks need 'eager' or 'sdpa'",
    "sinks": "models with attention sinks need 'eager' or 'sdpa'",
    "indices": "models that choose single tokens need 'eager' or 'sdpa'",
    "block_indices": "models that choose single blocks need 'eager' or 'sdpa'",
    "head_mask": "prune heads instead",
}


def unsupported(arguments: dict, windowed: bool) -> str | None:
    """What a model's call asks for that this attention does not have, and what to do; None where there is nothing."""
    for name, remedy in _UNSUPPORTED.items():
        if arguments.get(name) is not None and not (windowed and name == "sliding_window"):
            return f"{name}: {remedy}"
    return None


class _Asked(NamedTuple):
    """What a layer's call asks for, beside its tokens and their mask."""

    dropout: float = 0.0
    scaling: float | None = None
    softcap: float | None = None
    output_attentions: bool = False
    downsample_queries: bool = False
    # Of our own models, where summaries are rotated:
    far_keys: torch.Tensor | None = None  # keys without positions
    key_summary: nn.Module | None = None  # which gives the summaries theirs
    rotary: Any = None  # the same for a state, the model's rotate_at


@torch.compiler.disable
def _attend_past(module, layer, q, k, v, mask: MultipoleMask, softcap, scale, rotary, downsample_queries) -> torch.Tensor:
    """Attention on the state of a cache layer."""
    length = layer.get_seq_length()
    if mask.length != length + q.shape[2]:
        raise ValueError(OUT_OF_STEP)
    if layer.state is not None:
        mask.check_past(layer.state)
    return layer.attend(q, k, v, mask.new_tokens, _call(module, q, v, mask.length, softcap, scale, downsample_queries), rotary)


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
    downsample_queries: bool,
) -> torch.Tensor:
    """Attention on a state from within compiled code, which names the cache layer, the attention module and the model that
    rotates its summaries by their numbers. That the layer changes is said of the tensor that holds its number.
    """
    state_layer, attention = numbered(int(layer)), numbered(module)
    seen = state_layer.get_seq_length()
    length = seen + q.shape[2] if attention_mask is None else attention_mask.shape[1]
    if length != seen + q.shape[2]:
        raise ValueError(f"attention_mask has {length} tokens, but the cache and the input have {seen} + {q.shape[2]}")
    block_size = attention.config.block_size
    attention_mask = None if attention_mask is None else real_tokens(attention_mask, q.shape[2])
    mask = MultipoleMask(True, len(q), q.shape[2], length, block_size, attention_mask, None, position_ids)
    rotary = None if rotary is None else numbered(rotary).rotate_at
    return _attend_past(attention, state_layer, q, k, v, mask, softcap, scale, rotary, downsample_queries).contiguous()


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


def _call(module, query, value, length: int, softcap, scale, downsample_queries: bool) -> Call:
    """What the attention of rows of up to ``length`` tokens depends on beside tokens and masks: without dropout, and causal."""
    options = multipole_options(module.config, downsample_queries)
    far_field = getattr(module, "far_field", None)
    if far_field is None and options.is_learned:
        raise ValueError(
            f"config.multipole asks for learned parts ({options.summary!r} summaries), which this model does not have: give them to it "
            "with hf_multipole.convert, and import hf_multipole before a converted model is loaded"
        )
    heads = getattr(far_field, "heads", query.shape[1])
    if heads != query.shape[1]:
        raise ValueError(f"the far field was learned for {heads} heads, but here are {query.shape[1]}: tensor parallelism is not supported")
    max_length = trained_length(module)
    max_levels = trained_levels(max_length, options.block_size) if far_field is None else far_field.max_levels
    longer = max_levels is not None and level_count(length, options.block_size) > max_levels
    if longer and not torch.compiler.is_compiling():
        logger.warning_once(
            f"a row is longer than those of training, {max_length} tokens (max_position_embeddings): what is farther away, but for sinks, "
            "takes no part in multipole attention. hf_multipole.extend_context(model, tokens) makes it a model for longer rows, to be "
            "trained on them"
        )
    far_bias, log_masses = (None, None) if far_field is None else far_field(value)
    return Call(
        options,
        key_summary=getattr(far_field, "key_summary", None),
        value_summary=getattr(far_field, "value_summary", None),
        query_summary=getattr(far_field, "query_summary", None),
        log_masses=log_masses,
        far_bias=far_bias,
        max_levels=max_levels,
        softcap=softcap,
        scale=scale,
    )


def _is_exact(module) -> bool:
    """Whether a stock model has left this layer exact."""
    stated = getattr(module.config, "multipole", None)
    if not isinstance(stated, dict) or stated.get("layers") is None:
        return False
    if getattr(module, "layer_idx", None) is None:
        raise ValueError(f"layers cannot be chosen in this model: its {type(module).__name__} has no layer number; leave 'layers' out")
    return module.layer_idx not in multipole_options(module.config).layers


def exact_attention(q, k, v, mask, causal, dropout, scale, softcap, output_attentions):
    """Exact attention ``(batch, queries, heads, value_dim)``, and its weights if asked for.

    mask: ``(batch or 1, 1, queries, n)`` bool, True where a query sees a key; None for all, or for what ``causal`` says.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if softcap is None and not output_attentions:
        causal = causal and mask is None and q.shape[2] > 1
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal)
        return out.transpose(1, 2).contiguous(), None
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril() if causal else mask
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    # A padding query sees nothing.
    weights = nn.functional.dropout(weights.masked_fill(~mask, 0), dropout)
    return (weights @ v).transpose(1, 2).contiguous(), weights


def _unmasked(module, query, key, is_causal: bool | None) -> MultipoleMask:
    """The mask of models that pass none, such as encoders of images, as Transformers understands it: no padding, and causal if the
    argument says so, or else the module.
    """
    refuse_cross_attention(module.config)
    if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__ or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{asked_for(module.config)} does not support cross-attention ({type(module).__name__}: {query.shape[2]} queries, "
            f"{key.shape[2]} keys), nor caches without a mask; use 'sdpa'"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    n, block_size = key.shape[2], multipole_options(module.config).block_size
    return MultipoleMask(bool(causal), len(query), n, n, block_size)


def _check_call(query, mask: MultipoleMask, is_causal=None, cu_seq_lens_q=None, position_ids=None, **kwargs) -> None:
    """Raises ValueError where arguments of a stock model's call contradict its mask."""
    if is_causal not in (None, mask.causal) and query.shape[2] > 1:
        raise ValueError(f"is_causal={is_causal} contradicts the mask that the model made; set is_causal in the configuration instead")
    if cu_seq_lens_q is not None and mask.segment_ids is None:
        raise ValueError(
            "packed rows need position_ids that start anew with each document beside cu_seq_lens_q, no attention_mask and "
            "use_cache=False; or give each document its own row"
        )
    if position_ids is not None:
        mask.check_positions(position_ids)


def _tell_of_windows(config) -> None:
    """Says once that nothing is approximated in a model all of whose layers have a sliding window."""
    kinds = getattr(config, "layer_types", None)
    if (kinds is None or "full_attention" not in kinds) and not torch.compiler.is_compiling():
        logger.warning_once(
            f"{asked_for(config)} changes nothing in this model ({config.model_type}): all of its layers have a sliding window, which is "
            "exact and stays so. sliding_window=None in its configuration lets them see the whole row"
        )


def _checked_mask(module, query, key, mask, past, kwargs: dict) -> MultipoleMask:
    """The mask of a layer that sees whole rows. Raises ValueError where it is not one, or not that of these tokens; past: a cache layer
    with a state, or None.
    """
    if mask is None and isinstance(key, torch.Tensor):
        mask = _unmasked(module, query, key, kwargs.get("is_causal"))
    if not isinstance(mask, MultipoleMask):
        got = f"a mask of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else repr(mask)
        raise ValueError(
            f"{asked_for(module.config)} needs the mask that its own mask function makes, but the model passed {got}; "
            "masks over pairs of tokens are not supported, and models that make their own masks need 'sdpa'"
        )
    if past is None and mask.length != key.shape[2]:
        raise ValueError(
            f"the mask is for {mask.length} keys, but there are {key.shape[2]}: "
            f"cross-attention and static caches are not supported by {asked_for(module.config)}"
        )
    _check_call(query, mask, **kwargs)
    return mask


def _in_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In the dtype of autocast, where that is on."""
    kind = tensors[0].device.type
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors) if torch.is_autocast_enabled(kind) else tensors


def _on_state(module, past, query, key, value, mask: MultipoleMask, asked: _Asked) -> torch.Tensor:
    """Attention on what a cache layer keeps, of plain or of compiled code."""
    if asked.dropout:
        raise ValueError(NO_DROPOUT)
    if asked.output_attentions:
        raise ValueError("a generation state has no attention weights: use the cache of all keys (DynamicCache) for output_attentions")
    rest = asked.softcap, asked.scaling
    if mask.length is not None:
        return _attend_past(module, past, query, key, value, mask, *rest, asked.rotary, asked.downsample_queries)
    numbers = past.number, module.number, None if asked.rotary is None else asked.rotary.__self__.number
    return attend_state(query, key, value, mask.attention_mask, mask.position_ids, *rest, *numbers, asked.downsample_queries)


def _refuse_thrown_caches(config) -> None:
    """Raises ValueError for models that do not keep the cache that they were given."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "longrope" in [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]:
        raise ValueError(
            f"{asked_for(config)} needs the queries of all tokens, or a state of them, but models with longrope rotations throw their "
            "cache away where the row passes original_max_position_embeddings: generate with use_cache=False, or with 'multipole'"
        )


def _on_rows(module, query, key, value, mask: MultipoleMask, asked: _Asked) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of whole rows, whose keys are all there, and its weights if asked for."""
    alignment, far_field = mask.alignment, getattr(module, "far_field", None)
    # Rows that are mostly padding have fewer levels than their length tells.
    longest = mask.length if alignment is None else min(mask.length, alignment.index.shape[1])
    if asked.downsample_queries and query.shape[2] < key.shape[2]:
        _refuse_thrown_caches(module.config)
    call = _call(module, query, value, longest, asked.softcap, asked.scaling, asked.downsample_queries)
    call = call._replace(causal=mask.causal, dropout_p=asked.dropout, key_summary=asked.key_summary or call.key_summary)
    out, weights = aligned_attention(query, key, value, alignment, call, asked.far_keys, asked.output_attentions)
    if torch.is_grad_enabled() and far_field is not None:
        out = far_field.keep_in_graph(out, longest)
    return out, weights


def multipole_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MultipoleMask | WindowMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    output_attentions: bool | None = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function of "multipole": see :func:`multipole_attention`; learned parts are in ``module.far_field``.

    query: ``(batch, heads, queries, head_dim)``, key and value ``(batch, kv_heads, n, head_dim)``; or, with a generation state,
    key is the cache layer's PastTokens and value holds the new tokens. kwargs: of our own models, the other fields of ``_Asked``.
    Returns the output ``(batch, queries, heads, head_dim)`` and, if asked for, the weights of tokens and summaries.
    """
    own = {name: kwargs.pop(name) for name in _Asked._fields if name in kwargs}
    asked = _Asked(dropout, scaling, softcap, bool(output_attentions), **own)
    windowed = isinstance(attention_mask, WindowMask)
    if refused := unsupported(kwargs, windowed):
        raise ValueError(f"{asked_for(module.config)} does not support {refused}")
    if windowed:
        _tell_of_windows(module.config)
        return exact_attention(query, key, value, attention_mask.mask, False, dropout, scaling, softcap, asked.output_attentions)
    past = getattr(key, "layer", None)
    mask = _checked_mask(module, query, key, attention_mask, past, kwargs)
    if _is_exact(module):
        if past is not None:
            raise ValueError("the cache was made for other layers than config.multipole['layers']: make it from this model's configuration")
        pairs = mask.pairs(query.device)
        return exact_attention(query, key, value, pairs, mask.causal, dropout, scaling, softcap, asked.output_attentions)
    given: Any = key
    query, key, value = _in_autocast(query, given if past is None else given.new, value)
    if past is not None:
        out, weights = _on_state(module, past, query, key, value, mask, asked), None
    else:
        out, weights = _on_rows(module, query, key, value, mask, asked)
    return out.transpose(1, 2).contiguous(), weights


def multipole_linear_attention_forward(module: torch.nn.Module, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function of "multipole_linear", the O(n) form of "multipole": see there."""
    return multipole_attention_forward(module, *args, downsample_queries=True, **kwargs)


_NOT_TENSOR = (
    "attn_implementation='tensor' is for layers with further keys and values, which this model does not have: use "
    'hf_multipole.convert(model, "tensor") for a stock model, the tensor_attention layers of MultipoleConfig(layer_types=...), or another '
    "implementation"
)


def tensor_mask(*args, config=None, **kwargs) -> MultipoleMask | TensorMask | WindowMask:
    """Mask function of "tensor": as :func:`multipole_mask`, for models that have tensor layers; for converted stock models, with what
    "sdpa" is given.
    """
    if "tensor_attention" in (getattr(config, "layer_types", None) or ()):
        return multipole_mask(*args, **kwargs | {"config": config})
    if not has_tensor_options(config):
        raise ValueError(_NOT_TENSOR)
    windowed = kwargs.get("local_size") is not None
    tokens: Any = None if windowed else multipole_mask(*args, **kwargs | {"config": config})
    return TensorMask(sdpa_mask(*args, **kwargs), tokens)


@torch.compiler.disable
def _attend_sums(module, layer, query, key, value, mask: MultipoleMask) -> torch.Tensor:
    """Attention on the sums that a cache layer keeps."""
    if mask.length != layer.get_seq_length() + query.shape[2]:
        raise ValueError(OUT_OF_STEP)
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = (torch.stack(x.chunk(module.indices, 1)).to(wide) for x in (key, value))
    out = layer.attend(query.to(wide), keys, values, mask.new_tokens, module.approximation(query.dtype))
    return out.to(query.dtype)


_NO_WEIGHTS = "output_attentions is not supported by tensor layers, which weigh tuples of tokens; leave it out"


def _branched_attention(module, query, key, value, mask, dropout, scaling, output_attentions, softcap=None, **kwargs):
    """Stock models that were converted to "tensor": exact attention, and what ``module.tensor_branch`` adds to it. Layers that were not
    chosen, and those with a window, are exact alone.

    Exact attention is that of "sdpa", to the bit, where that can do it: without a soft cap, and without weights.
    """
    branch, is_causal = getattr(module, "tensor_branch", None), kwargs.get("is_causal")
    if not has_tensor_options(module.config):
        raise ValueError(_NOT_TENSOR)
    if mask is None:
        mask = TensorMask(None, _unmasked(module, query, key, is_causal))
    if not isinstance(mask, TensorMask):
        raise ValueError("attn_implementation='tensor' needs the mask that its own mask function makes; masks over pairs need 'sdpa'")
    if branch is None and mask.tokens is not None and not _is_exact(module):
        raise ValueError(_NOT_TENSOR)
    if softcap is None and not output_attentions:
        out, weights = sdpa_attention_forward(module, query, key, value, mask.exact, dropout, scaling, **kwargs)
    else:
        causal = query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        out, weights = exact_attention(query, key, value, mask.exact, causal, dropout, scaling, softcap, output_attentions)
    if branch is None or mask.tokens is None:
        return out, weights
    if output_attentions:
        raise ValueError(_NO_WEIGHTS)
    _check_call(query, mask.tokens, **kwargs)
    return out + branch(query, key, value, mask.tokens.documents, mask.tokens.causal, dropout).to(out.dtype), None


def tensor_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MultipoleMask | TensorMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    output_attentions: bool | None = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function of "tensor": see :func:`tensor_attention`; its options are in ``module.options``.

    Transformers' interface has room for one key and one value. Those of all ``module.indices`` indices travel in them side by side,
    as heads: key ``(batch, indices * kv_heads, n, score_dim)`` and value ``(batch, indices * kv_heads, n, head_dim)``, the heads of
    the first index first. So caches, which know of heads but not of indices, keep them as they are.

    query: ``(batch, heads, queries, score_dim)``. n may be less than the tokens so far, where the cache kept a window; with a
    cache that keeps sums, key is its PastTokens and value holds the new tokens.
    In a stock model, whose cache keeps what its own attention needs, key and value have one index: the tensor branch of a converted
    layer makes those of the others out of them (:class:`TensorBranch`).
    Returns the output ``(batch, queries, heads, head_dim)``; no weights, except for the exact layers of stock models.
    """
    if not hasattr(module, "indices"):
        return _branched_attention(module, query, key, value, attention_mask, dropout, scaling, output_attentions, **kwargs)
    if output_attentions:
        raise ValueError(_NO_WEIGHTS)
    mask: Any = attention_mask
    if kwargs.get("cu_seq_lens_q") is not None and mask.segment_ids is None:
        raise ValueError("cu_seq_lens_q needs use_cache=False and no attention_mask in models with tensor layers")
    past = getattr(key, "layer", None)
    options: Any = module.options
    indices: Any = module.indices
    check_dropout(options, dropout)
    if past is not None:
        return _attend_sums(module, past, query, key.new, value, mask).transpose(1, 2).contiguous(), None
    query, key, value = _in_autocast(query, key, value)
    out = document_attention(
        query,
        key.chunk(indices, 1),
        value.chunk(indices, 1),
        None if mask.documents is None else mask.documents[:, -key.shape[2] :],
        options,
        causal=mask.causal,
        scale=scaling,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous(), None

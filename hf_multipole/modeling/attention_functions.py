"""Multipole attention as an attention implementation of Transformers: the attention function and its mask function."""

from dataclasses import dataclass, replace

import torch
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from .hierarchy import Alignment, align_rows, block_of, check_rows
from .multipole_attention import aligned_attention, check_sizes

# What other models pass for features that this attention does not have; None or False means that the feature is off.
_UNSUPPORTED = {
    "sliding_window": "use 'multipole' on full-attention models, or leave sliding-window layers to 'sdpa'",
    "position_bias": "models with an additive position bias need 'eager' or 'sdpa'",
    "s_aux": "models with attention sinks need 'eager' or 'sdpa'",
    "head_mask": "prune heads instead",
}


@dataclass(frozen=True)
class MultipoleMask:
    """What the mask function hands to every layer: the direction, and where padded or packed tokens lie."""

    causal: bool
    length: int  # tokens in a row of keys
    alignment: Alignment | None = None
    packed: bool = False  # the alignment keeps documents of one row apart

    def to(self, *args, **kwargs) -> "MultipoleMask":
        if self.alignment is None:
            return self
        return replace(self, alignment=Alignment(*(x.to(*args, **kwargs) for x in self.alignment)))


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
    config=None,
    **kwargs,
) -> MultipoleMask:
    """Mask function of "multipole" for Transformers' mask interface.

    attention_mask: ``(batch, n)`` padding; segment_ids: ``(batch, n)`` for packed rows, from our own models.

    Raises ValueError for patterns other than causal and bidirectional, and for padding inside a row.
    """
    name = getattr(mask_function, "__name__", "a custom pattern")
    if name not in (causal_mask_function.__name__, bidirectional_mask_function.__name__):
        raise ValueError(
            f"attn_implementation='multipole' has causal and bidirectional masks, with padding, but this model asks for {name!r} "
            "(a sliding window, packed rows or a custom pattern); use attn_implementation='sdpa' for it. Under torch.compile, rows "
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
        if not torch.compiler.is_compiling() and bool(attention_mask.all()):
            attention_mask = None
    if attention_mask is None and segment_ids is None:
        return MultipoleMask(causal, kv_length)
    if not torch.compiler.is_compiling():
        check_rows(attention_mask, segment_ids)
    block_size = block_of(kv_length, attention_options(config)["block_size"])
    return MultipoleMask(causal, kv_length, align_rows(attention_mask, segment_ids, block_size), segment_ids is not None)


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
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention function of "multipole": see :func:`multipole_attention`; learned parts are attributes of ``module``.

    query: ``(batch, heads, queries, head_dim)``, key and value ``(batch, kv_heads, n, head_dim)``.
    Returns the output ``(batch, queries, heads, head_dim)`` and, if asked for, the weights of tokens and summaries.
    """
    for name, remedy in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation='multipole' does not support {name}: {remedy}")
    if not isinstance(attention_mask, MultipoleMask):
        got = f"a mask of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, torch.Tensor) else repr(attention_mask)
        raise ValueError(
            f"attn_implementation='multipole' needs the mask that its own mask function makes, but the model passed {got}; "
            "masks over pairs of tokens are not supported, and models that make their own masks need 'sdpa'"
        )
    if attention_mask.length != key.shape[2]:
        raise ValueError(
            f"the mask is for {attention_mask.length} keys, but there are {key.shape[2]}: "
            "cross-attention and static caches are not supported by attn_implementation='multipole'"
        )
    if kwargs.get("is_causal") not in (None, attention_mask.causal) and query.shape[2] > 1:
        raise ValueError(
            f"is_causal={kwargs['is_causal']} contradicts the mask that the model made; set is_causal in the configuration instead"
        )
    if kwargs.get("cu_seq_lens_q") is not None and not attention_mask.packed:
        raise ValueError(
            "attn_implementation='multipole' supports packed rows (cu_seq_lens_q) in the multipole models only; "
            "give each document its own row, or use 'flash_attention_2'"
        )
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    out, weights = aligned_attention(
        query,
        key,
        value,
        attention_mask.alignment,
        **attention_options(module.config),
        key_summary=getattr(module, "key_summary", None) if key_summary is None else key_summary,
        value_summary=getattr(module, "value_summary", None),
        far_keys=far_keys,
        causal=attention_mask.causal,
        far_bias=getattr(module, "far_bias", None),
        softcap=softcap,
        scale=scaling,
        dropout_p=dropout,
        return_weights=bool(output_attentions),
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

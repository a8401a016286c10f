"""How far other attentions are from exact attention in a trained model: layer by layer, on a text."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..modeling.attention_functions import exact_attention, unsupported
from ..modeling.attention_masks import MultipoleMask, WindowMask, multipole_mask
from ..modeling.private import forget_implementation, implementation_of
from .conversion import attention_modules, is_chosen

_MEASUREMENT = "hf_multipole_measurement"


@contextmanager
def with_attention(model: PreTrainedModel, implementation: str, options: dict | None = None):
    """Runs a stock model with another attention implementation, and other options of multipole attention, for a while."""
    before = implementation_of(model.config), getattr(model.config, "multipole", None)
    model.config.multipole = options
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before[0])
        model.config.multipole = before[1]
        if before[1] is None:
            del model.config.multipole


@contextmanager
def _registered(model: PreTrainedModel, attention: Callable):
    """Runs a model with an attention function that nobody else knows of, for a while."""
    AttentionInterface.register(_MEASUREMENT, attention)
    AttentionMaskInterface.register(_MEASUREMENT, multipole_mask)
    try:
        with with_attention(model, _MEASUREMENT):
            yield
    finally:
        forget_implementation(_MEASUREMENT)


@contextmanager
def replaced_attention(model: PreTrainedModel, attend: Callable):
    """Runs a model with another attention in each of its layers that see the whole row, for a while; layers with a window stay exact.

    attend: ``(name, q, k, v, causal, scale) -> out``, with the name of the attention module, and all tensors ``(batch, heads, n, dim)``:
    of grouped keys and values, each head gets its own.

    While it lasts, the model raises ValueError for padding, packed rows, caches, dropout and what else ``attend`` is not told of.
    """
    names = {id(module): name for name, module in attention_modules(model).items()}

    def attention(module, query, key, value, mask, dropout=0.0, scaling=None, softcap=None, **kwargs):
        if refused := unsupported(kwargs, isinstance(mask, WindowMask)):
            raise ValueError(f"an attention that is replaced in each layer does not support {refused}")
        if isinstance(mask, WindowMask):
            return exact_attention(query, key, value, mask.mask, False, dropout, scaling, softcap, False)
        if not isinstance(mask, MultipoleMask) or mask.alignment is not None or query.shape[2] != key.shape[2] or dropout or softcap:
            raise ValueError(
                "an attention of each layer is replaced in whole rows: no padding, packed documents, caches, dropout, soft caps or masks "
                "over pairs of tokens"
            )
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(names[id(module)], query, key, value, mask.causal, scale)
        return out.transpose(1, 2).contiguous(), None

    with _registered(model, attention):
        yield


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel, input_ids: torch.Tensor, settings: Sequence[dict], implementation: str = "multipole"
) -> list[dict[str, float]]:
    """Relative errors of the attention output of each layer, for each of the ``settings`` (options of ``config.multipole``).

    The model runs with exact attention; beside it, multipole attention with means is computed from the same queries, keys and values.
    The error is the norm of the difference over the norm of the exact output, over all tokens and heads.

    model: a stock model that was not converted. input_ids: ``(batch, n)``, without padding. implementation: "multipole" or
    "multipole_linear".
    Returns, for each of the settings, the error of each attention module by its name.
    """
    names = {id(module): name for name, module in attention_modules(model).items() if is_chosen(module)}
    errors: list[dict[str, float]] = [{} for _ in settings]
    approximate = AttentionInterface()[implementation]

    def attend(module, query, key, value, mask, dropout=0.0, scaling=None, softcap=None, **kwargs):
        if not isinstance(mask, MultipoleMask):
            return approximate(module, query, key, value, mask, dropout, scaling, softcap, **kwargs)
        exact, _ = exact_attention(query, key, value, mask.pairs(query.device), mask.causal, 0.0, scaling, softcap, False)
        before = module.config.multipole
        try:
            for options, found in zip(settings, errors):
                module.config.multipole = options
                out, _ = approximate(module, query, key, value, mask, 0.0, scaling, softcap, **kwargs)
                found[names[id(module)]] = ((out - exact).norm() / exact.norm()).item()
        finally:
            module.config.multipole = before
        return exact, None

    with _registered(model, attend):
        model(input_ids, **({"use_cache": False} if model.can_generate() else {}))
    return errors


@torch.no_grad()
def token_masses(model: PreTrainedModel, **inputs: Any) -> dict[str, torch.Tensor]:
    """What each token weighs in the summaries of each layer: which tokens a model keeps, to be drawn, say, beside their attention weights.

    model: one with ``saliency=True``, own or converted. inputs: of its forward, ``input_ids`` at least; ``(batch, n)``.
    Returns, for the attention modules that have multipole attention, by their names, masses ``(batch, kv_heads, n)``: 1 is what all tokens
    weigh in a model that has learned nothing of them. Sinks, which are in no summary, have theirs all the same.

    Raises ValueError for a model without masses.
    """
    parts = {name.removesuffix(".far_field"): part for name, part in model.named_modules() if getattr(part, "saliency", None) is not None}
    if not parts:
        raise ValueError(f"{type(model).__name__} has no masses of tokens: make it, or convert it, with saliency=True")
    found: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda part, given, output: found.__setitem__(name, output[1].exp())

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    try:
        model(**inputs, **({"use_cache": False} if model.can_generate() else {}))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def loss(model: PreTrainedModel, input_ids: torch.Tensor, implementation: str, options: dict | None = None) -> float:
    """Mean next-token loss of a stock causal model, in nats, with an attention implementation."""
    with with_attention(model, implementation, options):
        return model(input_ids, labels=input_ids, use_cache=False).loss.item()

"""How far multipole attention is from exact attention in a stock model: layer by layer, on a text."""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..modeling.attention_functions import exact_attention
from ..modeling.attention_masks import MultipoleMask, multipole_mask
from .conversion import attention_modules, is_chosen

_MEASUREMENT = "hf_multipole_measurement"


@contextmanager
def with_attention(model: PreTrainedModel, implementation: str, options: dict | None = None):
    """Runs a stock model with another attention implementation, and other options of multipole attention, for a while."""
    before = model.config._attn_implementation, getattr(model.config, "multipole", None)
    model.config.multipole = options
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before[0])
        model.config.multipole = before[1]
        if before[1] is None:
            del model.config.multipole


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

    AttentionInterface.register(_MEASUREMENT, attend)
    AttentionMaskInterface.register(_MEASUREMENT, multipole_mask)
    try:
        with with_attention(model, _MEASUREMENT):
            model(input_ids, **({"use_cache": False} if model.can_generate() else {}))
    finally:
        del AttentionInterface._global_mapping[_MEASUREMENT], AttentionMaskInterface._global_mapping[_MEASUREMENT]
    return errors


@torch.no_grad()
def loss(model: PreTrainedModel, input_ids: torch.Tensor, implementation: str, options: dict | None = None) -> float:
    """Mean next-token loss of a stock causal model, in nats, with an attention implementation."""
    with with_attention(model, implementation, options):
        return model(input_ids, labels=input_ids, use_cache=False).loss.item()

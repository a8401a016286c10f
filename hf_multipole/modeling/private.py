"""What is used of Transformers and torch that is not their public interface, all of it: here, and nowhere else in this package's models.

Each was checked with Transformers 5.23.0 and 5.24.0 and torch 2.13.0; tests/modeling/test_private.py says what has to hold of them.
Transformers is imported by those that need it, because mathematical files know torch alone. Attributes with an underscore that every
model of Transformers states in its class (``_no_split_modules``, ``_tied_weights_keys``) are its interface to those who write models.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def implementation_of(config) -> str:
    """The name of the attention implementation that a model runs with: Transformers has no public one for it."""
    return config._attn_implementation


def set_implementation(config, name: str) -> None:
    """Makes a model run with another one, without the checks of ``set_attn_implementation``, which knows whole models only."""
    config._attn_implementation = name


def with_implementation(config, name: str):
    """A copy of a configuration for the mask functions of Transformers, which choose by its implementation. Not by the property, which
    would change the configurations inside of it, too.
    """
    config = copy.copy(config)
    config._attn_implementation_internal = name
    return config


def forget_implementation(name: str) -> None:
    """Takes an attention function and its mask function away again, for those that serve one measurement: there is ``register`` only."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


def allow_layer_types(names) -> None:
    """Adds to the kinds of layers that ``layer_types`` may hold. Trainer reads a checkpoint's config.json with the base class of
    configurations, which knows the kinds in these lists only.
    """
    from transformers import configuration_utils

    for listed in ("ALLOWED_ATTN_LAYER_TYPES", "ALLOWED_LAYER_TYPES"):
        known = getattr(configuration_utils, listed, ())
        setattr(configuration_utils, listed, known + tuple(name for name in names if name not in known))


def add_cache_layers(layer_type: str, dynamic: type, static: type) -> None:
    """The layers that DynamicCache and StaticCache make for a kind of layer. A class can name one kind itself, by an attribute that is
    private, too; two kinds may have one class.
    """
    from transformers import cache_utils

    cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[layer_type], cache_utils.STATIC_LAYER_TYPE_MAPPING[layer_type] = dynamic, static


def shift_labels_of(model_type: str, class_name: str) -> None:
    """Trainer knows by this list that labels are to be shifted, where it computes the loss (label smoothing)."""
    from transformers.models.auto import modeling_auto

    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = class_name


def before_post_init(callback: Callable[[nn.Module], None]) -> None:
    """Has ``callback(model)`` called whenever a model of Transformers, or one inside of another, has been built, before its weights are
    initialised or read: parts that a configuration asks for are put into it then, and no hook runs at any other time. Transformers'
    patch mapping of classes takes half a second of every loading, and leaves them replaced when a model fails to be built.
    """
    from transformers import PreTrainedModel

    post_init = PreTrainedModel.post_init

    @functools.wraps(post_init)
    def after_callback(self, *args, **kwargs):
        callback(self)
        return post_init(self, *args, **kwargs)

    PreTrainedModel.post_init = after_callback


def before_choice(callback: Callable[[type[nn.Module], str | None], None]) -> None:
    """Has ``callback(model class, name)`` called whenever a model is to run with an attention implementation, before it is built: some
    architectures look the name up in a table of their own, and would raise KeyError.
    """
    from transformers import PreTrainedModel

    choose = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(choose)
    def after_callback(self, requested_attention, *args, **kwargs):
        callback(type(self), requested_attention)
        return choose(self, requested_attention, *args, **kwargs)

    PreTrainedModel.get_correct_attn_implementation = after_callback


class LearnedPart(nn.Module):
    """What a converted model has more than the stock one. Its ``reset_parameters`` fills what a checkpoint lacks."""

    reset_parameters: Callable[[], None]

    # Transformers asks every module for this flag, runs the initialisation of the model on it, which in a stock model knows nothing
    # of this class, and sets the flag: the moment to fill parameters that the checkpoint lacked.
    @property
    def _is_hf_initialized(self) -> bool:
        return self.__dict__.get("_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        if value and not self._is_hf_initialized:
            self.reset_parameters()
        self.__dict__["_initialized"] = value


def mark_initialised(part: nn.Module) -> None:
    """Later calls of the initialisation of the model that holds a part leave it alone, as they do the rest of a model that is there."""
    module: Any
    for module in part.modules():
        module._is_hf_initialized = True


@functools.cache
def _examples() -> tuple[Callable, Callable, Callable | None]:
    """One each of the functions that a model's mask is put together from, by which they are known again."""
    from transformers import masking_utils
    from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

    # Since Transformers 5.23: positions within the documents, in which causal says the same as in the row.
    within = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    documents = torch.zeros(1, 1)
    return (
        and_masks(causal_mask_function),
        packed_sequence_mask_function(documents),
        None if within is None else within(causal_mask_function, documents),
    )


def _kept(function: Callable, made_like: Callable | None) -> dict:
    """What an inner function keeps of the one that made it; nothing where another one did."""
    if made_like is None or function.__code__ is not made_like.__code__:
        return {}
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))


def packed_documents(mask_function: Callable) -> torch.Tensor | None:
    """The documents ``(batch, n)`` of Transformers' causal pattern for packed rows; None where it is another pattern.

    Patterns are functions of pairs of tokens: that one says no more than "same document, not later" can only be seen from the
    functions that it was put together from.
    """
    from transformers.masking_utils import causal_mask_function

    both, packed, within = _examples()
    parts = list(_kept(mask_function, both).get("mask_functions", ()))
    documents = [kept["packed_sequence_mask"] for part in parts if (kept := _kept(part, packed))]
    causal = [part for part in parts if causal_mask_function in (part, _kept(part, within).get("mask_function"))]
    return documents[0] if len(documents) == len(causal) == 1 and len(parts) == 2 else None


def times_written(x: torch.Tensor) -> int:
    """How often a tensor was written to; not of inference tensors, which do not count."""
    return x._version


def softmax_backward(slope: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> None:
    """The gradient of a softmax over the last dimension, in place of that of its result, without a tensor more: torch has this for its
    own backward pass only.
    """
    torch.ops.aten._softmax_backward_data.out(slope, weights, -1, dtype, grad_input=slope)

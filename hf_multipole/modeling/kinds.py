"""The kinds of layers, in one table: what a layer of each is made of. Models, caches and Transformers' interfaces take it from here.

How to add one: hf_multipole/README.md.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .attention_functions import multipole_attention_forward, multipole_linear_attention_forward, tensor_attention_forward, tensor_mask
from .attention_masks import multipole_mask
from .configuration_multipole import MultipoleConfig, multipole_options
from .learned import FarField
from .multipole_cache import MultipoleLayer, MultipoleStaticLayer
from .private import add_cache_layers, implementation_of
from .tensor_cache import TensorLayer, TensorStaticLayer
from .tensor_layer import TensorAttention


class Kind(NamedTuple):
    """What a layer is made of. None: what exact attention has, in Transformers."""

    implementation: str | None = None  # the name of the attention function and the mask function in Transformers' interfaces
    attention: Callable | None = None
    mask: Callable | None = None
    cache: type[DynamicLayer] | None = None
    static_cache: type[StaticLayer] | None = None
    part: Callable[[MultipoleConfig], nn.Module] | None = None  # what a layer learns beside its projections, its attribute far_field
    layer: type[nn.Module] | None = None  # of layers that have projections of their own
    may_be_exact: bool = False  # whether exact attention, asked for by name ("sdpa"), takes the place of this one


def _far_field(shared_queries: bool, config: MultipoleConfig) -> FarField:
    options, queries = multipole_options(config, shared_queries), shared_queries and not config.is_causal
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return FarField(options, heads, kv_heads, config.head_dim, config.max_position_embeddings, queries)


KINDS = {
    "multipole_attention": Kind(
        implementation="multipole",
        attention=multipole_attention_forward,
        mask=multipole_mask,
        cache=MultipoleLayer,
        static_cache=MultipoleStaticLayer,
        part=partial(_far_field, False),
        may_be_exact=True,
    ),
    "multipole_linear_attention": Kind(
        implementation="multipole_linear",
        attention=multipole_linear_attention_forward,
        mask=multipole_mask,
        cache=MultipoleLayer,
        static_cache=MultipoleStaticLayer,
        part=partial(_far_field, True),
        may_be_exact=True,
    ),
    "tensor_attention": Kind(
        implementation="tensor",
        attention=tensor_attention_forward,
        mask=tensor_mask,
        cache=TensorLayer,
        static_cache=TensorStaticLayer,
        layer=TensorAttention,
    ),
    "full_attention": Kind(),
}
BY_IMPLEMENTATION = {kind.implementation: kind for kind in KINDS.values() if kind.implementation is not None}


def layer_implementation(config: MultipoleConfig, layer_type: str, output_attentions: bool) -> str:
    """The attention function of a layer, by its name: that of its kind, or the exact one that is asked for."""
    kind, asked = KINDS[layer_type], implementation_of(config)
    if kind.implementation is not None and not (kind.may_be_exact and asked not in ("multipole", "multipole_linear")):
        return kind.implementation
    if kind.implementation is None and asked in BY_IMPLEMENTATION:
        asked = "sdpa"
    # The same attention, but with its weights.
    return "eager" if output_attentions and asked == "sdpa" else asked


def register() -> None:
    """Makes the kinds known to Transformers: attention functions, masks and cache layers. Doing it again changes no function: this file
    may also be loaded from a checkpoint, and masks must come from the same copy of it as the attention function, for models that are
    already there too.

    Raises ValueError where another package has taken a name.
    """
    for name, kind in BY_IMPLEMENTATION.items():
        there = AttentionInterface().get(name)
        if there is None:
            AttentionInterface.register(name, kind.attention)
            AttentionMaskInterface.register(name, kind.mask)
        elif there.__qualname__ != kind.attention.__qualname__:
            raise ValueError(
                f"another package has registered {there.__module__}.{there.__qualname__} as the attention implementation {name!r}: "
                "import hf_multipole without it"
            )
    for name, kind in KINDS.items():
        if kind.cache is not None:
            add_cache_layers(name, kind.cache, kind.static_cache)


register()

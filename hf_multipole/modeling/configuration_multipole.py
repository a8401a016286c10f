"""Configuration of the multipole models, and the options of attention in a configuration of any model."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .options import MultipoleOptions, TensorOptions, default_of, described, fields_of
from .polynomial_attention import TOLERANCE, approximate
from .private import allow_layer_types

MULTIPOLE_LAYERS = ("multipole_attention", "multipole_linear_attention")
LAYER_TYPES = (*MULTIPOLE_LAYERS, "full_attention", "tensor_attention")
allow_layer_types(LAYER_TYPES)

# Every head is entered, not only the one that is saved: a causal checkpoint can be loaded under another one.
AUTO_MAP = {
    "AutoConfig": "configuration_multipole.MultipoleConfig",
    "AutoModel": "modeling_multipole.MultipoleModel",
    "AutoModelForCausalLM": "modeling_multipole.MultipoleForCausalLM",
    "AutoModelForMaskedLM": "modeling_multipole.MultipoleForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_multipole.MultipoleForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_multipole.MultipoleForTokenClassification",
}
_OWN = {cls: tuple(fields_of("own", cls)) for cls in (MultipoleOptions, TensorOptions)}
_STOCK = tuple(fields_of("stock"))
_STOCK_MULTIPOLE = {name: default_of(f, "stock") for name, f in fields_of("stock", MultipoleOptions).items()}
# What models do that were saved before there were these options.
_WITHOUT_SINKS = {"sink_tokens": 0, "saliency": False}
_TENSOR = tuple(fields_of("stock", TensorOptions))
# Options that were found good, by the text of what they were made from: they are checked once, and what a user changes in a
# configuration counts from then on.
_checked: dict[str, MultipoleOptions | TensorOptions] = {}


def _once(make, *given):
    """``make(*given)``, made once for each text of what is given."""
    if torch.compiler.is_compiling():
        return make(*given)
    key = f"{make.__name__} {given!r}"
    if key not in _checked:
        _checked[key] = make(*given)
    return _checked[key]


def _stated(config: PreTrainedConfig, cls: type[MultipoleOptions] | type[TensorOptions]) -> dict:
    """What a configuration says, by outside names: the fields of our own, or ``config.multipole`` of others."""
    if config.model_type == "multipole":
        return {name: getattr(config, name) for name in _OWN[cls]}
    return getattr(config, "multipole", None) or {}


def multipole_options(config: PreTrainedConfig, downsample_queries: bool | None = None) -> MultipoleOptions:
    """The options of multipole attention in a configuration: the fields of our own, or ``config.multipole`` of others, with their
    ``downsample_queries`` unless it is given.

    Raises ValueError for an option that is unknown or out of range.
    """
    stated = _stated(config, MultipoleOptions)
    if config.model_type == "multipole":
        return _once(_own_options, stated, bool(downsample_queries))
    return _once(_stock_options, stated, config.num_hidden_layers, downsample_queries)


def _own_options(stated: dict, downsample_queries: bool) -> MultipoleOptions:
    return MultipoleOptions.of(stated | {"downsample_queries": downsample_queries})


def _stock_options(stated: dict, num_layers: int, downsample_queries: bool | None) -> MultipoleOptions:
    if not isinstance(stated, dict):
        raise ValueError(f"config.multipole is {stated!r}, but must be a dict such as {{'block_size': 64, 'rank': 4}}")
    for name in stated:
        if name not in _STOCK:
            raise ValueError(f"config.multipole has {name!r}, but the options are {', '.join(map(repr, _STOCK))}")
    layers = stated.get("layers")
    if layers is not None:
        numbers = range(num_layers)
        wrong = [x for x in layers if isinstance(x, bool) or x not in numbers] if isinstance(layers, list | tuple) else [layers]
        if wrong or not layers:
            raise ValueError(f"layers is {layers!r}, but must be a list of layer numbers from 0 to {numbers[-1]}, or None for all")
    # A conversion states all options; one that does not state these is of a version that had no others.
    old = set(_STOCK_MULTIPOLE) - set(stated) == set(_WITHOUT_SINKS)
    options = MultipoleOptions.of(_STOCK_MULTIPOLE | stated | (_WITHOUT_SINKS if old else {}))
    if options.is_learned and any(name in _TENSOR for name in stated):
        raise ValueError(
            "config.multipole asks for learned parts of multipole attention and, by its tensor_* options, for a tensor branch: a model has "
            "one or the other"
        )
    return options if downsample_queries is None else dataclasses.replace(options, downsample_queries=downsample_queries)


def has_tensor_options(config: PreTrainedConfig) -> bool:
    """Whether the configuration of a model of another kind asks for a tensor branch."""
    return config.model_type != "multipole" and any(name in _TENSOR for name in getattr(config, "multipole", None) or ())


def tensor_options(config: PreTrainedConfig, head_dim: int) -> TensorOptions:
    """The options of tensor attention in a configuration, all of them: the fields of our own, or those in ``config.multipole`` of others.

    Raises ValueError for an option that is unknown or out of range.
    """
    if config.model_type != "multipole":
        multipole_options(config)
    return _once(_tensor_options, _stated(config, TensorOptions), head_dim)


def _tensor_options(stated: dict, head_dim: int) -> TensorOptions:
    return TensorOptions.of(stated).completed(head_dim)


def check_polynomial(options: TensorOptions) -> None:
    """Raises ValueError where there is no polynomial for the bound on the entries. options: completed."""
    if options.method != "polynomial":
        return
    score_dim = options.score_dim
    try:
        approximate(score_dim, options.order, score_dim**-0.5, options.entry_bound, options.degree, TOLERANCE, torch.float32)
    except ValueError as error:
        reason = str(error).split(": ")[0]
        raise ValueError(
            f"{reason}: take a smaller tensor_entry_bound or tensor_score_dim, another tensor_degree, or tensor_method='exact'"
        ) from None


_AttentionFields: Any = dataclasses.make_dataclass(
    "_AttentionFields", [(name, f.type, default_of(f, "own")) for name, f in fields_of("own").items()], kw_only=True
)


@strict
class MultipoleConfig(PreTrainedConfig, _AttentionFields):
    __doc__ = rf"""Configuration of a pre-norm transformer (RMSNorm, rotary positions, gated MLP, grouped-query attention) whose layers use
    fast multipole attention (arXiv 2310.11960), tensor attention (arXiv 2310.04064) or exact attention.

    Args:
        is_causal: True for a decoder; False for an encoder, in which every token sees both sides.
        layer_types: kind of attention of each layer, "multipole_attention" (O(n log n)), "multipole_linear_attention" (O(n): tokens of
            a segment share their far field), "tensor_attention" or "full_attention"; all "multipole_attention" by default.
            ``["multipole_attention"] * 3 + ["tensor_attention"]``, repeated, makes every fourth one a tensor layer.
        max_position_embeddings: tokens of the longest rows of training. Longer ones are read, too: the levels that they add take no part
            in attention, which reaches as far as in training. State what training has: a length that it never reaches is taken for
            trained. :func:`extend_context` makes it longer.
        {described("own")}

    The other arguments are those of Llama and Qwen3.

    Example:

    ```python
    >>> from hf_multipole import MultipoleConfig, MultipoleForCausalLM
    >>> model = MultipoleForCausalLM(MultipoleConfig(vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4))
    ```
    """

    model_type = "multipole"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 16384
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    is_causal: bool = True
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        for name in sizes:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}: "
                    "change one of them, or give a head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            # The gated MLP has three matrices: 8 / 3 keeps the parameters of the usual factor 4, in multiples of 32.
            self.intermediate_size = -(-8 * self.hidden_size // 3 // 32) * 32
        for name, value in tensor_options(self, self.head_dim).outside("own").items():
            setattr(self, name, value)
        if self.layer_types is None:
            self.layer_types = ["multipole_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """The configuration that was saved as a dict, in which all options are stated that there were."""
        return super().from_dict(_WITHOUT_SINKS | config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """Saves the code of the models, too, which is entered in ``auto_map``, so that what is saved loads without this package
        (``trust_remote_code=True``). A model that is saved saves its configuration.
        """
        code = Path(__file__).with_name("modeling_multipole.py")
        if not code.is_file():
            # Loaded with its code, which Transformers keeps apart for each class, and saves.
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        before = self.__dict__.get("auto_map")
        self.auto_map = dict(AUTO_MAP)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            if before is None:
                del self.auto_map
            else:
                self.auto_map = before
        for file in (code, *get_relative_import_files(code)):
            shutil.copy(file, save_directory)

    @property
    def output_attentions(self):
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool):
        # Transformers would turn to eager, that is exact, attention here; multipole attention gives its own weights.
        self._output_attentions = value

    def validate_output_attentions(self):
        """Every attention implementation of these models gives its weights."""

    def validate_layer_type(self):
        """Part of the strict validation: the kinds of layers."""
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"layer_types has {unknown[0]!r}, but the kinds are {', '.join(map(repr, LAYER_TYPES))}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries, but num_hidden_layers is {self.num_hidden_layers}")

    def validate_multipole(self):
        """Part of the strict validation: sizes that must fit each other."""
        multipole_options(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, which Transformers does not have")
        rope = self.rope_parameters or {}
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(f"rope_type is {rope_type!r}, but must be one of 'default', {', '.join(map(repr, ROPE_INIT_FUNCTIONS))}")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError("rope_parameters have a partial_rotary_factor, but these models rotate whole heads: leave it out")
        if rope_type != "default":
            try:
                ROPE_INIT_FUNCTIONS[rope_type](self)
            except KeyError as error:
                raise ValueError(f"rope_parameters of rope_type {rope_type!r} need {error}") from None
        if self.rotate_summaries and rope_type in ("dynamic", "longrope"):
            raise ValueError(f"rotate_summaries needs rotations that do not depend on the length, but rope_type is {rope_type!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions need an even one")

    def validate_tensor(self):
        """Part of the strict validation: options of tensor layers, and that there is a polynomial for their bound."""
        options = tensor_options(self, self.head_dim)
        if "tensor_attention" not in self.layer_types:
            return
        if self.tensor_method == "polynomial" and self.attention_dropout:
            raise ValueError(
                f"attention_dropout is {self.attention_dropout}, but tensor_method='polynomial' has no single weights to drop: set it to 0"
            )
        check_polynomial(options)


__all__ = ["MultipoleConfig"]

"""Configuration of the multipole models."""

import math

import torch
from huggingface_hub.dataclasses import strict
from transformers import configuration_utils
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .options import MultipoleOptions
from .polynomial_attention import TOLERANCE, approximate
from .tensor_attention import check_options

MULTIPOLE_LAYERS = ("multipole_attention", "multipole_linear_attention")
LAYER_TYPES = (*MULTIPOLE_LAYERS, "full_attention", "tensor_attention")
# Trainer reads a checkpoint's config.json with the base class, which knows the kinds in these lists only.
for _names in ("ALLOWED_ATTN_LAYER_TYPES", "ALLOWED_LAYER_TYPES"):
    _known = getattr(configuration_utils, _names, ())
    setattr(configuration_utils, _names, _known + tuple(kind for kind in LAYER_TYPES if kind not in _known))
SUMMARIES = ("hierarchical", "direct", "mean")
# Options of ``config.multipole`` on models of other kinds, and their defaults: means of groups, in all layers without a window.
# downsample_queries: what convert notes for "multipole_linear", of which there may be learned summaries of queries.
STOCK_OPTIONS = {"block_size": 64, "rank": 4, "summary": "mean", "size_weighting": True, "far_bias_init": None, "layers": None}
STOCK_OPTIONS |= {"downsample_queries": False}
# Those of tensor attention, which have the same names in both; one of them in ``config.multipole`` asks for a tensor branch.
TENSOR_OPTIONS = {
    "tensor_order": 3,
    "tensor_method": "exact",
    "tensor_window": None,
    "tensor_degree": None,
    "tensor_entry_bound": None,
    "tensor_score_dim": None,
}


def attention_options(config: PreTrainedConfig) -> dict:
    """The options of multipole attention in a configuration: the fields of our own, or ``config.multipole`` of others.

    Raises ValueError for an option that is unknown or out of range.
    """
    if config.model_type == "multipole":
        return {name: getattr(config, name) for name in ("block_size", "rank", "summary", "size_weighting", "far_bias_init")} | {
            "layers": None
        }
    given = getattr(config, "multipole", None) or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.multipole is {given!r}, but must be a dict such as {{'block_size': 64, 'rank': 4}}")
    unknown = sorted(set(given) - set(STOCK_OPTIONS | TENSOR_OPTIONS))
    if unknown:
        names = ", ".join(map(repr, STOCK_OPTIONS | TENSOR_OPTIONS))
        raise ValueError(f"config.multipole has {unknown[0]!r}, but the options are {names}")
    options = STOCK_OPTIONS | {name: value for name, value in given.items() if name in STOCK_OPTIONS}
    MultipoleOptions(block_size=options["block_size"], rank=options["rank"])
    if options["summary"] not in SUMMARIES:
        raise ValueError(f"summary is {options['summary']!r}, but must be one of {', '.join(map(repr, SUMMARIES))}")
    for name in ("size_weighting", "downsample_queries"):
        if not isinstance(options[name], bool):
            raise ValueError(f"{name} is {options[name]!r}, but must be true or false")
    bias = options["far_bias_init"]
    if bias is not None and (isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias)):
        raise ValueError(f"far_bias_init is {bias!r}, but must be a finite number, or None for no bias")
    layers = options["layers"]
    if layers is not None:
        numbers = range(config.num_hidden_layers)
        wrong = [x for x in layers if isinstance(x, bool) or x not in numbers] if isinstance(layers, list | tuple) else [layers]
        if wrong or not layers:
            raise ValueError(f"layers is {layers!r}, but must be a list of layer numbers from 0 to {numbers[-1]}, or None for all")
    if has_tensor_options(config) and (options["summary"] != "mean" or bias is not None):
        raise ValueError(
            "config.multipole asks for learned parts of multipole attention and, by its tensor_* options, for a tensor branch: a model has "
            "one or the other"
        )
    return options


def has_tensor_options(config: PreTrainedConfig) -> bool:
    """Whether the configuration of a model of another kind asks for a tensor branch."""
    return config.model_type != "multipole" and any(name in TENSOR_OPTIONS for name in getattr(config, "multipole", None) or ())


def tensor_options(config: PreTrainedConfig, head_dim: int) -> dict:
    """The options of tensor attention in ``config.multipole``, all of them.

    Raises ValueError for an option that is unknown or out of range.
    """
    attention_options(config)
    options = _complete_tensor_options(
        TENSOR_OPTIONS | {name: x for name, x in config.multipole.items() if name in TENSOR_OPTIONS}, head_dim
    )
    _check_tensor_options(options)
    _check_polynomial(options)
    return options


def _complete_tensor_options(options: dict, head_dim: int) -> dict:
    """With the defaults that depend on other options."""
    polynomial, window = options["tensor_method"] == "polynomial", options["tensor_window"]
    completed = {
        "tensor_score_dim": 8 if polynomial else head_dim,
        # With a score_dim of 8 and order 3, a degree of 4 and 495 features.
        "tensor_entry_bound": 0.7 if polynomial else None,
    }
    completed = {name: value if options[name] is None else options[name] for name, value in completed.items()}
    return options | completed | {"tensor_window": list(window) if isinstance(window, tuple) else window}


def _check_tensor_options(options: dict) -> None:
    for name, least in (("tensor_order", 2), ("tensor_score_dim", 1)):
        if isinstance(options[name], bool) or not isinstance(options[name], int) or options[name] < least:
            raise ValueError(f"{name} is {options[name]!r}, but must be {'positive' if least == 1 else f'at least {least}'}")
    bound = options["tensor_entry_bound"]
    if bound is not None and not (isinstance(bound, int | float) and 0 < bound < math.inf):
        raise ValueError(f"tensor_entry_bound is {bound!r}, but must be a positive number, or None")
    try:
        check_options(options["tensor_order"] - 1, options["tensor_method"], options["tensor_window"], degree=options["tensor_degree"])
    except ValueError as error:
        raise ValueError(f"tensor_{error}") from None


def _check_polynomial(options: dict) -> None:
    """Raises ValueError where there is no polynomial for the bound on the entries."""
    if options["tensor_method"] != "polynomial":
        return
    score_dim, bound = options["tensor_score_dim"], options["tensor_entry_bound"]
    try:
        approximate(score_dim, options["tensor_order"], score_dim**-0.5, bound, options["tensor_degree"], TOLERANCE, torch.float32)
    except ValueError as error:
        reason = str(error).split(": ")[0]
        raise ValueError(
            f"{reason}: take a smaller tensor_entry_bound or tensor_score_dim, another tensor_degree, or tensor_method='exact'"
        ) from None


@strict
class MultipoleConfig(PreTrainedConfig):
    r"""Configuration of a pre-norm transformer (RMSNorm, rotary positions, gated MLP, grouped-query attention) whose layers use
    fast multipole attention (arXiv 2310.11960), tensor attention (arXiv 2310.04064) or exact attention.

    Args:
        is_causal: True for a decoder; False for an encoder, in which every token sees both sides.
        layer_types: kind of attention of each layer, "multipole_attention" (O(n log n)), "multipole_linear_attention" (O(n): tokens of
            a segment share their far field), "tensor_attention" or "full_attention"; all "multipole_attention" by default.
            ``["multipole_attention"] * 3 + ["tensor_attention"]``, repeated, makes every fourth one a tensor layer.
        block_size: tokens in a block of the exact near field, and in a group of the first level.
        rank: summaries of each far group; divides block_size.
        summary: how groups are summarised: "hierarchical" (learned, any length), "direct" (learned for each level, as in the
            paper; at most max_position_embeddings tokens) or "mean" (nothing learned).
        size_weighting: adds log(c) to the logit of a summary that stands for c tokens.
        far_bias_init: start of the learned bias of the far logits, one for each head and level; None for no bias. Well below 0,
            the far field does not drown the near one before its summaries mean something.
        max_position_embeddings: tokens of the longest rows of training. Longer ones are read, too: the levels that they add take no part
            in attention, which reaches as far as in training. State what training has: a length that it never reaches is taken for
            trained. :func:`extend_context` makes it longer.
        rotate_summaries: keys are summarised before the rotary embedding, and each summary is rotated at its segment's centre.
            Otherwise the rotated keys are summarised. Queries are summarised after their rotation in any case.
        tensor_order: tokens that a score of a tensor layer joins, the query among them: 3 for pairs of keys, 2 for ordinary attention.
        tensor_method: "exact" or "polynomial" (O(n), for bounded entries; see :func:`tensor_attention`).
        tensor_window: for each of the ``tensor_order - 1`` indices, how many tokens it may take, or None for all; for the exact
            method, which takes O(n ** tensor_order) time without.
        tensor_degree: of the polynomial; by default the least one with a relative error of at most 1e-3.
        tensor_entry_bound: queries and keys of tensor layers are normalised, with a learned gain, so that no entry exceeds it. 0.7
            by default for the polynomial, which needs one; None leaves them as they are.
        tensor_score_dim: width of queries and keys of tensor layers. By default 8 for the polynomial, whose features are
            C(tensor_score_dim + degree, degree), and head_dim otherwise. Scores are scaled by its inverse square root.

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
    block_size: int = 64
    rank: int = 4
    summary: str = "hierarchical"
    size_weighting: bool = True
    far_bias_init: float | int | None = -10.0
    rotate_summaries: bool = False
    tensor_order: int = 3
    tensor_method: str = "exact"
    tensor_window: list | tuple | None = None
    tensor_degree: int | None = None
    tensor_entry_bound: float | int | None = None
    tensor_score_dim: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        for name in (*sizes, "tensor_score_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            # The gated MLP has three matrices: 8 / 3 keeps the parameters of the usual factor 4, in multiples of 32.
            self.intermediate_size = -(-8 * self.hidden_size // 3 // 32) * 32
        for name, value in _complete_tensor_options(self._tensor_options(), self.head_dim).items():
            setattr(self, name, value)
        if self.layer_types is None:
            self.layer_types = ["multipole_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

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
        MultipoleOptions(block_size=self.block_size, rank=self.rank)
        if self.summary not in SUMMARIES:
            raise ValueError(f"summary is {self.summary!r}, but must be one of {', '.join(map(repr, SUMMARIES))}")
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
        options = self._tensor_options()
        _check_tensor_options(options)
        if "tensor_attention" not in self.layer_types:
            return
        if self.tensor_method == "polynomial" and self.attention_dropout:
            raise ValueError(
                f"attention_dropout is {self.attention_dropout}, but tensor_method='polynomial' has no single weights to drop: set it to 0"
            )
        _check_polynomial(options)

    def _tensor_options(self) -> dict:
        return {name: getattr(self, name) for name in TENSOR_OPTIONS}


__all__ = ["MultipoleConfig"]

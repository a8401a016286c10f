"""Stock models with learned summaries, or with a tensor branch: given to their attention modules, saved and loaded with them, and taken
away again.

The classes of a stock model stay what they are; an attention module gets one part more, ``far_field`` or ``tensor_branch``. When a model
is built whose configuration is that of a converted one, to load a checkpoint for instance, the attention modules get it at the end of the
constructor, so that the part is there before the weights are read.
"""

import inspect
import operator
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling.attention_masks import refuse_cross_attention
from ..modeling.configuration_multipole import check_polynomial, has_tensor_options, multipole_options, tensor_options
from ..modeling.learned import FarField, trained_length
from ..modeling.options import MultipoleOptions, TensorOptions, default_of, fields_of, nearest, takes_options
from ..modeling.private import before_choice, before_post_init, implementation_of, mark_initialised, set_implementation
from .tensor_branch import TensorBranch

logger = logging.get_logger(__name__)

# What a model can be converted to, O(n log n) or O(n) multipole attention or a tensor branch, and what its attention modules get for it.
KINDS = {"multipole": "far_field", "multipole_linear": "far_field", "tensor": "tensor_branch"}
# What config.multipole says of options that were not given.
_STOCK = {
    kind: {name: default_of(f, "stock") for name, f in fields_of("stock", TensorOptions if kind == "tensor" else MultipoleOptions).items()}
    for kind in KINDS
}

# Classes of attention modules that can be converted: one row (query, key, value) through the attention interface, heads and
# head_dim those of the configuration. scripts/studies/support.py runs each of them.
ATTENTION_CLASSES = (
    "ArceeAttention",
    "BertSelfAttention",
    "CamembertSelfAttention",
    "Cohere2Attention",
    "CohereAttention",
    "DeiTAttention",
    "Dinov2Attention",
    "DistilBertSelfAttention",
    "ElectraSelfAttention",
    "Ernie4_5Attention",
    "EuroBertAttention",
    "Exaone4Attention",
    "GPT2Attention",
    "GPTNeoXAttention",
    "Gemma2Attention",
    "Gemma3Attention",
    "GemmaAttention",
    "Glm4Attention",
    "GlmAttention",
    "GraniteAttention",
    "HeliumAttention",
    "LlamaAttention",
    "Ministral3Attention",
    "MistralAttention",
    "MixtralAttention",
    "ModernBertAttention",
    "NanoChatAttention",
    "OPTAttention",
    "Olmo2Attention",
    "Olmo3Attention",
    "OlmoAttention",
    "OlmoeAttention",
    "Phi3Attention",
    "PhiAttention",
    "Qwen2Attention",
    "Qwen2MoeAttention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
    "RobertaSelfAttention",
    "SeedOssAttention",
    "SmolLM3Attention",
    "StableLmAttention",
    "Starcoder2Attention",
    "VaultGemmaAttention",
    "ViTAttention",
)


def _complete(model: PreTrainedModel) -> None:
    """Called for every model of Transformers, and every one inside of another, when it has been built."""
    for module in model.modules():
        if type(module).__name__ not in ATTENTION_CLASSES or not _is_stock(module) or _is_converted(module):
            continue
        _give_part(module)
        kind, runs = _kind_of(module.config), implementation_of(module.config)
        # Learned summaries serve both forms of multipole attention.
        if _is_converted(module) and KINDS.get(runs) != KINDS[kind]:
            learned = "tensor branches" if kind == "tensor" else "learned summaries"
            logger.warning_once(
                f"the model was converted to {kind} attention, but runs with {runs!r}, without its "
                f"{learned}: pass attn_implementation={kind!r} if this was not your choice"
            )
    _tell_of_options(model)


def _tell_of_options(model: PreTrainedModel) -> None:
    """Says once that ``config.multipole`` is not used, which a checkpoint has kept, but not the implementation that reads it."""
    config: Any = model.config
    if config.model_type == "multipole" or not getattr(config, "multipole", None) or implementation_of(config) in KINDS:
        return
    if not any(_is_converted(module) for module in model.modules()):
        logger.warning_once(
            f"config.multipole has options of multipole attention, but the model runs with {implementation_of(config)!r}, which does not "
            "read them: pass attn_implementation='multipole' if this was not your choice"
        )


def _is_converted(module: nn.Module) -> bool:
    return any(hasattr(module, part) for part in KINDS.values())


def _kind_of(config) -> str:
    """What a configuration says that its model was converted to."""
    if has_tensor_options(config):
        return "tensor"
    return "multipole_linear" if multipole_options(config).downsample_queries else "multipole"


def _is_stock(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


before_post_init(_complete)


def _refuse_by_tables(model_class: type[PreTrainedModel], name: str | None) -> None:
    """Stock architectures that look their attention up in a table of classes find a clear ValueError there, in place of a KeyError."""
    if name not in KINDS or not model_class.__module__.startswith("transformers.models."):
        return

    def refuse(config, *args, **kwargs):
        raise ValueError(
            f"{model_class.__name__} does not compute attention by Transformers' attention interface, so that attn_implementation={name!r} "
            "cannot run it; use 'eager' or 'sdpa'"
        )

    for variable, table in vars(sys.modules[model_class.__module__]).items():
        if variable.endswith("ATTENTION_CLASSES") and isinstance(table, dict):
            table.setdefault(name, refuse)


before_choice(_refuse_by_tables)


def uses_interface(module: nn.Module) -> bool:
    """Whether a module computes attention by Transformers' attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model, by name, that compute attention by Transformers' attention interface."""
    return {name: module for name, module in model.named_modules() if uses_interface(module)}


def _has_window(module: nn.Module) -> bool:
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None and getattr(module, "layer_idx", None) is not None:
        return kinds[module.layer_idx] != "full_attention"
    return bool(getattr(module, "sliding_window", None) or getattr(module.config, "sliding_window", None))


def is_chosen(module: nn.Module) -> bool:
    """Whether an attention module is one that a conversion is about: it has no window, and was not left exact."""
    layers = multipole_options(module.config).layers
    return not _has_window(module) and (layers is None or getattr(module, "layer_idx", None) in layers)


def _give_part(module: nn.Module) -> None:
    """The learned parts that the configuration asks for; nothing for models that were not converted."""
    config: Any = module.config
    if not getattr(config, "multipole", None):
        return
    options, kind = multipole_options(config), _kind_of(config)
    if kind != "tensor" and not options.is_learned:
        return
    # Saved with the configuration, so that Transformers refuses the checkpoint where this package is not imported.
    config.attn_implementation = kind
    if not is_chosen(module):
        return
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if kind == "tensor":
        tensor = tensor_options(config, head_dim)
        check_polynomial(tensor)
        part: nn.Module = TensorBranch(tensor, heads, kv_heads, head_dim)
    else:
        length = getattr(config, "max_position_embeddings", None)
        if length is None and options.summary == "direct":
            raise ValueError(
                f"summary='direct' needs config.max_position_embeddings, which {type(config).__name__} has not; use 'hierarchical'"
            )
        queries = options.downsample_queries and not getattr(module, "is_causal", True)
        part = FarField(options, heads, kv_heads, head_dim, length, queries)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    setattr(module, KINDS[kind], part.to(like.device, like.dtype))


def _take_part(module: nn.Module) -> None:
    for part in KINDS.values():
        if hasattr(module, part):
            delattr(module, part)


@takes_options("convert")
def convert(model: PreTrainedModel, kind: str = "multipole", **options: Any) -> PreTrainedModel:
    """Gives a stock model another attention, with parts to learn, in place, and returns it.

    "multipole" puts multipole attention with learned summaries in the place of exact attention; "multipole_linear" its O(n) form, in
    which tokens of a segment share their far field. The summaries start as means and the far bias at ``far_bias_init``, so that the
    model first computes what ``attn_implementation="multipole"`` (or ``"multipole_linear"``) does without learned parts.

    "tensor" adds to exact attention, for each head, a gated branch of tensor attention on the same queries, keys and values
    (:class:`TensorBranch`). The gates start at 0, so that the model first computes what it did with ``attn_implementation="sdpa"``, to
    the bit (with "eager", where it has soft caps). In generation the cache keeps the keys and values of the model's own; the branch of
    a step takes time in proportion to the product of its windows, to n with ``tensor_method="polynomial"``, or to
    ``n ** (tensor_order - 1)``.

    The parts are trained, saved and loaded with the model (``AutoModel...from_pretrained``, after ``import hf_multipole``). A model is
    converted to one of them.

    Args:
        model: a model of Transformers, on any device. (The language model inside of another model can be converted, too, but the
            whole is then loaded with attn_implementation={"text_config": "multipole"}, or how it calls that part.)
        kind: "multipole", "multipole_linear" or "tensor".
        {options}

    Options that are not given stay as they are in ``config.multipole``. ``config.max_position_embeddings`` states the length of
    training, as in :class:`MultipoleConfig`; :func:`extend_context` changes it.

    Raises:
        ValueError: the model cannot be converted, or an option is out of range or belongs to another kind. The model is unchanged then.
        TypeError: there is no such option.
    """
    given = _checked_options(kind, options)
    modules = _convertible(model)
    configs: list[Any] = list({id(module.config): module.config for module in modules.values()}.values())
    before = [getattr(config, "multipole", None) for config in configs]
    try:
        for config, stated in zip(configs, before):
            config.multipole = _STOCK[kind] | (stated or {}) | given
            multipole_options(config)
            if has_tensor_options(config) != (kind == "tensor"):
                raise ValueError("config.multipole has tensor_* options: take them out, or convert the model to 'tensor'")
        layers = given["layers"]
        if layers is not None and any(getattr(module, "layer_idx", None) is None for module in modules.values()):
            raise ValueError(f"layers cannot be chosen in {type(model).__name__}, whose attention has no layer numbers; leave 'layers' out")
        if not any(is_chosen(module) for module in modules.values()):
            which = "all layers" if layers is None else f"layers {layers}"
            raise ValueError(f"there is nothing to convert: {which} have a sliding window, which is exact and stays so")
        for module in modules.values():
            _give_part(module)
            part = getattr(module, KINDS[kind], None)
            if part is not None and not any(parameter.is_meta for parameter in part.parameters()):
                mark_initialised(part)
    except ValueError:
        for config, stated in zip(configs, before):
            _restore(config, stated)
        for module in modules.values():
            _take_part(module)
        raise
    for config in configs:
        config.attn_implementation = kind
        set_implementation(config, kind)
    return model


def _checked_options(kind: str, options: dict) -> dict:
    """What ``convert`` writes into ``config.multipole``, of options that are known and belong to the kind."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, but must be {' or '.join(map(repr, KINDS))}")
    fields, cls = fields_of("convert"), TensorOptions if kind == "tensor" else MultipoleOptions
    own = {"layers": fields["layers"]} | fields_of("convert", cls)
    # Of others, None is as good as not given.
    given = {name: f.metadata["defaults"]["convert"] for name, f in own.items() if "convert" in f.metadata["defaults"]}
    for name, value in options.items():
        if name not in fields:
            raise TypeError(f"convert has no option {name!r}{nearest(name, fields)}")
        if name in given or (name in own and value is not None):
            given[name] = list(value) if isinstance(value, tuple) else value
        elif value != fields[name].metadata["defaults"].get("convert"):
            raise ValueError(f"{name} is no option of convert(model, {kind!r}): leave it out; its options are {', '.join(own)}")
    given["layers"] = _numbers(given["layers"])
    return given if kind == "tensor" else given | {"downsample_queries": kind == "multipole_linear"}


def _numbers(layers: Sequence[int] | None) -> list[int] | None:
    try:
        return None if layers is None else sorted({operator.index(layer) for layer in layers})
    except TypeError:
        raise ValueError(f"layers is {layers!r}, but must be a list of layer numbers, or None for all") from None


def _convertible(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a model that can be converted."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"convert takes a model of Transformers, but this is a {type(model).__name__}")
    name = type(model).__name__
    if model.config.model_type == "multipole":
        raise ValueError(f"{name} has multipole attention already: its kinds of layers are config.layer_types")
    refuse_cross_attention(model.config)
    modules = attention_modules(model)
    if not modules:
        raise ValueError(f"{name} does not compute attention by Transformers' attention interface, so that it cannot be converted")
    for module in modules.values():
        kind = type(module).__name__
        if kind not in ATTENTION_CLASSES or not _is_stock(module):
            raise ValueError(
                f"{name} has {kind} modules, which convert does not know; it knows {', '.join(ATTENTION_CLASSES)}. "
                "attn_implementation='multipole', with means, may run it all the same"
            )
        if _is_converted(module):
            raise ValueError(f"{name} was converted already; hf_multipole.revert gives the stock model back")
    return modules


def _restore(config, options: dict | None) -> None:
    """Puts the options of before into a configuration."""
    if options is None:
        del config.multipole
    else:
        config.multipole = options
    config.__dict__.pop("attn_implementation", None)


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Takes away what :func:`convert` gave to a model, all that was learned included, in place; returns the stock model, with the
    attention implementation that Transformers would choose for it.

    Raises ValueError where the model was not converted.
    """
    modules = attention_modules(model)
    converted = {id(m.config): m.config for m in modules.values() if "attn_implementation" in m.config.__dict__}.values()
    if not converted:
        raise ValueError(f"{type(model).__name__} was not converted: there is nothing to take away")
    for module in modules.values():
        _take_part(module)
    for config in converted:
        _restore(config, None)
        set_implementation(config, model.get_correct_attn_implementation(None))
    return model


def _multipole_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules of a model that are multipole attention: with learned parts, or stock ones without."""

    def runs(module):
        stock = _is_stock(module) and uses_interface(module)
        return stock and KINDS.get(implementation_of(module.config)) == "far_field" and is_chosen(module)

    return [module for module in model.modules() if hasattr(module, "far_field") or runs(module)]


def trained_context(model: PreTrainedModel) -> int | None:
    """Tokens of the rows that the multipole attention of a model was trained on, the shortest of its modules; None without it, or where
    they are not known.
    """
    return _shortest(_multipole_modules(model))


def _shortest(modules: list[nn.Module]) -> int | None:
    return min((length for module in modules if (length := trained_length(module)) is not None), default=None)


def extend_context(model: PreTrainedModel, max_position_embeddings: int) -> PreTrainedModel:
    """Makes a model with multipole attention one for longer rows, to be trained on them, in place, and returns it.

    Without, levels of groups that rows of training do not have take no part in attention (``max_position_embeddings`` says how long these
    are). New levels start with the far bias of the last one; rows that are not longer get the outputs that they had. How positions are
    encoded is left as it is (``rope_parameters``). To be called before an optimizer is made.

    Args:
        model: a :class:`MultipoleForCausalLM` or another of its family, a model that :func:`convert` made, or a stock model with
            ``attn_implementation="multipole"`` or ``"multipole_linear"``.
        max_position_embeddings: tokens of the longest rows of the training to come.

    Raises:
        ValueError: the model has no multipole attention, or direct summaries, or has positions for so many tokens only, or rows are not
            longer than before. The model is unchanged then.
    """
    name = type(model).__name__
    found = _multipole_modules(model)
    if not found or not all(isinstance(getattr(module, "far_field", None), FarField | None) for module in found):
        wrapped = " (in a wrapper, of PEFT for instance: extend the model before)" if found else ""
        raise ValueError(f"{name} has no multipole attention that could be extended{wrapped}: its context is that of its positions")
    before = _shortest(found)
    if before is None or max_position_embeddings <= before:
        length = "any length" if before is None else f"{before} tokens"
        raise ValueError(f"max_position_embeddings is {max_position_embeddings}, but {name} is for rows of {length} already")
    # Of a composite model, those parts that know of a length: not images.
    modules = [module for module in found if trained_length(module) is not None]
    configs: list[Any] = list({id(module.config): module.config for module in modules}.values())
    for config in configs:
        rope = getattr(config, "rope_parameters", None) or {}
        # One for all layers, or one for each kind of them.
        for one in (part for part in (rope, *rope.values()) if isinstance(part, dict)):
            kind = one.get("rope_type", "default")
            if kind in ("dynamic", "longrope") or (kind == "yarn" and one.get("factor") is None):
                raise ValueError(
                    f"{name} rotates by angles that depend on max_position_embeddings (rope_type {kind!r}), so that it would not stay what "
                    "it is: choose rope_parameters that do not, such as 'yarn' with a factor"
                )
    owners = [part for part in model.modules() if isinstance(part, PreTrainedModel) and any(part.config is config for config in configs)]
    theirs = {module for owner in owners or [model] for module in owner.modules()}
    for path, module in model.named_modules():
        if module in theirs and isinstance(module, nn.Embedding) and re.search(r"pos|wpe", path.rpartition(".")[2]):
            raise ValueError(f"{name} has learned positions for {module.num_embeddings} tokens ({path}), which cannot be extended")
    for module in modules:
        far_field: Any = getattr(module, "far_field", None)
        if far_field is not None:
            far_field.extend(max_position_embeddings)
    for config in configs:
        config.max_position_embeddings = max_position_embeddings
    return model

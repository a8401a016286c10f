"""Tells models apart by what they compute: a saved generation state belongs to one of them."""

import hashlib
import json
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

# Fields of a configuration that do not change what a layer keeps.
_OPTIONAL = ("dropout", "_token_id", "output_", "initializer_range", "far_bias_init", "use_cache", "return_dict", "version")
_INDIFFERENT = (*_OPTIONAL, "architectures", "auto_map", "dtype", "id2label", "label2id", "problem_type", "tie_word_embeddings")
# Fields that came later, and change nothing where they are not set: states that were saved before belong to their models still.
_LATER = ("sink_tokens", "saliency")
# What a layer with adapters (of PEFT) computes with, beside its tensors.
_SWITCHES = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


def backbone(model: nn.Module) -> PreTrainedModel:
    """The base model within a model or what it is wrapped in."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel)).base_model


def fingerprint(model: nn.Module) -> str:
    """A hash of the base model's configuration, and of all that a state depends on: parameters and their dtype, what is saved beside
    them (packed and quantised weights, buffers), and which adapters are active. Of other adapters, nothing counts.

    Raises ValueError where weights are offloaded.
    """
    model = backbone(model)
    config: Any = model.config
    fields = {name: x for name, x in config.to_dict().items() if not any(part in f"{name}_" for part in _INDIFFERENT)}
    fields = {name: x for name, x in fields.items() if name not in _LATER or x not in (0, False)}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    adapted = {name: module for name, module in model.named_modules() if isinstance(getattr(module, "disable_adapters", None), bool)}
    idle = tuple(part for name, module in adapted.items() for part in _idle(name, module))
    for name, x in model.named_parameters():
        if not f"{name}.".startswith(idle):
            _add(digest, name, x)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, x in model.state_dict().items():
        if name not in parameters and not f"{name}.".startswith(idle):
            _add(digest, name, x)
    for name, module in adapted.items():
        digest.update(f"{name} {_switches(module)}".encode())
    return digest.hexdigest()


def _add(digest, name: str, x) -> None:
    """Takes in a value of a state dict: a tensor, or what packed layers have there."""
    if isinstance(x, list | tuple):
        for i, part in enumerate(x):
            _add(digest, f"{name}.{i}", part)
    elif not isinstance(x, torch.Tensor):
        # Not objects of other kinds: what they print may have an address in it.
        value = x if isinstance(x, str | int | float | torch.dtype | torch.qscheme | None) else ""
        digest.update(f"{name} {type(x).__name__} {value}".encode())
    elif x.is_meta:
        raise ValueError(f"{name} is offloaded: states of a model are saved and loaded while all its weights are in memory")
    elif hasattr(x, "__tensor_flatten__"):
        subclass: Any = x.detach()
        parts, rest = subclass.__tensor_flatten__()
        digest.update(f"{name} {type(x).__name__} {sorted(map(str, rest.items())) if isinstance(rest, dict) else ''}".encode())
        _add(digest, name, [getattr(x, part) for part in parts])
    elif x.is_quantized:
        per_channel = x.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        scales = (x.q_per_channel_scales(), x.q_per_channel_zero_points()) if per_channel else (x.q_scale(), x.q_zero_point())
        _add(digest, name, [x.int_repr(), *scales])
    else:
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _switches(module: nn.Module) -> dict:
    """How adapters of a layer are set."""
    if module.disable_adapters:
        return {"disabled": True}
    found = {name: getattr(module, name, None) for name in _SWITCHES}
    if isinstance(found["scaling"], dict):
        found["scaling"] = {name: x for name, x in found["scaling"].items() if name in _active(module)}
    return found


def _active(module: nn.Module) -> list[str]:
    active: Any = module.active_adapters
    return [active] if isinstance(active, str) else list(active)


def _idle(name: str, module: nn.Module) -> list[str]:
    """Where a layer has the tensors of adapters that take no part: how their names begin."""
    used = [] if module.disable_adapters else _active(module)
    kinds = {kind: getattr(module, kind, None) for kind in getattr(module, "adapter_layer_names", ())}
    held = {kind: by_adapter for kind, by_adapter in kinds.items() if isinstance(by_adapter, nn.ModuleDict | nn.ParameterDict)}
    return [f"{name}.{kind}.{adapter}." for kind, by_adapter in held.items() for adapter in by_adapter if adapter not in used]

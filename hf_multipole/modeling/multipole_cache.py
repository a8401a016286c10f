"""Cache layers and the cache of multipole models: the generation state behind Transformers' interface, saved and loaded."""

import copy
import itertools
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .calls import Call
from .configuration_multipole import multipole_options
from .hierarchy import check_rows
from .kept import Kept, KeptTokens
from .kept_layer import ROLLBACK, KeptLayer, PastTokens, to_take_back
from .model_fingerprint import backbone, fingerprint
from .multipole_state import MultipoleState, NewTokens
from .options import MultipoleOptions
from .private import implementation_of
from .shared_query_state import LinearState
from .state_slots import Layout
from .summaries import DirectSummary, MeanSummary
from .tensor_cache import Sums

# Attention implementations whose full-attention layers keep a state in stock models.
STATE_IMPLEMENTATIONS = ("multipole", "multipole_linear")
OUT_OF_STEP = "the layers of the cache have seen different numbers of tokens: an earlier call was interrupted; use a new cache"
NO_DROPOUT = "a generation state has no dropout: call model.eval(), or pass use_cache=False in training"
_FORMAT = "hf_multipole state 4"
_READABLE = ("hf_multipole state 3", _FORMAT)  # in the first of them, without sinks and masses


# Compiled code names layers, and modules, by numbers: what Python counts in a state must not become part of it.
_numbered: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.compiler.disable
def take_number(thing) -> int:
    """A number by which ``numbered`` finds it, as long as it exists."""
    number = next(_numbers)
    _numbered[number] = thing
    return number


def numbered(number: int):
    return _numbered[number]


def keeps_state(cache, layer_idx: int, output_attentions: bool | None) -> bool:
    """Whether the layer of a cache keeps a state, and not all keys: those of ordinary caches do not, nor those that were begun
    with exact attention or with ``output_attentions``, which needs the old keys.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    # By its attributes: a layer may be of another copy of this class, from the code of a checkpoint.
    return hasattr(layer, "kept") and not output_attentions and (layer.kept is None or not layer.kept.has_keys)


def compiled_state(cache):
    """A layer of a cache whose state is used by code that is being compiled, or None."""
    if not torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if any(_is_tensor(layer) for layer in getattr(cache, "layers", ())):
        return None  # these layers run outside of compiled code
    return next((layer for layer in getattr(cache, "layers", ()) if getattr(layer, "state", None) is not None), None)


def _is_tensor(layer) -> bool:
    return getattr(layer, "layer_type", None) == "tensor_attention"


class MultipoleLayer(KeptLayer):
    """Cache layer of multipole attention, also of the O(n) form, which DynamicCache makes from ``config.layer_types``: it keeps a state,
    or all keys where attention is exact, whichever its first tokens ask for.
    """

    layer_type = "multipole_attention"
    always = False  # a state even where update is not asked for one: the attention of stock models does not know to ask

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.number = self._take_number()

    @torch.compiler.disable
    def _take_number(self) -> torch.Tensor:
        return torch.tensor(take_number(self))

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "number"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.number = self._take_number()

    @property
    def state(self) -> MultipoleState | None:
        """What is kept, where that is a state."""
        return None if self.kept is None or self.kept.has_keys else self.kept

    def update(self, key_states, value_states, *args, state: bool = False, **kwargs):
        """With ``state``, the keys come back as :class:`PastTokens`, for the attention function "multipole" to take in."""
        always = self.always and (self.kept is None or not self.kept.has_keys)
        if always and implementation_of(self.config) not in STATE_IMPLEMENTATIONS:
            raise ValueError(
                "a MultipoleCache belongs to models that run with attn_implementation='multipole' or 'multipole_linear', but this one "
                f"runs with {implementation_of(self.config)!r}; use a DynamicCache"
            )
        if state or always:
            return PastTokens(self, key_states), value_states
        self.check_exact()
        if self.kept is not None and self.keys.shape[-1] != key_states.shape[-1]:
            raise ValueError("the cache was filled by another model, or with another attention implementation; use a new cache")
        return self.keep_tokens(key_states, value_states)

    def check_exact(self) -> None:
        """Raises ValueError where all keys are asked for, but only a state is there."""
        if self.state is not None:
            raise ValueError(
                "the cache holds the state of multipole attention, which has dropped the older keys: exact attention and "
                "output_attentions need a cache of their own, used from the first token"
            )

    def check_model(self, options: MultipoleOptions, direct: bool, linear: bool, max_levels: int | None, salient: bool) -> None:
        """Raises ValueError where the state is that of another kind of attention; salient: tokens have masses."""
        state = self.state
        if state is None:
            return
        held = (state.layout.block_size, state.layout.rank, state.direct, state.linear)
        if held != (options.block_size, options.rank, direct, linear):
            raise ValueError(
                "the cache was filled by another model: its block_size, rank, kind of summary or kind of layer differ; use a new cache"
            )
        if state.max_levels != max_levels:
            raise ValueError(
                "the cache was begun with another context: extend_context was called, or max_position_embeddings changed, since; use a new "
                "cache"
            )
        state.check_masses(options.sinks(causal=True), salient)

    def attend(self, q, k, v, new: list[NewTokens], call: Call, rotary: Callable | None = None) -> torch.Tensor:
        """:meth:`MultipoleState.attend`, after making the state where there is none yet."""
        options, direct = call.options, isinstance(call.key_summary, DirectSummary)
        salient = call.log_masses is not None
        self.check_model(options, direct, options.downsample_queries, call.max_levels, salient)
        state = self.state
        if state is None:
            # Room for those of training; where these are not known, it grows.
            summary: Any = call.key_summary
            levels = len(summary.levels) if direct else 1 if call.max_levels is None else call.max_levels
            layout = Layout.for_rollback(options.block_size, options.rank, self.rollback, options.sinks(causal=True))
            kind = LinearState if options.downsample_queries else MultipoleState
            how: dict[str, Any] = {"direct": direct, "rotated": rotary is not None, "max_levels": call.max_levels, "salient": salient}
            state = kind(q, k, v, layout, levels, **how)
        means = MeanSummary(options.block_size, options.rank)
        call = call._replace(key_summary=call.key_summary or means, value_summary=call.value_summary or means)
        out = state.attend(q, k, v, new, call, rotary)
        self.kept = state
        return out


class MultipoleStaticLayer(StaticLayer):
    """Says what to use: the state has a fixed size anyway."""

    def __init__(self, *args, **kwargs):
        raise ValueError(
            "multipole attention needs no static cache: the state that generate makes by itself has the same size at every length. "
            "Leave out cache_implementation='static'; torch.compile(model.forward) works with it"
        )


@torch.compiler.disable
def check_cache(cache, model: PreTrainedModel, embeddings: torch.Tensor, mask, tensor_mask, attention_mask) -> None:
    """Raises ValueError where the cache is not that of this model, or the tokens do not continue it: before any layer has taken
    something in, so that the cache stays as it was.

    embeddings: what the first layer is given. mask: the MultipoleMask, or None where exact attention or attention weights are asked for;
    tensor_mask: that of tensor layers, or None where there are none; attention_mask: as the model was given it.
    """
    config = model.config
    attentions = [layer.self_attn for layer in model.layers][: config.num_hidden_layers]
    if cache.layers and cache.layer_class_to_replicate is None and len(cache.layers) < len(attentions):
        raise ValueError(
            f"the cache was made for a model of {len(cache.layers)} layers, but this one has {len(attentions)}; use a new cache"
        )
    if len({layer.get_seq_length() for layer in cache.layers[: len(attentions)]}) > 1:
        raise ValueError(OUT_OF_STEP)
    rows = tensor_mask if mask is None else mask
    for i, new in enumerate(rows.new_tokens if rows is not None and attention_mask is None else ()):
        if new.position is None:
            raise ValueError(f"position_ids of row {i} do not go up by one: packed rows have no cache; pass use_cache=False")
    read = []
    if tensor_mask is not None:
        read = [cache.get_seq_length()] * tensor_mask.batch
        if attention_mask is not None:
            check_rows(attention_mask, None)
            read = attention_mask[:, : read[0]].sum(1).tolist()
    for attention, layer in zip(attentions, cache.layers):
        if _is_tensor(layer):
            if attention.layer_type != layer.layer_type:
                raise ValueError("the cache was filled by another model: its layer_types differ; use a new cache")
            layer.check(attention, read)
        state = getattr(layer, "state", None)
        if state is None:
            continue
        if not hasattr(attention, "far_field"):
            raise ValueError("the cache was filled by another model: its layer_types differ; use a new cache")
        if mask is None:
            layer.check_exact()
        direct, linear = isinstance(attention.far_field.key_summary, DirectSummary), attention.layer_type == "multipole_linear_attention"
        options = multipole_options(config)
        layer.check_model(options, direct, linear, attention.far_field.max_levels, options.saliency)
        # Weights may be packed, or be elsewhere: keys are of the dtype of what they are made of.
        dim, dtype, device = config.head_dim, embeddings.dtype, embeddings.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        state.check_tokens(config.num_key_value_heads, dim * (2 if config.rotate_summaries else 1), dim, dtype)
        mask.check_past(state)
        state.check_levels(mask.new_tokens, attention.far_field.key_summary)
        if model.training and config.attention_dropout:
            raise ValueError(NO_DROPOUT)
    if hasattr(cache, "bind"):
        cache.bind(model)


class MultipoleCache(DynamicCache):
    """The generation state of a whole model, as ``generate(past_key_values=...)`` takes it. Multipole layers keep a state, and so do
    the full-attention layers of a stock model that runs with ``attn_implementation="multipole"`` or ``"multipole_linear"``; all others
    keep what they do.

    config: the model's configuration. rollback: tokens that can be taken back (``crop``, assisted decoding), rounded up to whole
    blocks. A cache belongs to the first model that it is used with.

    Example:

    ```python
    >>> cache = MultipoleCache(config=model.config)
    >>> model(document, past_key_values=cache)
    >>> cache.save("document.safetensors")
    >>> cache = MultipoleCache.load("document.safetensors", model)
    >>> model.generate(torch.cat([document, question], 1), past_key_values=cache)
    ```
    """

    rotation: int | None = None  # the length whose angles the keys have, where these depend on it

    def __init__(self, config: PreTrainedConfig, rollback: int = ROLLBACK):
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"MultipoleCache takes a model's configuration (config=model.config), but this is a {type(config).__name__}")
        if isinstance(rollback, bool) or not isinstance(rollback, int) or rollback < 1:
            raise ValueError(f"rollback is {rollback!r}, but must be a positive number of tokens")
        super().__init__(config=config)
        self._model: weakref.ref | None = None
        config = config.get_text_config(decoder=True)
        if config.model_type != "multipole" and implementation_of(config) in STATE_IMPLEMENTATIONS:
            chosen = multipole_options(config).layers
            for i, layer in enumerate(self.layers):
                # Layers with a window, recurrent ones and those that were left exact keep what they keep.
                if type(layer) is DynamicLayer and (chosen is None or i in chosen):
                    self.layers[i] = MultipoleLayer()
                    self.layers[i].always, self.layers[i].config = True, config
        for layer in self.layers:
            if hasattr(layer, "rollback"):
                layer.rollback = rollback

    @torch.compiler.disable
    def bind(self, model: nn.Module) -> None:
        """Called by the multipole models, and by users of others before ``save``; raises ValueError where the cache is another's."""
        model = backbone(model)
        owner = None if self._model is None else self._model()
        if owner is not None and owner is not model and self.get_seq_length():
            raise ValueError("the cache was filled by another model; use a new cache")
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo):
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__ | {"_model": None}, memo))
        other._model = self._model
        return other

    def __getstate__(self):
        # Pickled, it belongs to whoever uses it first.
        return self.__dict__ | {"_model": None}

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back ``-tokens_to_remove`` tokens in all layers, or raises ValueError and changes none."""
        count = to_take_back(tokens_to_remove, self.get_seq_length())
        for layer in self.layers:
            if hasattr(layer, "kept"):
                layer.check_crop(count)
            elif isinstance(layer, DynamicSlidingWindowLayer) and count and not layer.record_past:
                if layer.get_seq_length() >= layer.sliding_window:
                    raise ValueError(
                        "the cache has layers with a sliding window, which drop older keys: call cache.activate_past_recording() before "
                        "the tokens that are to be taken back are read"
                    )
        super().crop(-count)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(sum(x.nbytes for x in _tensors(layer).values()) for layer in self.layers)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state to a safetensors file, with the fingerprint of its model; a file that is there is replaced at the end.

        Raises ValueError where there is nothing to save, FileNotFoundError where there is no such folder.
        """
        model, path = None if self._model is None else self._model(), Path(path)
        if not self.get_seq_length():
            raise ValueError("the cache is empty: there is nothing to save")
        if model is None:
            raise ValueError("the cache does not know its model: call cache.bind(model) before save, while the model is there")
        if len({layer.get_seq_length() for layer in self.layers}) > 1:
            raise ValueError(OUT_OF_STEP)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}")
        tensors: dict[str, torch.Tensor] = {}
        layers = []
        for i, layer in enumerate(self.layers):
            tensors |= {f"{i}.{name}": x.contiguous() for name, x in _tensors(layer).items()}
            if not isinstance(layer, DynamicLayer):
                raise ValueError(f"layer {i} of the cache is a {type(layer).__name__}, which cannot be saved")
            kept = getattr(layer, "kept", None)
            layers.append({"seen": layer.get_seq_length()} if kept is None else kept.description())
        metadata = {"format": _FORMAT, "model": fingerprint(model), "layers": json.dumps(layers), "rotation": json.dumps(self.rotation)}
        # A name of its own, so that a half-written file is never taken for a whole one.
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path: str | os.PathLike, model: nn.Module) -> "MultipoleCache":
        """The state that :meth:`save` wrote, on the device of ``model``.

        Raises FileNotFoundError; ValueError where the file is damaged, or is of another model or version.
        """
        path, model = Path(path), backbone(model)
        if not path.is_file():
            raise FileNotFoundError(f"there is no state file {path}")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or not a state file: {error}") from None
        if metadata.get("format") not in _READABLE:
            raise ValueError(f"{path} is not a state file of this version: its format is {metadata.get('format')!r}, not {_FORMAT!r}")
        if metadata.get("model") != fingerprint(model):
            raise ValueError(f"{path} is the state of another model: weights, adapters, dtype or configuration differ; read the text again")
        tensors = load_file(path, device=str(model.device))
        cache = cls(config=model.config)
        cache.bind(model)
        cache.rotation = json.loads(metadata.get("rotation", "null"))
        for i, (layer, description) in enumerate(zip(cache.layers, json.loads(metadata["layers"]))):
            own = {name.split(".")[1]: x for name, x in tensors.items() if name.split(".")[0] == str(i)}
            if hasattr(layer, "kept"):
                layer.kept = _kind(description, own).restored(description, own)
                if isinstance(layer.kept, MultipoleState):
                    layer.rollback = layer.kept.layout.spare * layer.kept.layout.block_size
            else:
                layer.update(own["keys"], own["values"])
                if isinstance(layer, DynamicSlidingWindowLayer):
                    layer.cumulative_length = description["seen"]
        return cache


def _kind(description: dict, tensors: dict[str, torch.Tensor]) -> type[Kept]:
    """What was saved."""
    if "rows" in description:
        return LinearState if "far" in tensors else MultipoleState
    return Sums if "sums" in tensors else KeptTokens


def _tensors(layer) -> dict[str, torch.Tensor]:
    """What a layer of a cache holds."""
    if hasattr(layer, "kept"):
        return {} if layer.kept is None else layer.kept.tensors()
    return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}

"""Cache layers and the cache of multipole models: the generation state behind Transformers' interface, saved and loaded."""

import hashlib
import itertools
import json
import os
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer
from transformers.configuration_utils import PreTrainedConfig

from .hierarchy import level_count
from .state_multipole import MultipoleState
from .summaries import DirectSummary, MeanSummary

# Tokens that can be taken back (assisted decoding), rounded up to whole blocks.
ROLLBACK = 64


class PastTokens(NamedTuple):
    """What a layer of the cache hands to the attention function in place of keys: its state, and the new ones."""

    layer: "MultipoleLayer"
    new: torch.Tensor


def keeps_state(cache, layer_idx: int, output_attentions: bool | None) -> bool:
    """Whether the layer of a cache keeps a state, and not all keys: those of ordinary caches do not, nor those that were begun
    with exact attention or with ``output_attentions``, which needs the old keys.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    # By its attributes: a layer may be of another copy of this class, from the code of a checkpoint.
    return hasattr(layer, "rollback") and not output_attentions and (layer.state is not None or not layer.is_initialized)


# Compiled code names a layer by a number in a tensor: what Python counts in a state must not become part of it.
_NAMESPACE = __name__.replace(".", "_")
_layers = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op(_NAMESPACE + "::attend_state", mutates_args=())
def attend_state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    number: torch.Tensor,
) -> torch.Tensor:
    """A step on the state of a layer, which was made outside of compiled code and then remembered how it is called."""
    layer = _layers[int(number)]
    return layer.again(layer, q, k, v, attention_mask, position_ids).contiguous()


@torch.library.custom_op(_NAMESPACE + "::seen", mutates_args=())
def seen(number: torch.Tensor) -> torch.Tensor:
    """Tokens that a layer has seen, ``()`` int64."""
    return torch.tensor(_layers[int(number)].get_seq_length())


@attend_state.register_fake
def _(q, k, v, attention_mask, position_ids, number):
    return q.new_empty(*q.shape[:3], v.shape[-1])


@seen.register_fake
def _(number):
    return torch.empty((), dtype=torch.long)


def compiled_state(cache, layer_idx: int = 0):
    """The layer of a cache whose state is used by code that is being compiled, or None."""
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if torch.compiler.is_compiling() and layer_idx < len(layers) else None
    return layer if getattr(layer, "again", None) is not None else None


class _StateLayer:
    """A cache layer that keeps a state, or all keys where attention is exact: whichever its first tokens ask for."""

    rollback = ROLLBACK
    is_croppable = True
    state: MultipoleState | None = None
    again = None  # of the attention function: attends once more, as it did the first time

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._take_number()

    @torch.compiler.disable
    def _take_number(self) -> None:
        self.number = torch.tensor(next(_numbers))
        _layers[int(self.number)] = self

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("again", "number")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._take_number()

    def update(self, key_states, value_states, *args, state: bool = False, **kwargs):
        """With ``state``, the keys come back as :class:`PastTokens`, for the attention function "multipole" to take in."""
        if state:
            return PastTokens(self, key_states), value_states
        if self.state is not None:
            raise ValueError(
                "the cache holds the state of multipole attention, which has dropped the older keys: exact attention and "
                "output_attentions need a cache of their own, used from the first token"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def attend(self, q, k, v, new, *, block_size, rank, key_summary, value_summary, max_length, **options) -> torch.Tensor:
        """:meth:`MultipoleState.attend`, after making the state where there is none yet."""
        means = MeanSummary(block_size, rank)
        direct = isinstance(key_summary, DirectSummary)
        state = self.state
        if state is None:
            levels = max(0 if direct else 1, level_count(max_length, block_size))
            state = MultipoleState(k, v, block_size, rank, levels, self.rollback, direct)
        if (state.block_size, state.rank, state.direct) != (block_size, rank, direct):
            raise ValueError("the cache was filled by another model: its block_size, rank or kind of summary differ; use a new cache")
        out = state.attend(q, k, v, new, key_summary=key_summary or means, value_summary=value_summary or means, **options)
        self.state, self.is_initialized = state, True
        return out

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.state is None else self.state.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_mask_sizes(query_length) if self.state is None else (self.state.seen + query_length, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back ``-tokens_to_remove`` tokens; up to ``rollback`` of them. A positive number is the length to keep."""
        if self.state is None:
            return super().crop(tokens_to_remove)
        count = int(tokens_to_remove)  # some versions of generate pass a tensor
        self.state.take_back(-count if count <= 0 else max(0, self.state.seen - count))

    def reset(self) -> None:
        if self.state is None:
            return super().reset()
        self.state, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx) if self.state is None else self.state.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.state is None:
            return super().batch_select_indices(indices)
        rows = torch.arange(len(self.state.lengths))
        self.state.select(rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is None:
            return super().batch_repeat_interleave(repeats)
        self.state.select(torch.arange(len(self.state.lengths)).repeat_interleave(repeats))

    # The state is small, and used after `update`: it stays on its device.
    def offload(self) -> None:
        if self.state is None:
            super().offload()

    def prefetch(self) -> None:
        if self.state is None:
            super().prefetch()


class MultipoleLayer(_StateLayer, DynamicLayer):
    """Cache layer of multipole attention, which DynamicCache makes from ``config.layer_types``."""

    _layer_type = "multipole_attention"


class MultipoleStaticLayer(StaticLayer):
    """Says what to use: the state has a fixed size anyway."""

    _layer_type = "multipole_attention"

    def __init__(self, *args, **kwargs):
        raise ValueError(
            "multipole attention needs no static cache: the state that generate makes by itself has the same size at every length. "
            "Leave out cache_implementation='static'; torch.compile(model.forward) works with it"
        )


def fingerprint(model: nn.Module) -> str:
    """Tells models apart: a hash of the fields of the configuration and of evenly spaced entries of every parameter."""
    config = model.config.to_dict()
    fields = {name: config.get(name) for name in sorted(type(model.config).__annotations__) if name != "use_cache"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, x in model.base_model.named_parameters():
        sample = x.detach().flatten()[:: max(1, x.numel() // 1024)].cpu().contiguous()
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class MultipoleCache(DynamicCache):
    """The generation state of a whole model, as ``generate(past_key_values=...)`` takes it; full-attention layers keep all keys.

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

    def __init__(self, config: PreTrainedConfig, rollback: int = ROLLBACK):
        if isinstance(rollback, bool) or not isinstance(rollback, int) or rollback < 1:
            raise ValueError(f"rollback is {rollback!r}, but must be a positive number of tokens")
        super().__init__(config=config)
        self._model = None
        for layer in self.layers:
            if hasattr(layer, "rollback"):
                layer.rollback = rollback

    @torch.compiler.disable
    def bind(self, model: nn.Module) -> None:
        """Called by the model; raises ValueError where the cache is another's."""
        owner = None if self._model is None else self._model()
        if owner is not None and owner is not model and self.get_seq_length():
            raise ValueError("the cache was filled by another model; use a new cache")
        if owner is not model:
            self._model = weakref.ref(model)

    def __getstate__(self):
        # Copies belong to whoever uses them first.
        return self.__dict__ | {"_model": None}

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(sum(x.nbytes for x in _tensors(layer).values()) for layer in self.layers)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the state to a safetensors file, with the fingerprint of its model; a file that is there is replaced at the end."""
        model = None if self._model is None else self._model()
        if model is None or not self.get_seq_length():
            raise ValueError("the cache is empty, or its model is gone: there is nothing to save")
        tensors, layers = {}, []
        for i, layer in enumerate(self.layers):
            tensors |= {f"{i}.{name}": x.contiguous() for name, x in _tensors(layer).items()}
            state = getattr(layer, "state", None)
            layers.append(None if state is None else {name: getattr(state, name) for name in _FIELDS})
        metadata = {"format": _FORMAT, "model": fingerprint(model), "layers": json.dumps(layers)}
        path = Path(path)
        # A name of its own, so that a half-written file is never taken for a whole one.
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> "MultipoleCache":
        """The state that :meth:`save` wrote, on the device of ``model``.

        Raises FileNotFoundError; ValueError where the file is damaged, or is of another model or version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no state file {path}")
        try:
            with safe_open(path, "pt", device=str(model.device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged, or not a state file: {error}") from None
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a state file of this version: its format is {metadata.get('format')!r}, not {_FORMAT!r}")
        if metadata.get("model") != fingerprint(model):
            raise ValueError(f"{path} is the state of another model: weights, dtype or configuration differ; read the text again")
        cache = cls(config=model.config)
        cache._model = weakref.ref(model.base_model)
        for i, (layer, fields) in enumerate(zip(cache.layers, json.loads(metadata["layers"]))):
            own = {name: tensors[f"{i}.{name}"] for name in _TENSORS if f"{i}.{name}" in tensors}
            if fields is None:
                layer.update(own["keys"], own["values"])
                continue
            state = layer.state = MultipoleState.__new__(MultipoleState)
            vars(state).update(fields | own, _bias=None)
            layer.rollback, layer.is_initialized = state.spare * state.block_size, True
        return cache


_FORMAT = "hf_multipole state 1"
_TENSORS = ("keys", "values", "key_sums", "value_sums")
_FIELDS = ("spare", "block_size", "rank", "direct", "ring", "groups", "seen", "lengths", "longest", "positions", "closed")


def _tensors(layer) -> dict[str, torch.Tensor]:
    """What a layer of a cache holds."""
    holder = getattr(layer, "state", None) or layer
    found = {name: getattr(holder, name, None) for name in _TENSORS}
    return {name: x for name, x in found.items() if x is not None}

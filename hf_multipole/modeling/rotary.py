"""Rotary positions: angles of tokens, and what in them depends on the length of a text."""

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_multipole import MultipoleConfig


class MultipoleRotaryEmbedding(nn.Module):
    """All kinds of Transformers. Those whose frequencies depend on the length take them from the tokens that they are given, and from
    nothing that was run before.
    """

    def __init__(self, config: MultipoleConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        initial = self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        self.attention_scaling: float
        self.inv_freq: torch.Tensor
        inv_freq, self.attention_scaling = initial(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        # Transformers fills both anew where a model was made without data.
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        # Frequencies keep their precision when a model is put into another dtype: rounded to bfloat16, they would be off by a whole
        # turn after a few thousand tokens.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    @staticmethod
    def compute_default_rope_parameters(config: MultipoleConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _frequencies(self, position_ids: torch.Tensor) -> torch.Tensor:
        inv_freq = self.inv_freq.to(position_ids.device).float()
        limit = _limit(self.config)
        if limit is None:
            return inv_freq
        length = position_ids.max() + 1
        longer = length if self.rope_type == "dynamic" else limit + 1
        extended, _ = ROPE_INIT_FUNCTIONS[self.rope_type](self.config, position_ids.device, seq_len=longer)
        return torch.where(length > limit, extended, inv_freq)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``(..., head_dim)`` of positions ``(...)``, which need not be integers."""
        angles = position_ids[..., None].float() * self._frequencies(position_ids).to(x.device)
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def _limit(config: MultipoleConfig) -> int | None:
    """The length beyond which frequencies change; None where they do not."""
    parameters = config.rope_parameters
    lengths = {"dynamic": config.max_position_embeddings, "longrope": parameters.get("original_max_position_embeddings")}
    return lengths.get(parameters["rope_type"])


def _rotation(config: MultipoleConfig, length: int) -> int:
    """The length whose frequencies a text of ``length`` tokens has: texts of the same rotation have the same."""
    limit = _limit(config)
    return max(length, limit) if config.rope_parameters["rope_type"] == "dynamic" else limit + (length > limit)


def depends_on_length(config: MultipoleConfig) -> bool:
    """Whether the angles of a token change as the text grows."""
    return _limit(config) is not None and any(kind != "tensor_attention" for kind in config.layer_types)


def is_rotated_anew(config: MultipoleConfig, cache, length: int, queries: int) -> bool:
    """Whether the keys in a cache have other angles than a text of ``length`` tokens has, of which the last ``queries`` are new."""
    held = getattr(cache, "rotation", None)
    if held is None:
        held = _rotation(config, length - queries)
    return cache.get_seq_length() > 0 and held != _rotation(config, length)


@torch.compiler.disable
def check_rotation(config: MultipoleConfig, cache, position_ids: torch.Tensor) -> None:
    """Raises ValueError where keys in the cache have other angles than in the whole text; otherwise the cache remembers which.

    position_ids: ``(batch or 1, queries)`` of the new tokens.
    """
    length = int(position_ids.max()) + 1
    if is_rotated_anew(config, cache, length, position_ids.shape[1]):
        raise ValueError(
            f"rope_type {config.rope_parameters['rope_type']!r} gives the keys in the cache other angles when the text grows from "
            f"{length - position_ids.shape[1]} to {length} tokens: read the whole text at once into a new cache, or pass use_cache=False"
        )
    cache.rotation = _rotation(config, length)

"""The layer of tensor attention: projections for every index of a tuple of tokens, and entries within a bound."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_multipole import MultipoleConfig, tensor_options
from .options import TensorOptions
from .polynomial_attention import TOLERANCE, Approximation, approximate


class BoundedRMSNorm(nn.Module):
    """``bound * tanh(weight * x / rms(x))``, with a learned gain for each head and channel: no entry exceeds the bound."""

    def __init__(self, heads: int, dim: int, bound: float, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, dim))
        self.bound, self.eps = bound, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: ``(batch, heads, n, dim)``; the result is in its dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = self.weight.to(wide.dtype) * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # Less by what rounding may add, so that the bound holds in the dtype of the result.
        return (self.bound * (1 - 2 * torch.finfo(x.dtype).eps) * wide.tanh()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bound={self.bound}, eps={self.eps}"


class TensorAttention(nn.Module):
    """Projections and cache, then the attention function "tensor".

    Keys and values of all ``tensor_order - 1`` indices come from one projection each, those of the first index first.

    There are no rotary positions: a product of three or more vectors is not invariant when all of them are rotated. Causality and
    windows tell positions, and other layers of a hybrid.

    In generation, a layer whose windows are all given keeps the widest of them, and one with ``tensor_method="polynomial"`` sums of
    constant size. The exact form without a window keeps all keys, and takes O(n ** (tensor_order - 1)) time for each new token:
    O(n ** 2) for order 3.
    """

    def __init__(self, config: MultipoleConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.layer_type = config, layer_idx, config.layer_types[layer_idx]
        self.indices = config.tensor_order - 1
        self.is_causal = config.is_causal
        self.head_dim, self.score_dim = config.head_dim, config.tensor_score_dim
        self.scaling = self.score_dim**-0.5
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.num_key_value_groups = heads // kv_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.score_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.indices * kv_heads * self.score_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.indices * kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = self.k_norm = None
        if config.tensor_entry_bound is not None:
            bounded = self.score_dim, config.tensor_entry_bound, config.rms_norm_eps
            self.q_norm, self.k_norm = BoundedRMSNorm(heads, *bounded), BoundedRMSNorm(self.indices * kv_heads, *bounded)

    @property
    def options(self) -> TensorOptions:
        return tensor_options(self.config, self.head_dim)

    @property
    def kept_tokens(self) -> int | None:
        """Tokens that the widest window reaches, the query's own included; None where an index has no window."""
        windows = self.config.tensor_window or [None]
        return None if None in windows else max(windows)

    def approximation(self, dtype: torch.dtype) -> Approximation:
        """The polynomial that :func:`tensor_attention` takes for these options and tensors of ``dtype``."""
        config = self.config
        sizes = self.score_dim, config.tensor_order, self.scaling, config.tensor_entry_bound, config.tensor_degree
        return approximate(*sizes, TOLERANCE, torch.promote_types(dtype, torch.float32))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: object,
        implementation: str,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.score_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(*shape, -1, self.score_dim).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if past_key_values is not None:
            polynomial = self.config.tensor_method == "polynomial"
            key, value = past_key_values.update(key, value, self.layer_idx, window=self.kept_tokens, sums=polynomial)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None)
        out, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.flatten(2)), None

"""What tensor attention adds to the attention of a stock model: a gated branch beside it (arXiv 2310.04064)."""

import torch
from torch import nn
from transformers import initialization as init

from ..modeling.options import TensorOptions
from ..modeling.private import LearnedPart
from ..modeling.tensor_attention import document_attention
from ..modeling.tensor_layer import BoundedRMSNorm


class TensorBranch(LearnedPart):
    """Tensor attention from the query, key and value heads of a stock attention module, its attribute ``tensor_branch``.

    The attention interface hands over one query, one key and one value for each token: those of the module's own, exact attention, and
    its cache keeps these. So the further keys and values do not travel: here, behind the interface, a learned map for each head and
    index makes ``order - 1`` keys and values, and the query, out of them, at every call, for all tokens that the queries reach.

    ``out = exact(q, k, v) + gate * tensor(q', [k1', k2', ...], [v1', v2', ...])``

    The gate, one for each head, starts at 0: the first output is the stock model's, and the first step of training moves no more of the
    branch than its gate. The maps of queries and keys start at random, with entries as large as the heads'. The first value starts as
    the value, and the others as ones, so that the branch starts with a weighted mean of values, whatever their size.

    In models with rotary positions, queries and keys arrive rotated by their positions, and the maps see them so: the scores then
    depend on positions, and not, as those of two vectors, on their distances alone.

    options: with a score_dim, as from :func:`tensor_options`.
    """

    def __init__(self, options: TensorOptions, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.options, self.indices = options, options.order - 1
        score_dim, bound = options.score_dim, options.entry_bound
        self.query_map = nn.Parameter(torch.empty(heads, head_dim, score_dim))
        # Those of the first index first.
        self.key_map = nn.Parameter(torch.empty(self.indices * kv_heads, head_dim, score_dim))
        self.value_map = nn.Parameter(torch.empty(self.indices * kv_heads, head_dim, head_dim))
        self.value_shift = nn.Parameter(torch.empty(self.indices * kv_heads, 1, head_dim))
        self.gate = nn.Parameter(torch.empty(heads))
        self.query_norm = self.key_norm = None
        if bound is not None:
            self.query_norm, self.key_norm = (BoundedRMSNorm(len(x), score_dim, bound, 1e-6) for x in (self.query_map, self.key_map))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start; parameters that were loaded from a checkpoint stay."""
        for weight in (self.query_map, self.key_map):
            init.normal_(weight, std=weight.shape[1] ** -0.5)
        first = torch.arange(len(self.value_map), device=self.gate.device).view(-1, 1, 1) < len(self.value_map) // self.indices
        init.copy_(self.value_map, first * torch.eye(self.value_map.shape[1], device=self.gate.device))
        init.copy_(self.value_shift, (~first).expand_as(self.value_shift))
        init.zeros_(self.gate)
        if self.query_norm is not None:
            init.ones_(self.query_norm.weight)
            init.ones_(self.key_norm.weight)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: torch.Tensor | None,
        causal: bool,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """query: ``(batch, heads, queries, head_dim)``; key and value: ``(batch, kv_heads, n, head_dim)``; the queries are the last
        tokens. documents: as from :func:`document_numbers`, ``(batch, n)``. dropout: of the weights of pairs; exact only.

        Returns what is to be added to the output, ``(batch, queries, heads, head_dim)``.
        """
        if query.shape[1] != len(self.gate):
            raise ValueError(
                f"the branch was made for {len(self.gate)} heads, but here are {query.shape[1]}: tensor parallelism is not supported"
            )
        if dropout and self.options.method == "polynomial":
            raise ValueError(
                f"the model drops attention weights with probability {dropout}, but tensor_method='polynomial' has no single weights to "
                "drop: set the attention dropout of its configuration to 0"
            )
        widths = self.options.window or [None]
        if causal and None not in widths:
            # Of a long cache, what the windows of the first query reach.
            reached = slice(-(query.shape[2] - 1 + max(widths)), None)
            key, value = key[:, :, reached], value[:, :, reached]
            documents = None if documents is None else documents[:, reached]
        query = query @ self.query_map
        key, value = (x.repeat(1, self.indices, 1, 1) for x in (key, value))
        key, value = key @ self.key_map, value @ self.value_map + self.value_shift
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if torch.is_autocast_enabled(query.device.type):
            query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
        keys, values = key.chunk(self.indices, 1), value.chunk(self.indices, 1)
        out = document_attention(query, keys, values, documents, self.options, causal=causal, dropout_p=dropout)
        return out.transpose(1, 2) * self.gate[:, None]

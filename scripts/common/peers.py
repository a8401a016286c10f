r"""Other efficient attentions as attention functions of Transformers, and the training and evaluation scripts with them registered.

    python -m scripts.common.peers run_clm --config configs/quickstart.yaml --attn_implementation peer_linear \
        --config_overrides '{layer_types: [full_attention, full_attention]}' --output_dir runs/linear
    python -m scripts.common.peers evaluate_lm --model runs/linear --attn-implementation peer_linear --folder stdlib \
        --context-lengths 4096 --output runs/evaluation-linear

So they run in the same block as multipole attention, in layers of "full_attention", and with the same rotary positions:
    peer_linear: linear attention with feature map elu + 1 (Katharopoulos et al., arXiv 2006.16236);
    peer_alibi: exact attention with linear biases (ALiBi, arXiv 2108.12409), bidirectional by distance; for a model without rotary
        positions, rope_parameters: {rope_type: linear, rope_theta: 10000.0, factor: 1.0e9};
    peer_local: exact attention in blocks of 128 and the ones beside them (local-attention);
    peer_h_transformer_1d: hierarchical attention (Zhu and Soricut, arXiv 2107.11906; h-transformer-1d), block size 32;
    peer_nystrom: Nystroem attention, bidirectional (arXiv 2102.03902; nystrom-attention), 64 landmarks, without its convolution.
For training and evaluation of whole rows: no padding, packed documents, cache or dropout.
"""

import runpy
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

WINDOW, BLOCK_SIZE, LANDMARKS, CHUNK, ALIBI_CHUNK = 128, 32, 64, 64, 128


def linear(q, k, v, causal, scaling):
    """In chunks: their sums before, and the pairs within."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    v = F.pad(v, (0, 1), value=1.0)
    if not causal:
        out = q @ (k.mT @ v)
    else:
        n = q.shape[2]
        q, k, v = (F.pad(x, (0, 0, 0, -n % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (q, k, v))
        sums = k.mT @ v
        out = q @ (sums.cumsum(2) - sums) + (q @ k.mT).tril() @ v
        out = out.flatten(2, 3)[:, :, :n]
    return out[..., :-1] / out[..., -1:]


def linear_step(q, k, v, sums):
    """One more token of causal linear attention, all ``(batch, heads, 1, head_dim)``; sums ``(batch, heads, head_dim, head_dim + 1)`` of
    the tokens before it, float32, take it in.
    """
    q, k = F.elu(q) + 1, F.elu(k) + 1
    sums += k.mT * F.pad(v, (0, 1), value=1.0)
    out = q.to(sums.dtype) @ sums
    return (out[..., :-1] / out[..., -1:]).to(v.dtype)


def alibi(q, k, v, causal, scaling):
    """In chunks of queries: the biases of all pairs at once would be n^2 numbers a head."""
    heads, n = q.shape[1:3]
    slopes = 2 ** (-8 * torch.arange(1, heads + 1, device=q.device) / heads)
    token, out = torch.arange(n, device=q.device), []
    for start in range(0, n, ALIBI_CHUNK):
        own, seen = slice(start, start + ALIBI_CHUNK), slice(start + ALIBI_CHUNK if causal else n)
        bias = -slopes[:, None, None] * (token[own, None] - token[seen]).abs()
        if causal:
            bias = bias.masked_fill(token[seen] > token[own, None], -torch.inf)
        bias = bias[None].to(q.dtype)
        out.append(F.scaled_dot_product_attention(q[:, :, own], k[:, :, seen], v[:, :, seen], attn_mask=bias, scale=scaling))
    return torch.cat(out, 2)


def local(q, k, v, causal, scaling, window=WINDOW):
    attention = import_module("local_attention").LocalAttention(
        window, causal=causal, autopad=True, use_rotary_pos_emb=False, scale=scaling
    )
    return attention(q, k, v)


# Two packages have modules that project x to queries, keys and values. Without their projections they take these side by side. A module
# is made once for each shape: making one takes time in proportion to the row.


def bare(module, scaling, device):
    module.scale, module.to_qkv, module.to_out = scaling, torch.nn.Identity(), torch.nn.Identity()
    return module.to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def h_transformer_1d_module(n, heads, dim, causal, scaling, device, block_size=BLOCK_SIZE):
    if not causal and n & (n - 1):
        raise ValueError(f"peer_h_transformer_1d would attend to its own padding: rows must have a power of 2 of tokens, not {n}")
    peers = import_module("h_transformer_1d.h_transformer_1d")
    kind = peers.CausalHAttention1D if causal else peers.HAttention1D
    return bare(kind(1, max_seq_len=1 << (n - 1).bit_length(), heads=heads, dim_head=dim, block_size=block_size), scaling, device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def nystrom_module(n, heads, dim, causal, scaling, device, landmarks=LANDMARKS):
    if causal:
        raise ValueError("peer_nystrom is for masked models: its landmarks are means over the whole row, the future included")
    if n % landmarks:
        raise ValueError(f"peer_nystrom would attend to its own padding: rows must have a multiple of {landmarks} tokens, not {n}")
    peers = import_module("nystrom_attention")
    return bare(peers.NystromAttention(1, dim, heads, landmarks, residual=False), scaling, device)


def side_by_side(q, k, v):
    return torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], 2)


def by_head(x, heads):
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def h_transformer_1d(q, k, v, causal, scaling):
    (_, heads, n, dim), device = q.shape, q.device
    return by_head(h_transformer_1d_module(n, heads, dim, causal, scaling, device)(side_by_side(q, k, v)), heads)


def nystrom(q, k, v, causal, scaling):
    (_, heads, n, dim), device = q.shape, q.device
    return by_head(nystrom_module(n, heads, dim, causal, scaling, device)(side_by_side(q, k, v)), heads)


class Peer(NamedTuple):
    attention: Callable  # (q, k, v, causal, scaling) -> output, all (batch, heads, n, head_dim)
    package: str | None = None  # that it comes from

    def installed(self) -> bool:
        return self.package is None or find_spec(self.package.replace("-", "_")) is not None


PEERS = {
    "peer_linear": Peer(linear),
    "peer_alibi": Peer(alibi),
    "peer_local": Peer(local, "local-attention"),
    "peer_h_transformer_1d": Peer(h_transformer_1d, "h-transformer-1d"),
    "peer_nystrom": Peer(nystrom, "nystrom-attention"),
}


def mask_function(attention_mask=None, mask_function=None, **kwargs):
    """No mask at all: what needs one is refused."""
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("the peers' attention functions take no padding")
    if getattr(mask_function, "__name__", "") not in ("causal_mask_function", "bidirectional_mask_function"):
        raise ValueError("the peers' attention functions take no packed documents or windows: leave out document_boundaries")


def register() -> None:
    for name, peer in PEERS.items():

        def attention(module, q, k, v, mask, dropout=0.0, scaling=None, peer=peer, **kwargs):
            if dropout or q.shape[2] != k.shape[2]:
                raise ValueError(
                    "the peers' attention functions take no dropout and no cache: set attention_dropout to 0, use_cache to false"
                )
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            out = peer.attention(q, k, v, module.is_causal, q.shape[3] ** -0.5 if scaling is None else scaling)
            return out.transpose(1, 2).contiguous(), None

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask_function)


def main() -> None:
    if sys.argv[1:] in (["-h"], ["--help"]):
        return print(__doc__)
    found = len(sys.argv) > 1 and find_spec(f"scripts.{sys.argv[1]}")
    if not found:
        sys.exit("usage: python -m scripts.common.peers SCRIPT ARGUMENTS: run_clm, run_mlm or evaluate_lm, and what it takes")
    register()
    sys.argv = sys.argv[1:]
    runpy.run_module(found.name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

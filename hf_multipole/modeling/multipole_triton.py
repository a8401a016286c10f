"""Multipole attention on GPUs: the operator, its backward pass, and how their kernels are run."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

from .multipole_kernels import add_parts, backward_keys, backward_queries, backward_sinks, backward_summaries, forward
from .operators import define
from .triton_common import launch, tile_size, triton

# Of this copy of the file: to define an operator again, when the code of a checkpoint is loaded too, breaks the first one.
_NAMESPACE = __name__.replace(".", "_")

_UNIT = 512  # tokens whose gradients a program for summaries, or for sinks, sums: enough to fill it, few enough for many programs


@lru_cache(maxsize=256)
def _table(columns: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """A row of integers a level. Kept, since the host waits for a copy to the device."""
    return torch.tensor([list(row) for row in zip(*columns)] or [[0]], dtype=torch.int32, device=device)


def _before(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts, initial=0))[: len(counts)]


def _dense(x: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    return {f"{name}_{letter}": stride for name, x in tensors.items() for letter, stride in zip("bhn", x.stride())}


class KernelBlocks(NamedTuple):
    """Arguments of the operator :func:`attention`."""

    q: torch.Tensor  # (batch, heads, slots, dim), whole blocks
    k: torch.Tensor  # (batch, kv_heads, slots, dim)
    v: torch.Tensor  # (batch, kv_heads, slots, value_dim)
    far_k: torch.Tensor  # float32 (batch, kv_heads, summaries, dim), level after level
    far_v: torch.Tensor
    log_counts: torch.Tensor | None  # float32 (batch or 1, kv_heads or 1, summaries): added to their logits, -inf where they stand for no
    # token; None where all groups are full, and size_weighting decides
    far_bias: torch.Tensor | None  # float32 (heads, levels)
    document: torch.Tensor | None  # (batch or 1, slots)
    first: torch.Tensor | None  # (batch, blocks), as in an Alignment
    last: torch.Tensor | None
    # (batch, kv_heads, lists, sinks, dim): tokens that blocks see besides; one list for all blocks, or one each
    sink_k: torch.Tensor | None
    sink_v: torch.Tensor | None
    sink_hidden: torch.Tensor | None  # (batch or 1, blocks, sinks) bool: which of them a block does not see
    begins: Sequence[int]  # of each level, the first group that far_k holds
    counts: Sequence[int]  # and how many from there on
    block_size: int
    rank: int
    first_block: int  # number of the first block in its row
    causal: bool
    size_weighting: bool
    scale: float
    softcap: float | None


def _arguments(given: KernelBlocks) -> dict:
    """What the kernels on queries and keys are called with, but for what is their own."""
    tensors = given.q, given.k, given.v, given.log_counts, given.document
    q, k, v, log_counts, document = (x if x is None else _dense(x) for x in tensors)
    far_k, far_v = given.far_k.contiguous(), given.far_v.contiguous()
    far_bias, counts, block_size, rank = given.far_bias, given.counts, given.block_size, given.rank
    batch, heads, slots, dim = q.shape
    kv_heads, summaries, value_dim = k.shape[1], far_k.shape[2], v.shape[-1]
    counts_b, counts_h = (0, 0) if log_counts is None else log_counts.expand(batch, kv_heads, -1).stride()[:2]
    return dict(
        q_=q, k_=k, v_=v, far_k_=far_k, far_v_=far_v, **_strides(q=q, k=k, v=v),
        counts_=log_counts, counts_b=counts_b, counts_h=counts_h,
        far_bias_=far_bias if far_bias is None else far_bias.contiguous(), biases=0 if far_bias is None else far_bias.shape[1],
        document_=document, document_b=0 if document is None else document.expand(batch, -1).stride(0),
        first_=given.first, last_=given.last,
        **_sinks(given),
        table=_table((tuple(given.begins), tuple(counts), _before(counts)), q.device), levels=len(counts), summaries=summaries,
        rows=batch * kv_heads, heads=heads, kv_heads=kv_heads, repeats=heads // kv_heads,
        blocks=slots // block_size, block_size=block_size, begin=given.first_block, RANK=rank, CAUSAL=given.causal,
        size=math.log2(block_size / rank) if given.size_weighting else None, scale=given.scale, softcap=given.softcap,
        DIM=dim, WIDTH=value_dim, BLOCK_D=tile_size(dim), BLOCK_W=tile_size(value_dim),
    )  # fmt: skip


def _sinks(given: KernelBlocks) -> dict:
    """Arguments for the sinks; without them None, sizes too, so that the kernels are those that know of none."""
    if given.sink_k is None:
        return dict.fromkeys(("sink_k_", "sink_v_", "hidden_", "hidden_b", "lists", "sinks"))
    hidden = given.sink_hidden.contiguous().view(torch.int8)
    own = dict(sink_k_=given.sink_k.contiguous(), sink_v_=given.sink_v.contiguous(), lists=given.sink_k.shape[2], sinks=hidden.shape[2])
    return own | dict(hidden_=hidden, hidden_b=hidden.expand(len(given.q), -1, -1).stride(0))


def _tiles(arguments: dict) -> tuple[dict, int]:
    """Tokens and columns of a tile, and warps of a program: what leaves no more than a few bytes outside of registers, compiled for
    compute capability 8.0 and 9.0 (tests/compiled_kernels.py). A 64 x 64 sum of float32 takes 32 registers of each of 128 threads;
    the backward passes hold two of them beside two tiles of logits. float32 has no tensor cores here, and takes more threads.
    """
    dim, single = max(arguments["BLOCK_D"], arguments["BLOCK_W"]), arguments["q_"].element_size() == 4
    if single:
        rows, columns, far, warps = (64, 32, 16, 8) if dim <= 64 else (32, 16, 16, 8) if dim <= 128 else (16, 16, 16, 4)
    else:
        rows, columns, far, warps = (64, 32, 32, 4) if dim <= 128 else (32, 32, 16, 4)
    most = tile_size(arguments["block_size"])
    tiles = dict(BLOCK_M=min(rows, most), BLOCK_N=min(columns, most), BLOCK_F=far, BLOCK_S=min(far, tile_size(arguments["sinks"] or 1)))
    return tiles, max(1, warps * min(rows, most) // rows)


def _over_blocks(arguments: dict, block: int, rows: int) -> tuple[int, dict]:
    """Programs of a kernel that takes ``block`` tokens of a block at once, and its arguments."""
    tiles = triton.cdiv(arguments["block_size"], block)
    return rows * arguments["blocks"] * tiles, arguments | {"tiles": tiles}


def _outputs(given: KernelBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    """The heads of a token side by side, as the projection that follows takes them without a copy."""
    q, (batch, heads, slots, _) = given.q, given.q.shape
    return q.new_empty(batch, slots, heads, given.v.shape[-1]).transpose(1, 2), q.new_empty(batch, heads, slots, dtype=torch.float32)


# What gradients are for.
_DIFFERENTIABLE = ("q", "k", "v", "far_k", "far_v", "log_counts", "far_bias", "sink_k", "sink_v")


def _forward(given: KernelBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    arguments, q = _arguments(given), given.q
    out, lse = _outputs(given)
    tiles, warps = _tiles(arguments)
    arguments |= dict(out_=out, lse_=lse, **_strides(out=out), **tiles)
    launch(forward, q.device, *_over_blocks(arguments, tiles["BLOCK_M"], q.shape[0] * q.shape[1]), num_warps=warps)
    return out, lse


def _gradients(q, k, v, far_k, far_v) -> list[torch.Tensor]:
    """Those of tokens laid out as they are, if without gaps; of summaries, contiguous."""
    contiguous = torch.contiguous_format
    of_tokens = [torch.empty_like(x) if x.stride(-1) == 1 else torch.empty_like(x, memory_format=contiguous) for x in (q, k, v)]
    return of_tokens + [torch.empty_like(x, memory_format=contiguous) for x in (far_k, far_v)]


def _sink_gradients(given: KernelBlocks, arguments: dict, warps: int) -> list[torch.Tensor]:
    """Those of the sinks' keys and values, after delta is known."""
    if given.sink_k is None:
        return [given.q.new_empty(0) for _ in range(2)]
    batch, kv_heads, lists, sinks, _ = given.sink_k.shape
    blocks, rows = arguments["blocks"], batch * kv_heads
    span = max(1, _UNIT // given.block_size) if lists == 1 else 1
    pieces, tiles = triton.cdiv(blocks, span), triton.cdiv(sinks, arguments["BLOCK_S"])
    parts = [given.q.new_empty(batch, kv_heads, pieces, sinks, x.shape[-1], dtype=torch.float32) for x in (given.sink_k, given.sink_v)]
    own = dict(part_k_=parts[0], part_v_=parts[1], span=span, pieces=pieces, tiles=tiles)
    launch(backward_sinks, given.q.device, rows * pieces * tiles, arguments | own, num_warps=warps)
    return [(x.sum(2, keepdim=True) if lists == 1 else x).to(like.dtype) for x, like in zip(parts, (given.sink_k, given.sink_v))]


def _backward(given: KernelBlocks, grads, outputs) -> tuple[torch.Tensor, ...]:
    (grad, grad_lse), (out, lse), arguments = grads, outputs, _arguments(given)
    q, k, v, far_k, far_v, log_counts, far_bias = (getattr(given, name) for name in _DIFFERENTIABLE[:7])
    counts, block_size, rank, causal, first_block = given.counts, given.block_size, given.rank, given.causal, given.first_block
    rows, repeats, levels, device = arguments["rows"], arguments["repeats"], len(counts), q.device
    grad = torch.zeros_like(out) if grad is None else _dense(grad)
    grads = _gradients(q, k, v, far_k, far_v)
    delta = torch.empty_like(lse)
    tiles, warps = _tiles(arguments)
    arguments |= dict(
        grad_=grad,
        grad_lse_=None if grad_lse is None else grad_lse.contiguous(),
        out_=out,
        lse_=lse,
        delta_=delta,
        **_strides(grad=grad, out=out),
        **tiles,
    )
    arguments |= dict(grad_q_=grads[0], grad_k_=grads[1], grad_v_=grads[2])
    arguments |= _strides(grad_q=grads[0], grad_k=grads[1], grad_v=grads[2])
    # The queries first: they make delta.
    launch(backward_queries, device, *_over_blocks(arguments, tiles["BLOCK_M"], rows * repeats), num_warps=warps)
    launch(backward_keys, device, *_over_blocks(arguments, tiles["BLOCK_N"], rows), num_warps=warps)
    of_sinks = _sink_gradients(given, arguments, warps)
    grad_counts, grad_bias = (q.new_zeros(0 if x is None else x.shape, dtype=torch.float32) for x in (log_counts, far_bias))
    if not levels:
        return *grads, grad_counts, grad_bias, *of_sinks

    # Blocks of queries in a program for summaries, a power of two.
    unit = max(2, triton.next_power_of_2(min(_UNIT // block_size, arguments["blocks"])))
    units = triton.cdiv(first_block % unit + arguments["blocks"], unit)
    pieces = [units * (unit // min(2 << level, unit)) for level in range(levels)]
    columns, parts = (2 if causal else 4) * rank, sum(pieces)
    part_k, part_v = (q.new_empty(rows, parts, columns, x.shape[-1], dtype=torch.float32) for x in (q, v))
    sums = q.new_empty(rows, repeats, parts, columns, dtype=torch.float32)
    tile = min(tiles["BLOCK_F"], tile_size(columns))
    arguments |= dict(part_k_=part_k, part_v_=part_v, sums_=sums, parts=parts, parts_table=_table((_before(pieces),), device))
    arguments |= dict(units=units, UNIT=unit, BLOCK_F=tile, groups=sum(counts), SIDES=1 if causal else 2)
    launch(backward_summaries, device, rows * units * levels * triton.cdiv(columns, tile), arguments, num_warps=warps)

    def add(parts: torch.Tensor, grad: torch.Tensor, width: int) -> None:
        width *= rank
        tile = min(1024, triton.next_power_of_2(width))
        own = dict(parts_=parts, grad_=grad, WIDTH=width, BLOCK=tile, BLOCK_P=max(1, 4096 // tile), tiles=triton.cdiv(width, tile))
        launch(add_parts, device, rows * sum(counts) * own["tiles"], arguments | own)

    add(part_k, grads[3], q.shape[-1])
    add(part_v, grads[4], v.shape[-1])
    if log_counts is not None:
        every = q.new_empty(q.shape[0], k.shape[1], far_k.shape[2], dtype=torch.float32)
        add(sums.sum(1), every, 1)
        grad_counts = every.sum_to_size(log_counts.shape)
    if far_bias is not None:
        by_level = sums.sum(3).unflatten(0, k.shape[:2]).sum(0).split(pieces, 2)
        for level, x in enumerate(by_level):
            grad_bias[:, min(level, far_bias.shape[1] - 1)] += x.sum(2).flatten()
    return *grads, grad_counts, grad_bias, *of_sinks


# ``(KernelBlocks) -> (batch, heads, slots, value_dim)`` and, of each query, the logarithm to base 2 of the sum that normalises it:
# attention of whole blocks of queries to their neighbouring blocks, to the summaries that the hierarchy lists, and to sinks.
attention = define(_NAMESPACE + "::attention", KernelBlocks, _forward, _outputs, _backward, _DIFFERENTIABLE, outputs=2)

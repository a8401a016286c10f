"""The GPU kernel of a decoding step: attention of one more token in every row on the slots of state_slots.py."""

import math
from typing import NamedTuple

import torch

from .operators import define
from .triton_common import LOG2E, absorb, launch, load_rows, logits, tile_size, tl, triton

# Of this copy of the file: to define an operator again, when the code of a checkpoint is loaded too, breaks the first one.
_NAMESPACE = __name__.replace(".", "_")


@triton.jit
def _visible(slot, last, sinks, ring, groups, levels, block_size, RANK: tl.constexpr):
    """Which slots the token after ``last`` others sees, its own among them; and the level of each, counted from 0."""
    first = tl.maximum(last // block_size - 1, 0) * block_size  # of the near field
    place = slot - sinks
    near = (place >= 0) & (place < ring) & (last - (last + ring - place) % ring >= first)
    near |= slot < tl.minimum(sinks, first)
    far = place >= ring
    place = tl.maximum(place - ring, 0) // RANK
    level = tl.minimum(place // groups, levels)
    own = last // (block_size << level)
    group = own - 1 - (own - 1 + groups - place % groups) % groups
    far &= (level < levels) & (group >= 0) & (own - group >= 2) & (own // 2 - group // 2 <= 1)
    return near, far, level


@triton.jit(do_not_specialize=["length"])
def _step(
    q_, keys_, values_, lengths_, far_bias_, counts_, far_, out_,
    q_b, q_h, keys_b, keys_h, keys_n, values_b, values_h, values_n, far_b, far_h, far_n, counts_b, counts_h,
    length, kv_heads, repeats, slots, sinks, ring, groups, levels, block_size, biases, segments, size, scale, softcap,
    RANK: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a row and key head, whose query heads are its queries."""
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    last = length
    if lengths_ is not None:
        last = tl.load(lengths_ + row)
    repeat = tl.arange(0, BLOCK_M)
    real = repeat < repeats
    head = kv_head * repeats + repeat
    q = load_rows(q_ + row * q_b, head, q_h, real, DIM, BLOCK_D).to(tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if far_ is not None:  # as if it were one logit, which came first
        far_ += row * far_b + last // (block_size // RANK) % segments * far_n
        acc = load_rows(far_, head, far_h, real, WIDTH, BLOCK_W)
        top = tl.load(far_ + head.to(tl.int64) * far_h + WIDTH, real, 0.0) * LOG2E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    for start in range(0, slots, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        near, far, level = _visible(slot, last, sinks, ring, groups, levels, block_size, RANK)
        k = load_rows(keys_ + row * keys_b + kv_head * keys_h, slot, keys_n, near | far, DIM, BLOCK_D)
        v = load_rows(values_ + row * values_b + kv_head * values_h, slot, values_n, near | far, WIDTH, BLOCK_W)
        x, _ = logits(q, k, scale, softcap)
        bias = tl.zeros_like(x)
        if counts_ is not None:
            at = counts_ + row * counts_b + kv_head * counts_h + slot - sinks - ring
            bias += tl.load(at, far, 0.0)[None, :] * LOG2E
        elif size is not None:
            bias += tl.where(far, size + level, 0.0)[None, :]
        if far_bias_ is not None:
            column = tl.minimum(level, biases - 1)
            seen = real[:, None] & far[None, :]
            bias += tl.load(far_bias_ + (head * biases)[:, None] + column[None, :], seen, 0.0) * LOG2E
        x = tl.where((near | far)[None, :], x + bias, float("-inf"))
        acc, top, total = absorb(x, v, acc, top, total)
    column = tl.arange(0, BLOCK_W)
    at = (row * kv_heads * repeats + head)[:, None] * WIDTH + column
    tl.store(out_ + at, acc / total[:, None], real[:, None] & (column < WIDTH))


class Step(NamedTuple):
    """Arguments of the operator :func:`step`."""

    q: torch.Tensor  # (batch, heads, dim)
    keys: torch.Tensor  # float32 (batch, kv_heads, slots, dim): sinks, the first tokens of the row; ring slots of tokens; then, of each
    # level, groups of rank summaries
    values: torch.Tensor
    lengths: torch.Tensor | None  # (batch,) int32: tokens before; or everywhere
    length: int
    far_bias: torch.Tensor | None  # (heads, levels)
    far: torch.Tensor | None  # in place of summaries, float32 (batch, heads, segments, value_dim + 1): mean and log-sum-exp of segment s of
    # block_size / rank tokens in slot s % segments
    sinks: int
    ring: int
    groups: int
    block_size: int
    rank: int
    size_weighting: bool
    scale: float
    softcap: float | None
    log_counts: torch.Tensor | None  # float32 (batch, kv_heads or 1, slots of summaries): added to their logits, -inf where they stand for
    # no token; None where all stand for their groups' tokens, and size_weighting decides


def _run(given: Step) -> torch.Tensor:
    tensors = given.q, given.keys, given.values, given.far, given.log_counts
    q, keys, values, far, counts = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)
    far_bias, sinks, ring, groups, block_size, rank = given.far_bias, given.sinks, given.ring, given.groups, given.block_size, given.rank
    batch, heads, dim = q.shape
    kv_heads, slots, width = keys.shape[1], keys.shape[2], values.shape[-1]
    out = keys.new_empty(batch, heads, width)
    strides = dict(zip(("q_b", "q_h"), q.stride()))
    if counts is not None:
        counts = counts.expand(batch, kv_heads, -1)
    for name, x in (("keys", keys), ("values", values), ("far", far), ("counts", counts)):
        strides |= {f"{name}_{letter}": stride for letter, stride in zip("bhn", (0, 0, 0) if x is None else x.stride())}
    arguments = strides | dict(
        q_=q, keys_=keys, values_=values, lengths_=given.lengths, length=given.length, out_=out,
        far_bias_=far_bias if far_bias is None else far_bias.contiguous(), biases=0 if far_bias is None else far_bias.shape[1],
        counts_=counts, far_=far, segments=0 if far is None else far.shape[2],
        kv_heads=kv_heads, repeats=heads // kv_heads, slots=slots, sinks=sinks, ring=ring, groups=groups,
        levels=(slots - sinks - ring) // (groups * rank),
        block_size=block_size, size=math.log2(block_size / rank) if given.size_weighting else None,
        scale=given.scale, softcap=given.softcap, RANK=rank,
        DIM=dim, WIDTH=width, BLOCK_D=tile_size(dim), BLOCK_W=tile_size(width),
        BLOCK_M=tile_size(heads // kv_heads), BLOCK_N=32 if max(dim, width) <= 128 else 16,
    )  # fmt: skip
    launch(_step, q.device, batch * kv_heads, arguments)
    return out


# ``(Step) -> float32 (batch, heads, value_dim)``: attention of one token in every row. There is no gradient.
step = define(_NAMESPACE + "::step", Step, _run, lambda given: given.keys.new_empty(*given.q.shape[:2], given.values.shape[-1]))

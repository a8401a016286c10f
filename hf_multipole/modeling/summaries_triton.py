"""GPU kernels of group summaries: the map of a group's tokens to its summaries, forward and backward, each tensor read once.

They are bound by memory; what a program sums is elementwise until its end, and weights, which all groups share, stay in the cache.
The merge of the hierarchical summaries is the same map, of the ``2 * rank`` summaries of two children. Tokens may be weighed by masses;
without them the kernels have no trace of them.
"""

import torch

from .triton_common import launch, round_to, tl, triton

# Of this copy of the file: to define an operator again, when the code of a checkpoint is loaded too, breaks the first one.
_NAMESPACE = __name__.replace(".", "_")

_ELEMENTS = 4096  # of a tile of products (summaries, tokens, channels): 32 registers of each of 128 threads
_GROUPS = 256  # whose part of the weights' gradient one program sums


@triton.jit
def _forward(
    x_, weight_, masses_, out_, x_b, x_h, x_g, x_n, masses_b, masses_h, masses_g, masses_n, heads, groups, width, tiles,
    RANK: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(0) // tiles % groups
    row = (tl.program_id(0) // tiles // groups).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    x_ += row // heads * x_b + row % heads * x_h + group.to(tl.int64) * x_g
    weight_ += row % heads * RANK * width * DIM
    if masses_ is not None:
        masses_ += row // heads * masses_b + row % heads * masses_h + group.to(tl.int64) * masses_g
    acc = tl.zeros([BLOCK_R, BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, width, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        x = tl.load(x_ + t[:, None].to(tl.int64) * x_n + channel, (t < width)[:, None] & (channel < DIM), 0.0).to(tl.float32)
        if masses_ is not None:
            x *= tl.load(masses_ + t.to(tl.int64) * masses_n, t < width, 0.0)[:, None]
        at = ((r * width)[:, None] + t)[:, :, None] * DIM + channel
        weight = tl.load(weight_ + at, ((r < RANK)[:, None] & (t < width))[:, :, None] & (channel < DIM), 0.0)
        acc += x[None] * weight.to(tl.float32)
    at = (row * groups + group) * RANK * DIM + r[:, None] * DIM + channel
    tl.store(out_ + at, tl.sum(acc, 1), (r < RANK)[:, None] & (channel < DIM))


@triton.jit
def _backward_tokens(
    grad_x_, grad_, weight_, x_, masses_, grad_masses_, grad_x_b, grad_x_h, grad_x_g, grad_x_n, x_b, x_h, x_g, x_n,
    masses_b, masses_h, masses_g, masses_n, heads, groups, width, tiles,
    RANK: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to what other uses of the tokens gave, in float32; also makes the gradient of masses, where there is room for it."""
    t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.program_id(0) // tiles % groups
    row = (tl.program_id(0) // tiles // groups).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    real = (t < width)[:, None] & (channel < DIM)
    grad_x_ += row // heads * grad_x_b + row % heads * grad_x_h + group.to(tl.int64) * grad_x_g
    grad_ += (row * groups + group) * RANK * DIM
    weight_ += row % heads * RANK * width * DIM
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        grad = tl.load(grad_ + r[:, None] * DIM + channel, (r < RANK)[:, None] & (channel < DIM), 0.0)
        at = ((r * width)[:, None] + t)[:, :, None] * DIM + channel
        weight = tl.load(weight_ + at, (r < RANK)[:, None, None] & real[None], 0.0)
        acc += tl.sum(grad[:, None] * weight.to(tl.float32), 0)
    if grad_masses_ is not None:
        x_ += row // heads * x_b + row % heads * x_h + group.to(tl.int64) * x_g
        x = tl.load(x_ + t[:, None].to(tl.int64) * x_n + channel, real, 0.0).to(tl.float32)
        tl.store(grad_masses_ + (row * groups + group) * width + t, tl.sum(acc * x, 1), t < width)
    if masses_ is not None:
        masses_ += row // heads * masses_b + row % heads * masses_h + group.to(tl.int64) * masses_g
        acc *= tl.load(masses_ + t.to(tl.int64) * masses_n, t < width, 0.0)[:, None]
    acc += tl.load(grad_x_ + t[:, None].to(tl.int64) * grad_x_n + channel, real, 0.0).to(tl.float32)
    tl.store(grad_x_ + t[:, None].to(tl.int64) * grad_x_n + channel, round_to(acc, grad_x_.dtype.element_ty), real)


@triton.jit
def _backward_weights(
    x_, grad_, masses_, parts_, x_b, x_h, x_g, x_n, masses_b, masses_h, masses_g, masses_n,
    batch, heads, groups, width, tiles_t, tiles_r,
    RANK: tl.constexpr, DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Parts ``(parts, heads, rank, width, dim)`` of GROUPS groups each, counted over the rows of the batch."""
    t = tl.program_id(0) % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(0) // tiles_t % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    head = (tl.program_id(0) // tiles_t // tiles_r % heads).to(tl.int64)
    part = tl.program_id(0) // tiles_t // tiles_r // heads
    channel = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_R, BLOCK_T, BLOCK_D], tl.float32)
    for i in range(part * GROUPS, tl.minimum((part + 1) * GROUPS, batch * groups)):
        row, group = (i // groups).to(tl.int64), (i % groups).to(tl.int64)
        start = x_ + row * x_b + head * x_h + group * x_g
        x = tl.load(start + t[:, None].to(tl.int64) * x_n + channel, (t < width)[:, None] & (channel < DIM), 0.0).to(tl.float32)
        if masses_ is not None:
            start = masses_ + row * masses_b + head * masses_h + group * masses_g
            x *= tl.load(start + t.to(tl.int64) * masses_n, t < width, 0.0)[:, None]
        start = grad_ + ((row * heads + head) * groups + group) * RANK * DIM
        grad = tl.load(start + r[:, None] * DIM + channel, (r < RANK)[:, None] & (channel < DIM), 0.0)
        acc += x[None] * grad[:, None]
    at = (((part * heads + head) * RANK + r) * width)[:, None] + t
    tl.store(parts_ + at[:, :, None] * DIM + channel, acc, ((r < RANK)[:, None] & (t < width))[:, :, None] & (channel < DIM))


def _strides(**tensors: torch.Tensor | None) -> dict[str, int | None]:
    """Of ``(batch, heads, groups, tokens, ...)``."""
    return {f"{name}_{letter}": None if x is None else x.stride(i) for name, x in tensors.items() for i, letter in enumerate("bhgn")}


def _arguments(x: torch.Tensor, weight: torch.Tensor, masses: torch.Tensor | None) -> dict:
    batch, heads, groups, width, dim = x.shape
    rank = weight.shape[1]
    block_r, block_d = min(8, triton.next_power_of_2(rank)), triton.next_power_of_2(dim)
    block_t = max(1, min(triton.next_power_of_2(width), _ELEMENTS // (block_r * block_d)))
    sizes = dict(batch=batch, heads=heads, groups=groups, width=width, RANK=rank, DIM=dim)
    tensors = dict(x_=x, weight_=weight.contiguous(), masses_=masses)
    return tensors | _strides(x=x, masses=masses) | sizes | dict(BLOCK_R=block_r, BLOCK_T=block_t, BLOCK_D=block_d)


@torch.library.custom_op(_NAMESPACE + "::depthwise_map", mutates_args=())
def depthwise_map(x: torch.Tensor, weight: torch.Tensor, masses: torch.Tensor | None) -> torch.Tensor:
    """The operator of summaries.py by this name."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    arguments = _arguments(x, weight, masses)
    batch, heads, groups, _, dim = x.shape
    tiles = triton.cdiv(weight.shape[1], arguments["BLOCK_R"])
    out = x.new_empty(batch, heads, groups, weight.shape[1], dim, dtype=torch.float32)
    launch(_forward, x.device, batch * heads * groups * tiles, arguments | dict(out_=out, tiles=tiles))
    return out


@torch.library.custom_op(_NAMESPACE + "::depthwise_map_backward_", mutates_args=("grad_x",))
def depthwise_map_backward_(
    grad_x: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, masses: torch.Tensor | None, of_masses: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of summaries.py by this name."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, groups, width, dim = x.shape
    arguments = _arguments(x, weight, masses)
    tiles_t, tiles_r = triton.cdiv(width, arguments["BLOCK_T"]), triton.cdiv(weight.shape[1], arguments["BLOCK_R"])
    parts = x.new_empty(triton.cdiv(batch * groups, _GROUPS), *weight.shape, dtype=torch.float32)
    arguments |= dict(grad_=grad.contiguous(), parts_=parts, tiles_t=tiles_t, tiles_r=tiles_r, GROUPS=_GROUPS)
    launch(_backward_weights, x.device, len(parts) * heads * tiles_r * tiles_t, arguments)
    dense = grad_x if grad_x.stride(-1) == 1 else grad_x.contiguous()
    grad_masses = grad.new_empty(masses.shape if of_masses else 0)
    arguments |= dict(grad_x_=dense, grad_masses_=grad_masses if of_masses else None, tiles=tiles_t) | _strides(grad_x=dense)
    launch(_backward_tokens, x.device, batch * heads * groups * tiles_t, arguments)
    if dense is not grad_x:
        grad_x.copy_(dense)
    return parts.sum(0).to(weight.dtype), grad_masses


@depthwise_map.register_fake
def _(x, weight, masses):
    return x.new_empty(*x.shape[:3], weight.shape[1], x.shape[-1], dtype=torch.float32)


@depthwise_map_backward_.register_fake
def _(grad_x, grad, x, weight, masses, of_masses):
    return torch.empty_like(weight, memory_format=torch.contiguous_format), grad.new_empty(masses.shape if of_masses else 0)

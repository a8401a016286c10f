"""What the GPU kernels share: Triton itself, parts of kernels, and how they are run.

The only file that imports Triton; it is loaded when a kernel runs, not before.
"""

import os
from contextlib import nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the GPU kernels need Triton: pip install 'triton>=3.3', or pass backend='torch'") from error

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    raise ImportError(
        f"the GPU kernels need Triton 3.3 or later, but this is {triton.__version__}: "
        "upgrade PyTorch, which brings it, or pass backend='torch'"
    )

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)


# Parts of kernels. An argument that is None is left out when the kernel is compiled.


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """To a dtype, from float32 to the nearest; Triton's interpreter would cut bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + (bits >> 16 & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b):
    if INTERPRETED:  # Triton's interpreter would multiply the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_rows(start, row, stride, seen, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``(rows, BLOCK)`` of a tensor, zeros where not seen and after DIM."""
    column = tl.arange(0, BLOCK)
    if DIM == BLOCK:
        return tl.load(start + row[:, None].to(tl.int64) * stride + column, seen[:, None], 0.0)
    return tl.load(start + row[:, None].to(tl.int64) * stride + column, seen[:, None] & (column < DIM), 0.0)


@triton.jit
def store_rows(start, row, stride, seen, x, DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(start + row[:, None].to(tl.int64) * stride + column, round_to(x, start.dtype.element_ty), seen[:, None] & (column < DIM))


@triton.jit
def logits(a, b, scale, softcap):
    """Logits of all pairs of rows, and the derivative of the cap."""
    x = dot(a, tl.trans(b)) * scale
    slope = 1.0
    if softcap is not None:
        decay = tl.exp2(tl.abs(x) * (-2 * LOG2E / softcap))
        tanh = (1 - decay) / (1 + decay)
        slope = 1 - tanh * tanh
        x = tl.where(x < 0, -softcap, softcap) * tanh
    return x * LOG2E, slope


@triton.jit
def absorb(x, v, acc, top, total):
    """One tile of logits and values into the running softmax: sum of values, greatest logit, sum of weights."""
    new = tl.maximum(top, tl.max(x, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # of a query that has seen nothing yet
    weights = tl.exp2(x - base[:, None])
    decay = tl.exp2(top - base)
    acc = acc * decay[:, None] + dot(round_to(weights, v.dtype), v)
    return acc, new, total * decay + tl.sum(weights, 1)


# Launches


def tile_size(n: int) -> int:
    return max(16, triton.next_power_of_2(n))  # products of tiles take at least 16


def launch(kernel, device: torch.device, programs: int, arguments: dict, num_warps: int = 4, num_stages: int = 2) -> None:
    """Runs a kernel on those of the arguments that it has."""
    given = {name: arguments[name] for name in kernel.arg_names}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**given, num_warps=num_warps, num_stages=num_stages)

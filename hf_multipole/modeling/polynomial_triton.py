"""GPU kernels of the near-linear path of tensor attention, in float32: the features, and the causal sums of order 3.

A program of the causal sums holds a tile of both states, some features by some channels, in registers, and takes the tokens of a
chunk one by one: no pairs of tokens, and no more additions a number than the certificate counts. What the tiles of one token add up
to is summed afterwards, always in the same order. The backward pass goes through a chunk forwards, then back again, and takes the
tokens off the states; chunks are short, so that little is lost.
"""

import math
from functools import lru_cache

import torch

from .triton_common import tl, triton

# Of this copy of the file: to define an operator again, when the code of a checkpoint is loaded too, breaks the first one.
_NAMESPACE = __name__.replace(".", "_")
# Tokens of a chunk of the causal sums.
CHUNK = 16
# Features and channels of a tile: two states and two sums of their gradients take 128 registers of the threads of one warp.
_FEATURES = 32
_CHANNELS = 32
# Rows of a tile of features.
_ROWS = 16


# Features


@lru_cache(maxsize=64)
def _variables(dim: int, degree: int, device: torch.device) -> torch.Tensor:
    """Of each feature, in the order of ``features``, the variables that it multiplies ``(count, degree)``; ``dim`` stands for 1."""
    level, levels = torch.full((1, degree), dim, dtype=torch.int32), []
    for power in range(degree + 1):
        levels.append(level)
        if power < degree:
            level = torch.cat([level[: math.comb(v + power, v)] for v in range(dim)])
            level[:, power] = torch.cat([torch.full((math.comb(v + power, v),), v, dtype=torch.int32) for v in range(dim)])
    return torch.cat(levels).to(device)


@triton.jit
def _features_kernel(x, variables, out, rows, count, DIM: tl.constexpr, DEGREE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    row, feature = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    inside = (row < rows)[:, None] & (feature < count)[None, :]
    row = row.to(tl.int64)[:, None]
    product = tl.full((M, N), 1.0, tl.float32)
    for i in range(0, DEGREE):
        variable = tl.load(variables + feature * DEGREE + i, mask=feature < count, other=DIM)[None, :]
        product *= tl.load(x + row * DIM + variable, mask=inside & (variable < DIM), other=1.0)
    tl.store(out + row * count + feature[None, :], product, mask=inside)


@triton.jit
def _features_backward_kernel(
    grad, x, variables, out, rows, count,
    DIM: tl.constexpr, DEGREE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, D)
    total = tl.full((M, D), 0.0, tl.float32)
    for start in range(0, count, N):
        feature = start + tl.arange(0, N)
        inside = (row < rows)[:, None] & (feature < count)[None, :]
        upstream = tl.load(grad + row.to(tl.int64)[:, None] * count + feature[None, :], mask=inside, other=0.0)
        for i in range(0, DEGREE):
            # The product of all variables but the i-th is the derivative by it.
            product = upstream
            for j in range(0, DEGREE):
                if i != j:
                    variable = tl.load(variables + feature * DEGREE + j, mask=feature < count, other=DIM)[None, :]
                    product *= tl.load(x + row.to(tl.int64)[:, None] * DIM + variable, mask=inside & (variable < DIM), other=1.0)
            variable = tl.load(variables + feature * DEGREE + i, mask=feature < count, other=DIM)
            total = tl.dot(product, (variable[:, None] == column[None, :]).to(tl.float32), total, input_precision="ieee")
    tl.store(out + row.to(tl.int64)[:, None] * DIM + column[None, :], total, mask=(row < rows)[:, None] & (column < DIM)[None, :])


@torch.library.custom_op(_NAMESPACE + "::feature_map", mutates_args=())
def feature_map(x: torch.Tensor, degree: int) -> torch.Tensor:
    """All monomials of the last dimension of at most ``degree``, as by ``polynomial_attention.features``: ``(..., count)``."""
    variables = _variables(x.shape[-1], degree, x.device)
    rows, count = x.shape[:-1].numel(), len(variables)
    out = x.new_empty(*x.shape[:-1], count)
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(count, 64)
    with torch.cuda.device_of(x):
        _features_kernel[grid](x.contiguous(), variables, out, rows, count, x.shape[-1], degree, _ROWS, 64, num_warps=4)
    return out


@torch.library.custom_op(_NAMESPACE + "::feature_map_backward", mutates_args=())
def feature_map_backward(grad: torch.Tensor, x: torch.Tensor, degree: int) -> torch.Tensor:
    variables, dim = _variables(x.shape[-1], degree, x.device), x.shape[-1]
    rows, out = x.shape[:-1].numel(), torch.empty_like(x, memory_format=torch.contiguous_format)
    tiles = dim, degree, _ROWS, _FEATURES, max(16, triton.next_power_of_2(dim))
    arguments = grad.contiguous(), x.contiguous(), variables, out, rows, len(variables)
    with torch.cuda.device_of(x):
        _features_backward_kernel[(triton.cdiv(rows, _ROWS),)](*arguments, *tiles, num_warps=4)
    return out


@feature_map.register_fake
def _(x, degree):
    return x.new_empty(*x.shape[:-1], math.comb(x.shape[-1] + degree, degree))


@feature_map_backward.register_fake
def _(grad, x, degree):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    x, ctx.degree = inputs
    ctx.save_for_backward(x)


feature_map.register_autograd(lambda ctx, grad: (feature_map_backward(grad, *ctx.saved_tensors, ctx.degree), None), setup_context=_save)


# Causal sums: groups are rows and heads of keys side by side


@triton.jit
def _states(before, group, chunk, groups, chunks, feature, channel, count, width, inside):
    """Both states before a chunk, tiles of ``(2, groups, chunks, count, width)``."""
    place = ((group * chunks + chunk) * count + feature[:, None]) * width + channel[None, :]
    other = place + groups * chunks * count * width
    return tl.load(before + place, mask=inside, other=0.0), tl.load(before + other, mask=inside, other=0.0)


@triton.jit
def _token(keys, values, place, feature, channel, count, width):
    """A token's features and values."""
    key = tl.load(keys + place * count + feature, mask=feature < count, other=0.0)
    return key, tl.load(values + place * width + channel, mask=channel < width, other=0.0)


@triton.jit
def _outer(keys, values, place, feature, channel, count, width):
    """What a token adds to a state."""
    key, value = _token(keys, values, place, feature, channel, count, width)
    return key[:, None] * value[None, :]


@triton.jit
def _sums_kernel(
    rows, keys, values, before, out, groups, tokens, count, width,
    REPEATS: tl.constexpr, CHUNK: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    chunks, groups = tl.cdiv(tokens, CHUNK), tl.cast(groups, tl.int64)
    group, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    feature, channel = tl.program_id(1) * F + tl.arange(0, F), tl.program_id(2) * C + tl.arange(0, C)
    real, kept = feature < count, channel < width
    first, second = _states(before, group, chunk, groups, chunks, feature, channel, count, width, real[:, None] & kept[None, :])
    other = groups * tokens
    out += tl.program_id(1) * other * REPEATS * width
    for token in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, tokens)):
        first += _outer(keys, values, group * tokens + token, feature, channel, count, width)
        second += _outer(keys, values, other + group * tokens + token, feature, channel, count, width)
        product = first * second
        for head in range(0, REPEATS):
            place = (group * REPEATS + head) * tokens + token
            row = tl.load(rows + place * count + feature, mask=real, other=0.0)
            tl.store(out + place * width + channel, tl.sum(row[:, None] * product, 0), mask=kept)


@triton.jit
def _sums_backward_kernel(
    grad, rows, keys, values, before, of_rows, of_keys, of_values, of_before, groups, tokens, count, width,
    REPEATS: tl.constexpr, CHUNK: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    chunks, groups = tl.cdiv(tokens, CHUNK), tl.cast(groups, tl.int64)
    group, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    feature, channel = tl.program_id(1) * F + tl.arange(0, F), tl.program_id(2) * C + tl.arange(0, C)
    real, kept = feature < count, channel < width
    inside = real[:, None] & kept[None, :]
    first, second = _states(before, group, chunk, groups, chunks, feature, channel, count, width, inside)
    other = groups * tokens
    # Every tile of channels has its own sums over them, every tile of features its own over those.
    of_rows += tl.program_id(2) * other * REPEATS * count
    of_keys += tl.program_id(2) * 2 * other * count
    of_values += tl.program_id(1) * 2 * other * width
    start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, tokens)
    for token in range(start, stop):
        first += _outer(keys, values, group * tokens + token, feature, channel, count, width)
        second += _outer(keys, values, other + group * tokens + token, feature, channel, count, width)
        product = first * second
        for head in range(0, REPEATS):
            place = (group * REPEATS + head) * tokens + token
            upstream = tl.load(grad + place * width + channel, mask=kept, other=0.0)
            tl.store(of_rows + place * count + feature, tl.sum(product * upstream[None, :], 1), mask=real)
    of_first, of_second = tl.full((F, C), 0.0, tl.float32), tl.full((F, C), 0.0, tl.float32)
    for back in range(0, stop - start):
        token = stop - 1 - back
        of_product = tl.full((F, C), 0.0, tl.float32)
        for head in range(0, REPEATS):
            place = (group * REPEATS + head) * tokens + token
            row = tl.load(rows + place * count + feature, mask=real, other=0.0)
            of_product += row[:, None] * tl.load(grad + place * width + channel, mask=kept, other=0.0)[None, :]
        of_first += of_product * second
        of_second += of_product * first
        place = group * tokens + token
        key, value = _token(keys, values, place, feature, channel, count, width)
        tl.store(of_keys + place * count + feature, tl.sum(of_first * value[None, :], 1), mask=real)
        tl.store(of_values + place * width + channel, tl.sum(of_first * key[:, None], 0), mask=kept)
        first -= key[:, None] * value[None, :]
        place += other
        key, value = _token(keys, values, place, feature, channel, count, width)
        tl.store(of_keys + place * count + feature, tl.sum(of_second * value[None, :], 1), mask=real)
        tl.store(of_values + place * width + channel, tl.sum(of_second * key[:, None], 0), mask=kept)
        second -= key[:, None] * value[None, :]
    place = ((group * chunks + chunk) * count + feature[:, None]) * width + channel[None, :]
    tl.store(of_before + place, of_first, mask=inside)
    tl.store(of_before + groups * chunks * count * width + place, of_second, mask=inside)


def _grid(keys, values):
    (_, groups, tokens, count), width = keys.shape, values.shape[-1]
    tiles = triton.cdiv(count, _FEATURES), triton.cdiv(width, _CHANNELS)
    return (groups * triton.cdiv(tokens, CHUNK), *tiles), (groups, tokens, count, width)


@torch.library.custom_op(_NAMESPACE + "::causal_sums", mutates_args=())
def causal_sums(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """What each token reads from both states after it has joined them: the sum over features of row * first * second.

    rows: features of the queries, times their weights, ``(groups, repeats, tokens, count)``; keys: features ``(2, groups, tokens,
    count)``; values: ``(2, groups, tokens, width)``; before: the states before each chunk, ``(2, groups, chunks, count, width)``; all
    float32. Returns ``(groups, repeats, tokens, width)``.
    """
    grid, sizes = _grid(keys, values)
    out = rows.new_empty(grid[1], *rows.shape[:3], values.shape[-1])
    tensors = (x.contiguous() for x in (rows, keys, values, before))
    with torch.cuda.device_of(rows):
        _sums_kernel[grid](*tensors, out, *sizes, rows.shape[1], CHUNK, _FEATURES, _CHANNELS, num_warps=1)
    return out.sum(0)


@torch.library.custom_op(_NAMESPACE + "::causal_sums_backward", mutates_args=())
def causal_sums_backward(
    grad: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, before: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grid, sizes = _grid(keys, values)
    parts = [x.new_empty(tiles, *x.shape) for x, tiles in ((rows, grid[2]), (keys, grid[2]), (values, grid[1]))]
    of_before = torch.empty_like(before, memory_format=torch.contiguous_format)
    tensors = (x.contiguous() for x in (grad, rows, keys, values, before))
    with torch.cuda.device_of(rows):
        _sums_backward_kernel[grid](*tensors, *parts, of_before, *sizes, rows.shape[1], CHUNK, _FEATURES, _CHANNELS, num_warps=1)
    of_rows, of_keys, of_values = (part.sum(0) for part in parts)
    return of_rows, of_keys, of_values, of_before


@causal_sums.register_fake
def _(rows, keys, values, before):
    return rows.new_empty(*rows.shape[:3], values.shape[-1])


@causal_sums_backward.register_fake
def _(grad, *tensors):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


causal_sums.register_autograd(
    lambda ctx, grad: causal_sums_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

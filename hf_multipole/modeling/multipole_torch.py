"""The PyTorch path of multipole attention: one operator on blocks, with its backward pass.

The whole computation is one operator on blocks. A query block's columns are the keys of two or three neighbouring blocks and
the summaries that the hierarchy lists for it, copied side by side; one softmax runs over them all. Blocks are handled a few
at a time, so that logits stay in the cache and memory is linear in n; the backward pass computes them again.
"""

import math
import threading
from typing import NamedTuple

import torch

from .hierarchy import near_offsets
from .operators import define
from .private import softmax_backward

# Of this copy of the file: to define an operator again, when the code of a checkpoint is loaded too, breaks the first one.
_NAMESPACE = __name__.replace(".", "_")

# Logits computed at once: 1 MiB of float32 a CPU thread, which stays in its cache; on other devices, enough to fill them.
_LOGITS_PER_THREAD = 2**18
_LOGITS_ON_DEVICE = 2**26


def _blocks_at_once(rows: int, columns: int, device: torch.device) -> int:
    logits = _LOGITS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _LOGITS_ON_DEVICE
    return max(1, logits // max(1, rows * columns))


_arena = threading.local()


def _buffers(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Uninitialised work space. On the CPU it is kept from call to call: fresh pages cost more than the copies into them."""
    sizes = [math.prod(shape) for shape in shapes]
    if device.type != "cpu":
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    kept = getattr(_arena, str(dtype), None)
    if kept is None or kept.numel() < sum(sizes):
        # Not an inference tensor, even when first needed in inference mode.
        with torch.inference_mode(False):
            kept = torch.empty(sum(sizes), dtype=dtype)
        setattr(_arena, str(dtype), kept)
    return [part.view(shape) for part, shape in zip(kept[: sum(sizes)].split(sizes), shapes)]


def dropout_factors(shape: tuple[int, ...], p: float, generator: torch.Generator, first: int) -> torch.Tensor:
    """Factors of the attention weights of the blocks from ``first`` on: 0 with probability ``p``, else ``1 / (1 - p)``.

    shape: ``(blocks, rows, columns)``. Tests put their own factors here.
    """
    keep = torch.rand(shape, generator=generator, device=generator.device) >= p
    return keep / (1 - p)


class Blocks(NamedTuple):
    """Arguments of the operator :func:`block_attention`. A block's rows are the queries of all heads of one key head."""

    q: torch.Tensor  # (blocks, repeats * block_size, dim), the blocks of all rows of the batch and key heads one after another
    k: torch.Tensor  # (blocks, block_size, dim)
    v: torch.Tensor  # (blocks, block_size, value_dim)
    far_k: torch.Tensor  # (summaries of all rows and key heads, dim), in the compute dtype
    far_v: torch.Tensor  # (summaries, value_dim)
    far_index: torch.Tensor  # (blocks, columns): the summaries that a block sees
    far_bias: torch.Tensor  # (blocks, repeats or 1, columns): what is added to their logits, -inf where they are hidden
    document: torch.Tensor | None  # (blocks, block_size): tokens of different numbers do not see each other
    causal: bool
    row_blocks: int  # blocks in a row; there are no neighbours beyond
    scale: float
    softcap: float | None
    dropout_p: float
    seed: torch.Tensor | None  # () int64, of the dropout


class BlockWork:
    """The buffers and the pieces of one pass over the blocks."""

    def __init__(self, given: Blocks):
        q, k, v, far_k, far_v = given.q, given.k, given.v, given.far_k, given.far_v
        self.q, self.k, self.v, self.far_k, self.far_v = q, k, v, far_k, far_v
        self.far_index, self.far_bias, self.document = given.far_index, given.far_bias, given.document
        self.row_blocks, self.scale, self.softcap = given.row_blocks, given.scale, given.softcap
        self.dropout_p, self.seed = given.dropout_p, given.seed
        self.blocks, self.rows, self.dim = q.shape
        self.block_size = k.shape[1]
        self.offsets = near_offsets(given.row_blocks, given.causal)
        self.near = len(self.offsets) * self.block_size
        self.columns = self.drawn = self.near + given.far_index.shape[1]  # those of logits, and of dropout
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.step = min(self.blocks, _blocks_at_once(self.rows, self.columns, q.device))
        self.future = None
        if given.causal:
            own = torch.ones(self.block_size, self.block_size, dtype=torch.bool, device=q.device).triu(1)
            self.future = torch.cat([torch.zeros_like(own)] * (len(self.offsets) - 1) + [own], 1)
            self.future_bias = torch.zeros(self.future.shape, dtype=self.dtype, device=q.device).masked_fill_(self.future, -torch.inf)
        # A masked product of 0 and infinity is NaN: where keys or values are not finite, masking takes a careful form.
        total = k.sum(dtype=self.dtype) + v.sum(dtype=self.dtype) + far_k.sum(dtype=self.dtype) + far_v.sum(dtype=self.dtype)
        self.finite = bool(torch.isfinite(total))

    def buffers(self, *sizes) -> list[torch.Tensor]:
        return _buffers(self.q.device, self.dtype, *((self.step, *size) for size in sizes))

    def parts(self):
        for start in range(0, self.blocks, self.step):
            yield start, min(self.blocks, start + self.step)

    def neighbours(self, start, stop):
        """For each near offset: the slice of columns, the blocks of the part that have a neighbour, and those neighbours."""
        for i, offset in enumerate(self.offsets):
            low = min(max(start + offset, 0), self.blocks)
            high = max(low, min(stop + offset, self.blocks))
            own = slice(low - offset - start, high - offset - start)
            yield slice(i * self.block_size, (i + 1) * self.block_size), own, slice(low, high)

    def gather(self, near, far, start, stop, out) -> torch.Tensor:
        """Near tokens and far summaries of each block, side by side: ``(blocks, columns, dim)``."""
        out = out[: stop - start]
        for columns, own, others in self.neighbours(start, stop):
            out[own, columns].copy_(near[others])
            if own.start > 0:
                out[: own.start, columns].zero_()
            if own.stop < stop - start:
                out[own.stop :, columns].zero_()
        if self.columns > self.near:
            rows = far.index_select(0, self.far_index[start:stop].reshape(-1))
            out[:, self.near :].copy_(rows.view(stop - start, -1, far.shape[-1]))
        return out

    def scatter(self, grad, start, stop, near, far) -> None:
        """The transpose of ``gather``, added to ``near`` and ``far``."""
        for columns, own, others in self.neighbours(start, stop):
            near[others].add_(grad[own, columns])
        if self.columns > self.near:
            far.index_add_(0, self.far_index[start:stop].reshape(-1), grad[:, self.near :].reshape(-1, far.shape[-1]))

    def hidden(self, start, stop) -> torch.Tensor:
        """The documents' part of the near mask: ``(blocks, block_size, near)`` bool."""
        document = self.document[start:stop]
        seen = document.new_full((stop - start, self.near), -2)
        for columns, own, others in self.neighbours(start, stop):
            seen[own, columns] = self.document[others]
        return document[:, :, None] != seen[:, None]

    def mask(self, logits, start, stop) -> None:
        """Hides columns of ``logits`` ``(blocks, repeats, block_size, columns)`` and adds the far bias, in place."""
        near, far = logits[..., : self.near], logits[..., self.near :]
        if self.document is not None:
            near.masked_fill_(self.hidden(start, stop)[:, None], -torch.inf)
        if self.future is not None:
            near.masked_fill_(self.future, -torch.inf) if not self.finite else near.add_(self.future_bias)
        # The first and last block of a row have no left and no right neighbour.
        for edge, offset in ((0, -1), (self.row_blocks - 1, 1)):
            of_part = (edge - start) % self.row_blocks
            if offset in self.offsets and of_part < stop - start:
                columns = near.unflatten(-1, (-1, self.block_size))[..., self.offsets.index(offset), :]
                columns[of_part :: self.row_blocks].fill_(-torch.inf)
        if self.columns > self.near:
            bias = self.far_bias[start:stop, :, None]
            far.add_(bias)
            if not self.finite:
                far.masked_fill_(bias == -torch.inf, -torch.inf)

    def products(self, q, keys, out, capped=None) -> torch.Tensor:
        """Scaled and soft-capped products of queries and keys, in ``out``; ``capped`` keeps tanh of the soft-capped logits."""
        out = out[: len(q)]
        torch.baddbmm(out, q, keys.transpose(1, 2), beta=0, alpha=self.scale, out=out)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_()
            if capped is not None:
                capped[: len(q)].copy_(out)
            out.mul_(self.softcap)
        return out

    def weights(self, q, keys, start, stop, out, capped=None) -> torch.Tensor:
        """Attention weights ``(blocks, rows, columns)``."""
        logits = self.products(q, keys, out, capped)
        self.mask(logits.unflatten(1, (-1, self.block_size)), start, stop)
        return torch.softmax(logits, -1, out=logits)

    def dropout(self, start, stop) -> torch.Tensor | None:
        if self.dropout_p == 0:
            return None
        generator = torch.Generator(self.q.device).manual_seed(int(self.seed) + start)
        return dropout_factors((stop - start, self.rows, self.drawn), self.dropout_p, generator, start).to(self.dtype)

    def product(self, weights, values, start, stop, out) -> torch.Tensor:
        if self.finite:
            return torch.bmm(weights, values, out=out)
        # A value that is not finite reaches exactly the queries that see its column.
        wild = ~torch.isfinite(values)
        torch.bmm(weights, values.masked_fill(wild, 0), out=out)
        seen = torch.zeros_like(weights)
        self.mask(seen.unflatten(1, (-1, self.block_size)), start, stop)
        reached = torch.bmm((seen > -torch.inf).to(self.dtype), wild.to(self.dtype)) > 0
        return out.masked_fill_(reached, torch.nan)


# What gradients are for.
_DIFFERENTIABLE = ("q", "k", "v", "far_k", "far_v", "far_bias")


def _forward(given: Blocks) -> torch.Tensor:
    work, q, v = BlockWork(given), given.q, given.v
    out = q.new_empty(work.blocks, work.rows, v.shape[-1])
    keys, values, logits, result = work.buffers(
        (work.columns, work.dim), (work.columns, v.shape[-1]), (work.rows, work.columns), out.shape[1:]
    )
    with torch.autocast(q.device.type, enabled=False):
        for start, stop in work.parts():
            gathered = work.gather(given.k, given.far_k, start, stop, keys)
            weights = work.weights(q[start:stop].to(work.dtype), gathered, start, stop, logits)
            factors = work.dropout(start, stop)
            if factors is not None:
                weights = weights.mul_(factors)
            gathered = work.gather(v, given.far_v, start, stop, values)
            out[start:stop] = work.product(weights, gathered, start, stop, result[: stop - start])
    return out


def _backward(given: Blocks, grads, _) -> tuple[torch.Tensor, ...]:
    work, (grad,) = BlockWork(given), grads
    q, k, v, far_k, far_v, far_bias = (getattr(given, name) for name in _DIFFERENTIABLE)
    # Contributions of neighbouring blocks meet in one token: accumulate them in the compute dtype.
    grad_q = torch.empty_like(q)
    grad_k, grad_v, grad_far_k, grad_far_v = (torch.zeros_like(x, dtype=work.dtype) for x in (k, v, far_k, far_v))
    grad_bias = torch.zeros_like(far_bias)
    weighting = (work.rows, work.columns)
    keys, values, logits, inner, capped, result = work.buffers(
        (work.columns, work.dim), (work.columns, v.shape[-1]), weighting, weighting, weighting if work.softcap else (0,), q.shape[1:]
    )
    with torch.autocast(q.device.type, enabled=False):
        for start, stop in work.parts():
            size = stop - start
            queries, upper = q[start:stop].to(work.dtype), grad[start:stop].to(work.dtype)
            gathered_k = work.gather(k, far_k, start, stop, keys)
            gathered_v = work.gather(v, far_v, start, stop, values)
            weights = work.weights(queries, gathered_k, start, stop, logits, capped if work.softcap else None)
            slope = torch.bmm(upper, gathered_v.transpose(1, 2), out=inner[:size])
            factors = work.dropout(start, stop)
            if factors is not None:
                slope.mul_(factors)
                torch.bmm((weights * factors).transpose(1, 2), upper, out=gathered_v)
            else:
                torch.bmm(weights.transpose(1, 2), upper, out=gathered_v)
            work.scatter(gathered_v, start, stop, grad_v, grad_far_v)
            # The softmax's gradient: weights * (slope - sum(weights * slope)).
            softmax_backward(slope, weights, work.dtype)
            if work.columns > work.near:
                by_head = slope[..., work.near :].unflatten(1, (-1, work.block_size)).sum(2)
                grad_bias[start:stop] = by_head if far_bias.shape[1] > 1 else by_head.sum(1, keepdim=True)
            if work.softcap is not None:
                slope.mul_(1 - capped[:size].square())
            out = result[:size]
            grad_q[start:stop] = torch.baddbmm(out, slope, gathered_k, beta=0, alpha=work.scale, out=out)
            torch.baddbmm(gathered_k, slope.transpose(1, 2), queries, beta=0, alpha=work.scale, out=gathered_k)
            work.scatter(gathered_k, start, stop, grad_k, grad_far_k)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_far_k.to(far_k.dtype), grad_far_v.to(far_v.dtype), grad_bias


def _empty(given: Blocks) -> torch.Tensor:
    return given.q.new_empty(*given.q.shape[:2], given.v.shape[-1])


# ``(Blocks) -> (blocks, repeats * block_size, value_dim)``: attention of each block of queries to its neighbouring blocks and to the
# summaries that are listed for it, in one softmax.
block_attention = define(_NAMESPACE + "::block_attention", Blocks, _forward, _empty, _backward, _DIFFERENTIABLE)


def block_weights(given: Blocks) -> torch.Tensor:
    """Attention weights ``(blocks, rows, columns)`` of :func:`block_attention`, without dropout and gradient."""
    work = BlockWork(Blocks._make(x.detach() if isinstance(x, torch.Tensor) else x for x in given))
    out = work.q.new_empty(work.blocks, work.rows, work.columns, dtype=work.dtype)
    (keys,) = work.buffers((work.columns, work.dim))
    for start, stop in work.parts():
        gathered = work.gather(work.k, work.far_k, start, stop, keys)
        work.weights(work.q[start:stop].to(work.dtype), gathered, start, stop, out[start:stop])
    return out

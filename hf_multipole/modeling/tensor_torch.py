"""The exact path of tensor attention, of any order and with windows: one operator on tiles, with its backward pass.

With one token of each index but the last fixed, what remains is ordinary attention: the query times the fixed tokens' keys,
over the last index. So a tile of logits has *rows*, one for each query and each choice of the other indices, and *columns*,
tokens of the last index; its partial results are multiplied with the fixed tokens' values and merged by their log-sum-exp.
Windows cut a tile to what its queries see. Without windows the backward pass turns the tiles round: few tuples of tokens, the
products of their keys and values, against many queries, which saves one of six matrix products, since the gradients of
all keys and values then follow from those of the products. Logits stay in the cache; memory is linear in n.
"""

import itertools
import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .multipole_torch import dropout_factors
from .operators import define

# Of this copy of the file: to define an operator again, when the code of a checkpoint is loaded too, breaks the first one.
_NAMESPACE = __name__.replace(".", "_")

# Logits computed at once: 2 MiB of float32 a CPU thread, which stays near it; on other devices, enough to fill them.
_LOGITS_PER_THREAD = 2**19
_LOGITS_ON_DEVICE = 2**26
_COLUMNS = 512
_ROWS = 512
_TUPLES = 2048
# Powers of 2 take less than half the time of powers of e.
_LOG2E = math.log2(math.e)


class _Rule(NamedTuple):
    """Who sees whom, and how much."""

    causal: bool
    windows: tuple[int, ...]  # of each index; the length of the row where it has none
    scale: float
    dropout_p: float
    generator: torch.Generator | None


class _Span(NamedTuple):
    """Positions of one index that a block of queries sees."""

    first: int  # of the block's first query
    width: int
    moves: bool  # by one from query to query; otherwise the same for the whole block


def _span(start: int, stop: int, n: int, window: int, causal: bool, moves: bool = True) -> _Span:
    """What the queries start, ..., stop - 1 of a row of n tokens see; what single ones do not see of it remains to be hidden."""
    first, last = max(0, start - window + 1), stop if causal else min(n, stop + window - 1)
    band = window if causal else 2 * window - 1
    if moves and band < last - first:
        return _Span(start - window + 1, band, True)
    return _Span(first, last - first, False)


def _hidden(queries: torch.Tensor, positions: torch.Tensor, n: int, window: int, causal: bool) -> torch.Tensor:
    distance = queries - positions
    return (positions < 0) | (positions >= n) | (distance >= window) | (distance < (0 if causal else 1 - window))


def _logits_at_once(device: torch.device) -> int:
    return _LOGITS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _LOGITS_ON_DEVICE


def _boxes(ranges: list[tuple[int, int]], volume: int):
    """The product of ranges (start, stop) in boxes of at most ``volume`` elements: the longest side is cut until they are."""
    sides = [stop - start for start, stop in ranges]
    longest = max(range(len(sides)), key=sides.__getitem__)
    start, stop = ranges[longest]
    others = math.prod(sides) // max(1, sides[longest])
    parts = min(sides[longest], max(2, -(-sides[longest] * others // volume))) if others <= volume else 2
    if math.prod(sides) <= volume or sides[longest] == 1:
        if min(sides):
            yield ranges
        return
    edges = [start + (stop - start) * i // parts for i in range(parts + 1)]
    for part in itertools.pairwise(edges):
        yield from _boxes([*ranges[:longest], part, *ranges[longest + 1 :]], volume)


def _product(factors: list[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.mul, factors)


def _gradients(grad: torch.Tensor, factors: list[torch.Tensor]):
    """Of each factor, from the gradient of their product."""
    for i, factor in enumerate(factors):
        yield reduce(torch.mul, factors[:i] + factors[i + 1 :], grad).sum_to_size(factor.shape)


class _Rows:
    """The pieces of one pass over the tiles of one document.

    q: ``(groups, repeats, queries, dim)``, ``repeats`` query heads to each key head, the last tokens; keys: ``(indices, groups, n,
    dim)``; values: ``(indices, groups, n, value_dim)``. Of the indices, the last has the widest window.
    """

    def __init__(self, q, keys, values, rule: _Rule, finite: bool):
        self.q, self.keys, self.values = q, keys[-1], values[-1]
        self.n, self.rule = keys.shape[2], rule
        self.groups, self.repeats, self.queries = q.shape[:3]
        *self.row_windows, self.window = (min(window, self.n) for window in rule.windows)
        # Windows that move reach over both ends of the row.
        self.pad = max([window - 1 for window in self.row_windows if window < self.n], default=0)
        self.row_keys, self.row_values = (F.pad(x[:-1], (0, 0, self.pad, self.pad)) for x in (keys, values))
        # A masked product of 0 and not-a-number is not-a-number: one query at a time sees what it sees, and nothing is masked.
        rows = self.row_windows[-1] if self.row_windows else 1
        self.block = max(16, min(_ROWS // rows, max(64, self.window // 8))) if finite else 1
        self.logits = _logits_at_once(q.device)
        self.buffers: dict = {}
        self.strips: dict = {}

    def buffer(self, name: str, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.q.new_empty(size)
        return self.buffers[name][:size].view(shape)

    def tiles(self):
        """Queries start, ..., stop - 1, a span of each index of the rows, and the columns low, ..., high - 1."""
        for start in range(self.n - self.queries, self.n, self.block):
            stop = min(self.n, start + self.block)
            spans = [_span(start, stop, self.n, window, self.rule.causal) for window in self.row_windows]
            columns = _span(start, stop, self.n, self.window, self.rule.causal, moves=False)
            size = -(-columns.width // -(-columns.width // _COLUMNS))
            step = max(1, self.logits // (self.groups * self.repeats * (stop - start) * size))
            steps = [1] * (len(spans) - 1) + [step]
            chunks = (
                [_Span(span.first + i, min(step, span.width - i), span.moves) for i in range(0, span.width, step)]
                for span, step in zip(spans, steps)
            )
            for rows in itertools.product(*chunks):
                for low in range(columns.first, columns.first + columns.width, size):
                    yield start, stop, rows, low, min(low + size, columns.first + columns.width)

    def of_queries(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        first = self.n - self.queries
        return x[:, :, start - first : stop - first]

    def tokens(self, x: torch.Tensor, span: _Span, block: int) -> torch.Tensor:
        """A view ``(groups, 1, block or 1, width, dim)`` of padded tokens."""
        first = span.first + self.pad
        if not span.moves:
            return x[:, None, None, first : first + span.width]
        return x[:, first : first + span.width + block - 1].unfold(1, span.width, 1).transpose(2, 3)[:, None]

    def add_tokens(self, total: torch.Tensor, grad: torch.Tensor, span: _Span) -> None:
        """The transpose of ``tokens``, added to ``total``."""
        first, block, width = span.first + self.pad, grad.shape[2], span.width
        grad = grad[:, 0]
        if span.moves:
            # Rows that are one longer than they are read shift by one from row to row.
            grad = F.pad(grad, (0, 0, 0, block)).flatten(1, 2)[:, : block * (width + block - 1)].unflatten(1, (block, -1))
        grad = grad.sum(1)
        total[:, first : first + grad.shape[1]] += grad

    def hidden_rows(self, start: int, stop: int, rows) -> torch.Tensor | None:
        """``(block, width)`` bool, or None where all queries see all of their rows."""
        hidden = None
        queries = torch.arange(start, stop, device=self.q.device)[:, None]
        for span, window in zip(rows, self.row_windows):
            last = span.first + span.width - 1
            if span.moves:
                seen = span.first >= 0 and last + stop - start - 1 < self.n
            else:
                seen = span.first > stop - 1 - window and last < start + (1 if self.rule.causal else window)
            if not seen:
                positions = torch.arange(span.first, last + 1, device=self.q.device) + (queries - start) * span.moves
                of_span = _hidden(queries, positions, self.n, window, self.rule.causal)
                hidden = of_span if hidden is None else hidden | of_span
        return hidden

    def hide_columns(self, x: torch.Tensor, start: int, stop: int, low: int, high: int, value: float) -> None:
        """Writes ``value`` where queries do not see columns; ``x`` is ``(groups, repeats, block, width, columns)``."""
        left = min(high, stop - self.window)
        right = max(low, start + (1 if self.rule.causal else self.window))
        for first, last in ((low, high),) if left > right else ((low, left), (right, high)):
            if first < last:
                # Where both lie depends on the block, how they lie to each other hardly ever does.
                place = start - first, stop - first, last - first
                if place not in self.strips:
                    queries = torch.arange(*place[:2], device=x.device)[:, None]
                    hidden = _hidden(queries, torch.arange(place[2], device=x.device), place[2], self.window, self.rule.causal)
                    self.strips[place] = hidden[:, None]
                x[..., first - low : last - low].masked_fill_(self.strips[place], value)

    def rows_of(self, x: torch.Tensor, tokens: torch.Tensor, start: int, stop: int, rows) -> list[torch.Tensor]:
        """The factors whose product is what each row has: of the query, and of the row's token of each index."""
        views = (self.tokens(of_index, span, stop - start) for of_index, span in zip(tokens, rows))
        return [self.of_queries(x, start, stop).unsqueeze(3), *views]

    def factors(self, shape) -> torch.Tensor | None:
        if self.rule.dropout_p == 0:
            return None
        return dropout_factors(tuple(shape), self.rule.dropout_p, self.rule.generator, 0).to(self.q.dtype)


def _forward(q, keys, values, rule: _Rule, finite: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and logarithms to base 2 of the sums of exponentials, of one document; arguments as of ``_Rows``."""
    work = _Rows(q, keys, values, rule, finite)
    least = torch.finfo(q.dtype).min
    out = q.new_zeros(*q.shape[:3], values.shape[-1])
    lse = q.new_full(q.shape[:3], -torch.inf)
    for start, stop, rows, low, high in work.tiles():
        shape = (work.groups, work.repeats, stop - start, rows[-1].width if rows else 1)
        x = _product(work.rows_of(q, work.row_keys, start, stop, rows)).reshape(work.groups, -1, q.shape[-1])
        logits = work.buffer("logits", *x.shape[:2], high - low)
        torch.baddbmm(logits, x, work.keys[:, low:high].mT, beta=0, alpha=rule.scale * _LOG2E, out=logits)
        hidden = work.hidden_rows(start, stop, rows)
        if hidden is not None:
            logits.view(*shape, -1).masked_fill_(hidden[..., None], least)
        work.hide_columns(logits.view(*shape, -1), start, stop, low, high, least)
        # One softmax a query, over rows and columns.
        together = logits.view(work.groups, work.repeats, stop - start, -1)
        largest = together.amax(-1)
        part_lse = largest + together.sub_(largest[..., None]).exp2_().sum(-1).log2_()
        factors = work.factors(logits.shape)
        if factors is not None:
            logits.mul_(factors)
        part = torch.bmm(logits, work.values[:, low:high]).view(*shape, -1)
        if rows:
            part.mul_(_product(work.rows_of(q, work.row_values, start, stop, rows)[1:]))
        part = part.sum(3)
        total, total_lse = work.of_queries(out, start, stop), work.of_queries(lse, start, stop)
        merged = torch.logaddexp2(total_lse, part_lse)
        total.mul_((total_lse - merged).exp2_()[..., None]).add_(part.mul_((largest - merged).exp2_()[..., None]))
        total_lse.copy_(merged)
    return out, lse


def _backward_by_rows(grad, inner, lse, q, keys, values, rule: _Rule, finite: bool):
    """Gradients of q, keys and values of one document; ``inner`` is the sum of grad times output, ``lse`` as from ``_forward``."""
    work = _Rows(q, keys, values, rule, finite)
    grad_q = torch.zeros_like(q)
    # A transposed product of (dim, rows) and (rows, columns) is a third faster than the one it replaces.
    grad_keys, grad_values = (x[-1].mT.new_zeros(x[-1].mT.shape) for x in (keys, values))
    grad_row_keys, grad_row_values = torch.zeros_like(work.row_keys), torch.zeros_like(work.row_values)
    for start, stop, rows, low, high in work.tiles():
        shape = (work.groups, work.repeats, stop - start, rows[-1].width if rows else 1)
        key_factors = work.rows_of(q, work.row_keys, start, stop, rows)
        value_factors = work.rows_of(grad, work.row_values, start, stop, rows)
        x, y = (_product(f).reshape(work.groups, -1, f[0].shape[-1]) for f in (key_factors, value_factors))
        k, v = work.keys[:, low:high], work.values[:, low:high]
        shift = -work.of_queries(lse, start, stop)[..., None]
        hidden = work.hidden_rows(start, stop, rows)
        if hidden is not None:
            shift = shift.masked_fill(hidden, -torch.inf)
        shift = shift.expand(shape).reshape(work.groups, -1, 1)
        weights, slope = (work.buffer(name, *x.shape[:2], high - low) for name in ("logits", "slope"))
        torch.baddbmm(shift, x, k.mT, alpha=rule.scale * _LOG2E, out=weights).exp2_()
        work.hide_columns(weights.view(*shape, -1), start, stop, low, high, 0)
        shift = work.of_queries(inner, start, stop)[..., None].expand(shape).reshape(work.groups, -1, 1)
        factors = work.factors(weights.shape)
        if factors is None:
            torch.baddbmm(-shift, y, v.mT, out=slope).mul_(weights)
        else:
            torch.bmm(y, v.mT, out=slope).mul_(factors).sub_(shift).mul_(weights)
            weights = weights.mul_(factors)
        grad_x = torch.bmm(slope, k).mul_(rule.scale).view(*shape, -1)
        of_query, *of_rows = _gradients(grad_x, key_factors)
        work.of_queries(grad_q, start, stop).add_(of_query.squeeze(3))
        for total, part, span in zip(grad_row_keys, of_rows, rows):
            work.add_tokens(total, part, span)
        grad_keys[..., low:high].add_(torch.bmm(x.mT, slope), alpha=rule.scale)
        grad_values[..., low:high].add_(torch.bmm(y.mT, weights))
        if rows:
            of_rows = list(_gradients(torch.bmm(weights, v).view(*shape, -1), value_factors))[1:]
            for total, part, span in zip(grad_row_values, of_rows, rows):
                work.add_tokens(total, part, span)
    real = slice(work.pad, work.pad + work.n)
    grad_keys = torch.cat([grad_row_keys[:, :, real], grad_keys.mT[None]])
    return grad_q, grad_keys, torch.cat([grad_row_values[:, :, real], grad_values.mT[None]])


def _in_box(x, box) -> list[torch.Tensor]:
    """The tokens of each side of a box, one dimension a side: ``(groups, dim, 1, ..., tokens, ..., 1)``."""
    sides = range(len(box))
    return [x[a, :, :, slice(*box[a])][(..., *(slice(None) if b == a else None for b in sides))] for a in sides]


def _shells(first: int, n: int, indices: int, causal: bool):
    """All tuples of tokens, as products of ranges, with the first query that sees them and the last that may not see all of them.

    Causal: tuples whose latest token lies in the same short block are seen by the same queries, but for those in the block.
    """
    if not causal:
        yield [(0, n)] * indices, first, first
        return
    # Tokens before the first query are seen by all of them.
    edges = sorted({0, first, *range(first, n, max(16, min(128, n // 32))), n})
    for low, high in itertools.pairwise(edges):
        # By the first index that lies in the block: those before it lie before the block.
        for i in range(indices):
            yield [(0, low)] * i + [(low, high)] + [(0, high)] * (indices - 1 - i), max(low, first), max(first, high - 1)


def _backward_by_tuples(grad, inner, lse, q, keys, values, rule: _Rule):
    """The same where no index has a window: tuples of tokens against queries."""
    (groups, repeats, queries, dim), (indices, _, n, _) = q.shape, keys.shape
    first = n - queries
    keys, values = (x.mT.contiguous() for x in (keys, values))
    grad_q, grad_keys, grad_values = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    logits = max(groups * repeats * _ROWS, _logits_at_once(q.device))
    buffers = q.new_empty(2, logits)
    for ranges, earliest, complete in _shells(first, n, indices, rule.causal):
        size = min(_ROWS, n - earliest)
        for box in _boxes(ranges, max(1, min(_TUPLES, logits // (groups * repeats * size)))):
            key_factors, value_factors = _in_box(keys, box), _in_box(values, box)
            k, v = (_product(factors).flatten(2) for factors in (key_factors, value_factors))
            grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
            for start in range(earliest, n, size):
                asking = slice(start - first, min(n, start + size) - first)
                x, upper = (t[:, :, asking].reshape(groups, -1, t.shape[-1]) for t in (q, grad))
                shift, center = (t[:, :, asking].reshape(groups, -1, 1) for t in (lse, inner))
                shape = (groups, x.shape[1], k.shape[2])
                weights, slope = (buffer[: torch.Size(shape).numel()].view(shape) for buffer in buffers)
                torch.baddbmm(-shift, x, k, alpha=rule.scale * _LOG2E, out=weights).exp2_()
                if start < complete:
                    early = torch.arange(start, min(complete, start + size), device=q.device)
                    latest = torch.stack(torch.meshgrid(*(torch.arange(*side, device=q.device) for side in box), indexing="ij")).amax(0)
                    weights.unflatten(1, (repeats, -1))[:, :, : len(early)].masked_fill_(latest.flatten() > early[:, None], 0)
                grad_v.baddbmm_(upper.mT, weights)
                torch.baddbmm(-center, upper, v, out=slope).mul_(weights)
                grad_k.baddbmm_(x.mT, slope, alpha=rule.scale)
                grad_q[:, :, asking].add_(torch.bmm(slope, k.mT).view(groups, repeats, -1, dim), alpha=rule.scale)
            sides = [stop - start for start, stop in box]
            for total, part, factors in ((grad_keys, grad_k, key_factors), (grad_values, grad_v, value_factors)):
                for of_index, place, side in zip(_gradients(part.unflatten(2, sides), factors), total, box):
                    place[..., slice(*side)] += of_index.flatten(2)
    return grad_q, grad_keys.mT, grad_values.mT


def stretches(document: torch.Tensor | None, batch: int, n: int) -> list[tuple[slice, int, int]]:
    """Rows, first token and end of each document; rows that are cut alike, one after another, are taken together."""
    if document is None:
        return [(slice(0, batch), 0, n)]
    alike: list = []
    for row, numbers in enumerate(document.tolist()):
        cuts, stop = [], 0
        for number, run in itertools.groupby(numbers):
            start, stop = stop, stop + sum(1 for _ in run)
            if number >= 0:
                cuts.append((start, stop))
        if alike and alike[-1][1] == cuts:
            alike[-1] = (slice(alike[-1][0].start, row + 1), cuts)
        else:
            alike.append((slice(row, row + 1), cuts))
    return [(rows, start, stop) for rows, cuts in alike for start, stop in cuts]


def _pieces(q, keys, document):
    """What is worked on alone: a document's rows and heads of keys, as many as fill a tile; its queries; its tokens."""
    queries, (indices, batch, kv_heads, n, _) = q.shape[2], keys.shape
    first, repeats = n - queries, q.shape[1] // kv_heads
    for rows, start, stop in stretches(document, batch, n):
        begin = max(start, first)
        if begin >= stop:
            continue
        of_head = repeats * min(stop - begin, _ROWS) * min((stop - start) ** indices, 2 * _COLUMNS)
        together = max(1, _logits_at_once(q.device) // of_head)
        for row in range(rows.start, rows.stop, max(1, together // kv_heads)):
            some = slice(row, min(rows.stop, row + max(1, together // kv_heads)))
            for head in range(0, kv_heads, together):
                yield some, slice(head, head + together), slice(begin - first, stop - first), slice(start, stop)


class TensorTiles(NamedTuple):
    """Arguments of the operator :func:`tensor_tiles`, float32 or float64."""

    q: torch.Tensor  # (batch, heads, queries, dim), the last tokens
    keys: torch.Tensor  # (order - 1, batch, kv_heads, n, dim)
    values: torch.Tensor  # (order - 1, batch, kv_heads, n, value_dim)
    document: torch.Tensor | None  # (batch, n): tokens of different numbers do not see each other, nor do negative ones see anything
    causal: bool
    windows: Sequence[int]  # of each index, n where it has none, the widest last
    scale: float
    dropout_p: float
    seed: torch.Tensor | None


def _rule(given: TensorTiles) -> _Rule:
    generator = torch.Generator(given.q.device).manual_seed(int(given.seed)) if given.dropout_p else None
    return _Rule(given.causal, tuple(given.windows), given.scale, given.dropout_p, generator)


def _finite(*tensors: torch.Tensor) -> bool:
    return all(bool(x.sum().isfinite()) for x in tensors)


def _run(given: TensorTiles) -> tuple[torch.Tensor, torch.Tensor]:
    q, keys, values, rule, kv_heads = given.q, given.keys, given.values, _rule(given), given.keys.shape[2]
    out, lse = _empty(given, torch.zeros)
    with torch.autocast(q.device.type, enabled=False):
        for rows, heads, asking, tokens in _pieces(q, keys, given.document):
            part = q.unflatten(1, (kv_heads, -1))[rows, heads, :, asking]
            queries, (some_keys, some_values) = part.flatten(0, 1), (x[:, rows, heads, tokens].flatten(1, 2) for x in (keys, values))
            results = _forward(queries, some_keys, some_values, rule, _finite(queries, some_keys, some_values))
            for total, result in zip((out, lse), results):
                total.unflatten(1, (kv_heads, -1))[rows, heads, :, asking] = result.unflatten(0, part.shape[:2])
    return out, lse


def _empty(given: TensorTiles, make=torch.empty) -> tuple[torch.Tensor, torch.Tensor]:
    like = {"dtype": given.q.dtype, "device": given.q.device}
    return make(*given.q.shape[:3], given.values.shape[-1], **like), make(given.q.shape[:3], **like)


def _backward(given: TensorTiles, gradients, outputs) -> tuple[torch.Tensor, ...]:
    (grad, _), (out, lse), rule = gradients, outputs, _rule(given)
    q, keys, values, kv_heads = given.q, given.keys, given.values, given.keys.shape[2]
    grad = torch.zeros_like(out) if grad is None else grad
    grads = grad_q, *_ = [torch.zeros_like(x) for x in (q, keys, values)]
    with torch.autocast(q.device.type, enabled=False):
        inner = (grad * out).sum(-1)
        for rows, heads, asking, tokens in _pieces(q, keys, given.document):
            of_queries = [x.unflatten(1, (kv_heads, -1))[rows, heads, :, asking].flatten(0, 1) for x in (grad, inner, lse, q)]
            some_keys, some_values = (x[:, rows, heads, tokens].flatten(1, 2) for x in (keys, values))
            tensors = of_queries[0], of_queries[1], of_queries[2], of_queries[3], some_keys, some_values
            finite = _finite(*tensors[3:])
            if finite and not rule.dropout_p and min(rule.windows) >= tokens.stop - tokens.start:
                result = _backward_by_tuples(*tensors, rule)
            else:
                result = _backward_by_rows(*tensors, rule, finite)
            places = grad_q.unflatten(1, (kv_heads, -1))[rows, heads, :, asking], *(x[:, rows, heads, tokens] for x in grads[1:])
            for place, part in zip(places, result):
                place.copy_(part.reshape(place.shape))
    return tuple(grads)


_DIFFERENTIABLE = ("q", "keys", "values")
# ``(TensorTiles) -> (batch, heads, queries, value_dim)``, tensor attention, and the logarithms to base 2 of its sums ``(batch, heads,
# queries)``, which have no gradient. Zeros at padding.
tensor_tiles = define(_NAMESPACE + "::tensor_tiles", TensorTiles, _run, _empty, _backward, _DIFFERENTIABLE, outputs=2, constants=[1])

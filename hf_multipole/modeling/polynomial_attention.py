"""Tensor attention in near-linear time where scores are bounded, and the certificate of its error (arXiv 2310.04064).

If every score s lies within [-R, R], exp may be replaced there by a polynomial P. The monomials of q times those of the keys give
P(s) as an inner product of C(dim + degree, degree) features, so that the sums over the tokens of every index separate:

    numerator = features(q) diag(c) [(features(k1)^T v1) * (features(k2)^T v2) * ...]

and the denominator is the same with values of 1, kept as one more channel. The state of a row, those sums, does not grow with its
length. Sums are kept in float64, so that the backward pass can take tokens off the state again, in place of storing it.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .options import MAX_DEGREE

MAX_FEATURES = 2**16
# Beyond it exp overflows, in float32 at 89.
MAX_SCORE = 80
# Relative error of the weights where no degree is given.
TOLERANCE = 1e-3
# Numbers in the features that are worked on at once.
_AT_ONCE = 2**20
_AT_ONCE_ON_DEVICE = 2**26
# Tokens summed in the dtype of the arguments, before float64.
_SUMMED = 64
# Tokens of a causal chunk: within it, pairs (triples, ...) of a query and tokens of some indices are worked out.
_CHUNK = {1: 32, 2: 8, 3: 4}


class BoundViolation(ValueError):
    """The near-linear path cannot vouch for its output: scores may be too large."""


class Approximation(NamedTuple):
    """A polynomial of degree ``len(coefficients) - 1`` in place of exp on [-score_bound, score_bound]."""

    coefficients: tuple[float, ...]  # of the powers of s / score_bound, or of -s / score_bound where the scale is negative
    delta: float  # at least the largest |P(s) exp(-s) - 1|
    score_bound: float
    entry_bound: float


class Certificate(NamedTuple):
    """What is known of the output of the near-linear path before it runs."""

    delta: float  # relative error of the weights before they are normalised
    error: torch.Tensor  # (batch, heads, 1, value_dim) float64: no output is farther from the exact one; includes the rounding
    rounding: torch.Tensor  # its part that floating-point arithmetic may add
    degree: int
    entry_bound: float
    score_bound: float


# The polynomial


def _powers(coefficients: torch.Tensor) -> torch.Tensor:
    """Coefficients of powers, from those of Chebyshev polynomials."""
    rows = torch.eye(len(coefficients), dtype=torch.float64)
    for i in range(2, len(rows)):
        rows[i] = 2 * rows[i - 1].roll(1) - rows[i - 2]
    return coefficients @ rows


def _evaluate(coefficients, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


def _largest_error(powers: torch.Tensor, bound: float) -> tuple[float, torch.Tensor]:
    """An upper bound on |P(x) exp(-bound x) - 1| in [-1, 1], and where it may be largest: the ends, and between them where it turns.

    It turns at the real roots of P' - bound P. Each is bracketed by two neighbours of a grid, and found by Newton's method.
    """
    degree, cells, exponents = len(powers) - 1, 32 * len(powers), torch.arange(len(powers))
    slope = F.pad((powers * exponents)[1:], (0, 1)) - bound * powers
    bend = F.pad((slope * exponents)[1:], (0, 1))
    polynomials = torch.stack([powers, slope, bend], 1)
    angle = torch.arange(cells, -1, -1, dtype=torch.float64) * (math.pi / cells)
    grid = angle.cos()
    _, slopes, bends = ((grid[:, None] ** exponents) @ polynomials).unbind(1)
    cell = ((slopes[1:] > 0) != (slopes[:-1] > 0)).nonzero().squeeze(1)
    low, high = grid[cell], grid[cell + 1]
    turns = (low + high) / 2
    for _ in range(4):
        _, value, rise = ((turns[:, None] ** exponents) @ polynomials).unbind(1)
        turns = torch.where(rise == 0, turns, turns - value / rise).clamp(low, high)
    places = torch.cat([grid, turns])
    error = ((places[:, None] ** exponents) @ powers * (-bound * places).exp() - 1).abs().max().item()
    if len(turns) < degree:
        # Two turns within one cell go unseen. Between two places the error exceeds that at both by at most the square of their
        # distance times the second derivative, here by the angle, over 8; twice that at the neighbours stands for the largest.
        second = (angle.sin() ** 2 * (bends - bound * slopes) - grid * slopes) * (-bound * grid).exp()
        error += 2 * (math.pi / cells) ** 2 / 8 * second.abs().max().item()
    # What evaluating it may have hidden.
    unit = torch.finfo(torch.float64).eps
    error += unit * (4 * (degree + 2) * powers.abs().sum().item() * math.exp(bound) + bound * (1 + error))
    return error, torch.cat([grid[:1], turns, grid[-1:]])


@lru_cache(maxsize=4096)
def minimax_exponential(degree: int, bound: float) -> tuple[tuple[float, ...], float]:
    """The polynomial P of s / bound with the least relative error ``max |P exp(-s) - 1|`` on [-bound, bound], and that error.

    Remez' exchange: P' - P has degree ``degree``, so that its roots and the two ends are the points between which the error
    alternates. The error is that of the coefficients returned, an upper bound. Powers that float64 does not see beside 1 have
    coefficients of 0. Raises ValueError for bounds outside [0, 80].
    """
    if not 0 <= bound <= MAX_SCORE:
        raise ValueError(f"bound is {bound!r}, but must be from 0 to {MAX_SCORE}")
    if bound == 0:
        return (1.0,) + (0.0,) * degree, 0.0
    # 2 (bound / 2) ** d / d! is the size of the Chebyshev term of degree d.
    used = degree
    while used and 2 * (bound / 2) ** used / math.factorial(used) < torch.finfo(torch.float64).eps / 8:
        used -= 1
    # Whatever the default device is: "meta", perhaps.
    with torch.device("cpu"):
        points = torch.cos(torch.arange(used + 1, -1, -1, dtype=torch.float64) * math.pi / (used + 1))
        signs = (-1.0) ** torch.arange(used + 2, dtype=torch.float64)
        best = (1.0,) + (0.0,) * used, math.inf
        for _ in range(30):
            basis = torch.cos(torch.arange(used + 1) * points.clamp(-1, 1).arccos()[:, None])
            system = torch.cat([basis * (-bound * points).exp()[:, None], -signs[:, None]], 1)
            solution, singular = torch.linalg.solve_ex(system, torch.ones_like(points))
            if singular or not solution.isfinite().all():
                break
            powers = _powers(solution[:-1])
            error, extrema = _largest_error(powers, bound)
            if not error < best[1] * (1 - 1e-12):
                break
            best = tuple(powers.tolist()), error
            if len(extrema) != used + 2:
                break
            points = extrema
    return best[0] + (0.0,) * (degree - used), best[1]


def feature_count(score_dim: int, degree: int) -> int:
    """Monomials of ``score_dim`` variables of at most ``degree``."""
    return math.comb(score_dim + degree, degree)


def approximate(
    score_dim: int, order: int, scale: float, entry_bound: float, degree: int | None, tolerance: float, dtype: torch.dtype
) -> Approximation:
    """The polynomial for entries up to ``entry_bound``: of that degree, or of the least one with delta <= tolerance.

    Raises BoundViolation where there is none, ValueError where the given degree has too many features.
    """
    # In tensors, which overflow to infinity where Python raises.
    bound = (torch.tensor(entry_bound, dtype=torch.float64, device="cpu") ** order * score_dim * abs(scale)).item()
    found = None
    for candidate in range(MAX_DEGREE + 1) if degree is None else (degree,):
        features = feature_count(score_dim, candidate)
        if features > MAX_FEATURES:
            message = f"degree {candidate} has {features} features of {score_dim} entries, more than {MAX_FEATURES}"
            if degree is not None:
                raise ValueError(f"{message}: take a lower degree, or a smaller score dimension beside the value dimension")
            break
        if not bound <= MAX_SCORE:
            break
        coefficients, delta = minimax_exponential(candidate, bound)
        # The features' powers are those of s / (scale's sign * bound).
        coefficients = tuple(c * math.copysign(1, scale) ** i for i, c in enumerate(coefficients))
        found = Approximation(coefficients, delta, bound, entry_bound)
        if degree is not None or delta <= tolerance:
            break
        found = None
    advice = "bound the entries of q and keys more tightly, give a smaller scale, or set on_violation='exact'"
    if found is None:
        raise BoundViolation(
            f"scores may reach {bound:.4g} with entries up to {entry_bound:.4g}; no polynomial with at most {MAX_FEATURES} features "
            f"and degree {MAX_DEGREE} has an error within tolerance {tolerance:g} there: {advice}"
        )
    if found.delta >= 1 or _rounding(found, score_dim, order, dtype) == math.inf:
        raise BoundViolation(
            f"degree {len(found.coefficients) - 1} says nothing about scores up to {bound:.4g} in {str(dtype).removeprefix('torch.')} "
            f"(delta {found.delta:.3g}): {advice}, or a higher degree, or float64"
        )
    return found


def _rounding(approximation: Approximation, score_dim: int, order: int, dtype: torch.dtype) -> float:
    """Bound on what arithmetic in ``dtype`` adds to an output, for values of products up to 1; infinite if it says nothing.

    Every term of numerator and denominator is perturbed by a factor 1 + e, |e| <= the operations it passes through times the
    unit roundoff; all terms, with their absolute values, add up to at most the sum of |coefficients| a tuple of tokens, while the
    denominator is at least (1 - delta) exp(-R) a tuple.
    """
    degree, indices = len(approximation.coefficients) - 1, order - 1
    unit = torch.finfo(dtype).eps / 2
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        unit = 2.0 ** (-11 if torch.get_float32_matmul_precision() == "high" else -8)
    operations = feature_count(score_dim, degree) + indices * (_SUMMED + 8) + 3 * degree * order + degree * (score_dim + indices) + 5
    terms = sum(map(abs, approximation.coefficients)) * math.exp(approximation.score_bound) / (1 - approximation.delta)
    perturbed = 1.01 * operations * unit * terms
    return 2 * perturbed / (1 - perturbed) + unit if perturbed < 1 else math.inf


def certify(approximation: Approximation, score_dim: int, values, real: torch.Tensor | None, heads: int, dtype, out_dtype) -> Certificate:
    """Per channel, delta / (1 - delta) times half the range of the products of values, and the rounding.

    values: one tensor ``(batch, kv_heads, n, value_dim)`` an index; real: ``(batch, n)`` bool or None for all tokens; dtype: what is
    computed in; out_dtype: what the output is rounded to.
    """
    low = high = torch.ones((), dtype=torch.float64, device=values[0].device)
    for v in values:
        hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=v.device) if real is None else ~real[:, None, :, None]
        least = v.masked_fill(hidden, torch.inf).amin(2, keepdim=True).double()
        most = v.masked_fill(hidden, -torch.inf).amax(2, keepdim=True).double()
        # A row of padding alone has outputs of zero.
        least, most = (x.masked_fill(least > most, 0) for x in (least, most))
        products = torch.stack([low * least, low * most, high * least, high * most])
        low, high = products.amin(0), products.amax(0)
    delta, largest = approximation.delta, torch.maximum(low.abs(), high.abs())
    share = _rounding(approximation, score_dim, len(values) + 1, dtype) + torch.finfo(out_dtype).eps / 2 * (1 + 2 * delta / (1 - delta))
    # Products below the smallest normal number may lose all their digits.
    rounding = (share * largest + torch.finfo(out_dtype).tiny).repeat_interleave(heads // low.shape[1], 1)
    error = (delta / (1 - delta) * (high - low) / 2).repeat_interleave(heads // low.shape[1], 1) + rounding
    degree = len(approximation.coefficients) - 1
    return Certificate(delta, error, rounding, degree, approximation.entry_bound, approximation.score_bound)


# Features


def features(x: torch.Tensor, degree: int) -> torch.Tensor:
    """All monomials of the last dimension of at most ``degree``: ``(..., C(dim + degree, degree))``."""
    level = torch.ones_like(x[..., :1])
    levels = [level]
    for power in range(1, degree + 1):
        # Those of lower power in the variables up to the v-th come first.
        level = torch.cat([level[..., : math.comb(v + power - 1, v)] * x[..., v : v + 1] for v in range(x.shape[-1])], -1)
        levels.append(level)
    return torch.cat(levels, -1)


@lru_cache(maxsize=64)
def _multinomials(dim: int, degree: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The power of each feature, and its coefficient in the power of a sum, divided by ``dim`` to that power."""
    levels = [torch.zeros(1, dim, dtype=torch.float64)]
    unit = torch.eye(dim, dtype=torch.float64)
    for power in range(1, degree + 1):
        levels.append(torch.cat([levels[-1][: math.comb(v + power - 1, v)] + unit[v] for v in range(dim)]))
    exponents = torch.cat(levels)
    powers = exponents.sum(1)
    return powers.long(), ((powers + 1).lgamma() - (exponents + 1).lgamma().sum(1) - powers * math.log(dim)).exp()


def _weights(approximation: Approximation, dim: int, like: torch.Tensor) -> torch.Tensor:
    """What each feature of a query is multiplied with, if entries are divided by the entry bound."""
    power, multinomial = _multinomials(dim, len(approximation.coefficients) - 1)
    return (torch.tensor(approximation.coefficients, dtype=torch.float64)[power] * multinomial).to(like)


# The sums. Groups are rows and heads of keys side by side; values have a last channel of ones.


def _absorb(keys, values, degree: int, chunk: int, features):
    """Features ``(indices, groups, chunks, chunk, features)`` of keys ``(indices, groups, tokens, dim)``, and the sums of each chunk."""
    keys, values = (F.pad(x, (0, 0, 0, -x.shape[2] % chunk)).unflatten(2, (-1, chunk)) for x in (keys, values))
    of_keys = features(keys, degree)
    return of_keys, of_keys.mT @ values


class _Chunks(NamedTuple):
    """What the sums over tuples of tokens are made of, cut into chunks."""

    keys: torch.Tensor
    values: torch.Tensor
    of_keys: torch.Tensor  # features
    before: torch.Tensor  # the states before each chunk
    seen: torch.Tensor  # by the tokens of a chunk, of its tokens
    powers: list[float]  # coefficients of the powers of a score


def _with_tokens(x, y):
    """``(groups, chunks, repeats, chunk, choices, dim)`` times ``(groups, chunks, chunk, dim)``."""
    return (x.unsqueeze(5) * y[:, :, None, None, None]).flatten(4, 5)


def _outputs(parts: _Chunks, index: int, x, of_x, product):
    """The sums over the indices from ``index`` on, of whose tuples some tokens, or those before, lie in the chunk.

    x: ``(groups, chunks, repeats, chunk, choices, dim)``, queries times keys; product: of the sums of indices before the chunk.
    """
    indices = len(parts.keys)
    if index == indices:
        if product is None:
            return _evaluate(parts.powers, x.sum(-1, keepdim=True))
        return (of_x.flatten(2, 4) @ product).unflatten(2, of_x.shape[2:5])
    earlier = parts.before[index] if product is None else product * parts.before[index]
    out = _outputs(parts, index + 1, x, of_x, earlier)
    if product is not None or index < indices - 1:
        of_x = _with_tokens(of_x, parts.of_keys[index])
    inside = _outputs(parts, index + 1, _with_tokens(x, parts.keys[index]), of_x, product).unflatten(4, (-1, len(parts.seen)))
    return out + (inside * (parts.values[index][:, :, None, None, None] * parts.seen)).sum(5)


def _read_causal(q, keys, values, of_keys, before, weights, coefficients):
    """Numerators and denominators, from the states before each chunk and from the tuples of tokens of which some lie in it."""
    tokens, dim, chunk = q.shape[2], q.shape[3], of_keys.shape[3]
    q, keys, values = (F.pad(x, (0, 0, 0, -tokens % chunk)).unflatten(2, (-1, chunk)) for x in (q, keys, values))
    seen = torch.ones(chunk, chunk, dtype=q.dtype, device=q.device).tril().view(chunk, 1, chunk, 1)
    powers = [c / dim**i for i, c in enumerate(coefficients)]
    x = q.transpose(1, 2).unsqueeze(4)
    out = _outputs(_Chunks(keys, values, of_keys, before, seen, powers), 0, x, features(x, len(powers) - 1) * weights, None)
    return out.squeeze(4).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


class _Sums(torch.autograd.Function):
    """Numerators and denominators, and the state after the last token; see ``attend`` for the tensors, of which plan is made.

    Both directions go through the row a chunk at a time; the backward pass differentiates one chunk after the other.
    """

    @staticmethod
    def forward(ctx, q, keys, values, state, plan):
        ctx.plan, first, causal = plan, plan.first, plan.causal
        state = state.clone()
        ctx.mark_non_differentiable(state)
        out = q.new_empty(*q.shape[:3], values.shape[-1])
        for part in plan.chunks(0, first if causal else keys.shape[2]):
            state += plan.absorb(keys[:, :, part], values[:, :, part])[1].double().sum(2)
        if causal:
            for part, asking in plan.chunks(first, keys.shape[2], queries=True):
                of_keys, sums = plan.absorb(keys[:, :, part], values[:, :, part])
                tensors = q[:, :, asking], keys[:, :, part], values[:, :, part], of_keys, sums, state.to(q.dtype)
                out[:, :, asking] = plan.read_causal(*tensors)
                state += sums.double().sum(2)
        else:
            product = state.prod(0).to(q.dtype)
            for part in plan.chunks(0, q.shape[2]):
                out[:, :, part] = plan.read(q[:, :, part], product)
        ctx.save_for_backward(q, keys, values, state)
        return out, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        q, keys, values, state = ctx.saved_tensors
        plan, first = ctx.plan, ctx.plan.first
        grads = [torch.zeros_like(x) for x in (q, keys, values)]
        grad_state = torch.zeros_like(state)

        def leaves(*tensors):
            return [x.detach().requires_grad_() for x in tensors]

        with torch.enable_grad():
            if plan.causal:
                for part, asking in reversed(list(plan.chunks(first, keys.shape[2], queries=True))):
                    x, k, v = leaves(q[:, :, asking], keys[:, :, part], values[:, :, part])
                    of_keys, sums = plan.absorb(k, v)
                    total = sums.double().sum(2)
                    state = state - total.detach()
                    (before,) = leaves(state.to(q.dtype))
                    out = plan.read_causal(x, k, v, of_keys, sums, before)
                    *parts, of_state = torch.autograd.grad((out, total), (x, k, v, before), (grad[:, :, asking], grad_state))
                    grad_state += of_state
                    for whole, place, of_part in zip(grads, (asking, part, part), parts):
                        whole[:, :, place] = of_part
            else:
                (whole_state,) = leaves(state)
                product = whole_state.prod(0).to(q.dtype)
                (of_product,) = leaves(product)
                grad_product = torch.zeros_like(product, dtype=torch.float64)
                for part in plan.chunks(0, q.shape[2]):
                    (x,) = leaves(q[:, :, part])
                    out = plan.read(x, of_product)
                    grads[0][:, :, part], more = torch.autograd.grad(out, (x, of_product), grad[:, :, part])
                    grad_product += more
                (grad_state,) = torch.autograd.grad(product, whole_state, grad_product.to(q.dtype))
            for part in plan.chunks(0, first if plan.causal else keys.shape[2]):
                k, v = leaves(keys[:, :, part], values[:, :, part])
                total = plan.absorb(k, v)[1].double().sum(2)
                grads[1][:, :, part], grads[2][:, :, part] = torch.autograd.grad(total, (k, v), grad_state)
        return *grads, None, None


class _Plan:
    """How a call is cut into parts, and what works on them: functions of this file, or kernels."""

    def __init__(self, q, keys, width: int, approximation: Approximation, causal: bool, kernels: bool):
        (groups, repeats, queries, dim), (indices, _, n, _) = q.shape, keys.shape
        self.approximation, self.causal, self.first = approximation, causal, n - queries
        self.degree = len(approximation.coefficients) - 1
        self.weights = _weights(approximation, dim, q)
        self.features, self.causal_sums = features, None
        self.chunk = _CHUNK.get(indices, 2) if causal else max(1, min(_SUMMED, n))
        # Beyond this many chunks, the sum of the chunks would round more often than the certificate says.
        most = _SUMMED - self.chunk if causal else 8
        choices = self.chunk ** max(1, indices - 1) if causal else 1
        chunks = _AT_ONCE // (max(repeats * choices, indices) * len(self.weights) * self.chunk)  # of one group
        if kernels:
            from .polynomial_triton import CHUNK, causal_sums, feature_map

            self.features, self.causal_sums = feature_map, causal_sums
            if causal:
                self.chunk = CHUNK
                # A chunk's tokens are summed twice: for the chunks after it, and one by one.
                most = _SUMMED - 2 * self.chunk
            chunks = _AT_ONCE_ON_DEVICE // (len(self.weights) * ((repeats + indices) * self.chunk + indices * width))  # of one group
        self.together = max(1, min(groups, chunks))  # groups that are worked on side by side
        self.size = self.chunk * max(1, min(chunks // self.together, most))

    def absorb(self, keys, values):
        return _absorb(keys, values, self.degree, self.chunk, self.features)

    def read(self, q, product):
        """Numerators and denominators of queries ``(groups, repeats, tokens, dim)`` that see all of a state."""
        rows = (self.features(q, self.degree) * self.weights).flatten(1, 2)
        return torch.bmm(rows, product).unflatten(1, q.shape[1:3])

    def read_causal(self, q, keys, values, of_keys, sums, state):
        """The same where the queries are the tokens of the chunks: each sees the state, earlier chunks, and its own up to itself."""
        before = torch.cat([state[:, :, None], sums[:, :, :-1]], 2).cumsum(2)
        if self.causal_sums is None:
            return _read_causal(q, keys, values, of_keys, before, self.weights, self.approximation.coefficients)
        rows = self.features(q, self.degree) * self.weights
        return self.causal_sums(rows, of_keys.flatten(2, 3)[:, :, : q.shape[2]], values, before)

    def chunks(self, start: int, stop: int, queries: bool = False):
        for low in range(start, stop, self.size):
            part = slice(low, min(stop, low + self.size))
            yield (part, slice(part.start - self.first, part.stop - self.first)) if queries else part


def attend(q, keys, values, approximation: Approximation, *, causal: bool, state: torch.Tensor | None = None, kernels: bool = False):
    """Near-linear tensor attention of whole rows, and the state that continues them.

    Args:
        q: ``(batch, heads, queries, dim)``, float32 or float64. Fewer queries than keys are the last tokens.
        keys: ``(order - 1, batch, kv_heads, n, dim)``. Entries of q and keys lie within the approximation's bound: not checked.
        values: ``(order - 1, batch, kv_heads, n, value_dim)``.
        state: of the tokens before, which all queries see too; from an earlier call with the same approximation. It has no gradient.
        kernels: on the GPU kernels, which are of order 3 and float32.

    Returns:
        ``(batch, heads, queries, value_dim)``, and the state ``(order - 1, batch, kv_heads, features, value_dim + 1)``, float64.
    """
    indices, batch, kv_heads, _, dim = keys.shape
    bound = approximation.entry_bound or 1.0
    values = F.pad(values, (0, 1), value=1.0)
    if state is None:
        count = feature_count(dim, len(approximation.coefficients) - 1)
        state = q.new_zeros(indices, batch, kv_heads, count, values.shape[-1], dtype=torch.float64)
    groups = (q / bound).unflatten(1, (kv_heads, -1)).flatten(0, 1)
    tensors = groups, (keys / bound).flatten(1, 2), values.flatten(1, 2), state.flatten(1, 2)
    with torch.autocast(q.device.type, enabled=False):
        plan = _Plan(*tensors[:2], values.shape[-1], approximation, causal, kernels)
        parts = zip(tensors[0].split(plan.together), *(x.split(plan.together, 1) for x in tensors[1:]))
        results = [_Sums.apply(*part, plan) for part in parts]
        sums, state = (torch.cat(of_parts, dim) for of_parts, dim in zip(zip(*results), (0, 1)))
    out = sums[..., :-1] / sums[..., -1:]
    return out.unflatten(0, (batch, kv_heads)).flatten(1, 2), state.unflatten(1, (batch, kv_heads))

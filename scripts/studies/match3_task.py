"""Match3 and Match2: label a token by whether two others (one other) complete it to a multiple of a modulus.

What attention to pairs of tokens is for: one head of order 3 can do Match3, a one-layer transformer of reasonable size cannot
(Sanford, Hsu and Telgarsky, arXiv 2306.02896). Here are the rows, and the solution of Match3 that can be written down.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from hf_multipole.modeling.polynomial_attention import MAX_DEGREE, approximate, certify, feature_count
from hf_multipole.modeling.tensor_attention import tensor_attention

BINS = 4


def labels(rows: torch.Tensor, modulus: int, order: int = 3) -> torch.Tensor:
    """``(count, n)`` bool of rows of residues ``(count, n)``: is there a sum of the token and ``order - 1`` tokens of its row, itself
    allowed and any of them more than once, that is 0 modulo ``modulus``? Orders 2 and 3.
    """
    there = torch.zeros(len(rows), modulus, dtype=torch.bool).scatter_(1, rows, True)
    residues = torch.arange(modulus)
    if order == 3:
        # Which residues are sums of two.
        there = (there[:, (residues[:, None] - residues) % modulus] & there[:, None]).any(2)
    return there.gather(1, -rows % modulus)


def _candidates(count: int, n: int, modulus: int, order: int, generator: torch.Generator) -> torch.Tensor:
    """Rows over random sets of residues, of every size from one to as many as there can be."""
    shuffled = torch.rand(count, modulus, generator=generator).argsort(1)
    size = torch.randint(1, modulus + 1, (count, 1), generator=generator)
    if order == 3:
        # Of a residue x and -2x only one, and no 0: then all matches are of three different residues.
        size, row = (size + 1) // 2, torch.arange(count)
        taken = torch.zeros(count, modulus, dtype=torch.bool)
        for x in shuffled.unbind(1):
            apart = ~taken[row, -2 * x % modulus] & ~taken[row, -x * pow(2, -1, modulus) % modulus]
            taken[row, x] |= apart & (3 * x % modulus != 0) & (taken.sum(1) < size[:, 0])
        shuffled = (torch.rand(count, modulus, generator=generator) - 2.0 * taken).argsort(1)
        size = taken.sum(1, keepdim=True)
    return shuffled.gather(1, (torch.rand(count, n, generator=generator) * size).long())


def draw(count: int, n: int, modulus: int, order: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """``(count, n)`` residues and their labels, 0 or 1: as many rows of each quarter of the share of ones (arXiv 2501.19215).

    Rows of Match3 have no tokens with ``x + x + y = 0``, nor 0 itself: those matches could be found by attention to single tokens.
    ``count`` is a multiple of 4. ValueError where there seem to be no rows of some quarter.
    """
    parts = [[] for _ in range(BINS)]
    for _ in range(100):
        rows = _candidates(2 * count, n, modulus, order, generator)
        ones = labels(rows, modulus, order)
        share = (ones.float().mean(1) * BINS).long().clamp(max=BINS - 1)
        for i, of_bin in enumerate(parts):
            of_bin.append((rows[share == i], ones[share == i].long()))
        if all(sum(len(part) for part, _ in of_bin) >= count // BINS for of_bin in parts):
            break
    else:
        raise ValueError(f"rows of {n} residues modulo {modulus} do not have labels in all {BINS} quarters: take a larger modulus or n")
    rows, ones = (torch.cat([torch.cat(kind)[: count // BINS] for kind in kinds]) for kinds in zip(*(zip(*of_bin) for of_bin in parts)))
    shuffled = torch.randperm(count, generator=generator)
    return rows[shuffled], ones[shuffled]


# The solution that can be written down, with bounded entries


class Setting(NamedTuple):
    """How the constructed solution is run on rows of one length, and what is known of its output before it is."""

    sharpness: float  # beta: a triple that matches has the score beta * (modulus // 2), any other one -beta / 2
    nulls: int  # tokens to compare with, of entries and values 0
    degree: int
    features: int
    score_bound: float  # R: what entries up to 1 allow
    delta: float
    none: float  # the output, a share of the weight, at a token without a match
    one: float  # the least output at a token with one
    error: float  # no output is farther from these than this

    @property
    def margin(self) -> float:
        return (self.one - self.none) / 2

    @property
    def threshold(self) -> float:
        return (self.one + self.none) / 2


def solution(rows: torch.Tensor, modulus: int, nulls: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries ``(count, 1, n + nulls, 3 * (modulus // 2))``, of the query and of both keys alike, and values ``(..., 1)``; float64.

    Since ``cos(a) cos(b) cos(c)``, summed over the three shifts of all angles by thirds of a turn, is ``3 / 4 cos(a + b + c)``, three
    entries a frequency say how far ``x + y + z`` is from 0. All frequencies together, for an odd modulus: ``modulus // 2`` if it is 0
    modulo ``modulus``, and -1/2 otherwise. The scores are 4 / 3 of the sums of products, times the sharpness.
    """
    frequency, third = torch.arange(1, modulus // 2 + 1)[:, None], torch.arange(3, dtype=torch.float64) / 3
    turns = (rows[..., None, None] * frequency % modulus).double() / modulus + third
    entries = (2 * math.pi * turns).cos().flatten(2)
    return tuple(F.pad(x, (0, 0, 0, nulls))[:, None] for x in (entries, torch.ones_like(entries[..., :1])))


def _outputs(n: int, modulus: int, sharpness: float) -> tuple[int, float, float]:
    """Null tokens; the output at a token without a match, and the least one at a token with one."""
    rest = math.exp(-sharpness / 2)
    none, one = n**2 * rest, (n**2 - 1) * rest + math.exp(sharpness * (modulus // 2))
    # The outputs lie farthest apart where pairs with a null token, of score 0, weigh as much as the geometric mean of the two.
    nulls = max(1, round(math.sqrt(n**2 + math.sqrt(none * one)) - n))
    beside = 2 * n * nulls + nulls**2
    return nulls, none / (none + beside), one / (one + beside)


def setting(n: int, modulus: int, degree: int, sharpness: float, dtype: torch.dtype = torch.float64) -> Setting:
    """ValueError where the polynomial of this degree says nothing, or has too many features."""
    dim = 3 * (modulus // 2)
    approximation = approximate(dim, 3, 4 / 3 * sharpness, 1.0, degree, 1.0, dtype)
    nulls, none, one = _outputs(n, modulus, sharpness)
    both = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1)
    error = certify(approximation, dim, [both, both], None, 1, dtype, dtype).error.item()
    # Each entry is rounded too, and computed in a few steps.
    error += 7 * torch.finfo(dtype).eps * approximation.score_bound
    bounds = approximation.score_bound, approximation.delta
    return Setting(sharpness, nulls, degree, feature_count(dim, degree), *bounds, none, one, error)


@lru_cache
def best_setting(n: int, modulus: int, dtype: torch.dtype = torch.float64, margin: float = 0.0) -> Setting | None:
    """Of the least degree at which the error is less than the margin, and the margin at least ``margin``; None if there is none."""
    sharpnesses = [1e-4 * 1.1**step for step in range(100)]
    for degree in range(1, MAX_DEGREE + 1):
        best = None
        for sharpness in sharpnesses:
            _, none, one = _outputs(n, modulus, sharpness)
            if (one - none) / 2 < margin:
                continue
            try:
                candidate = setting(n, modulus, degree, sharpness, dtype)
            except ValueError:
                break
            # In proportion to the margin, the error falls while it is rounding, and then rises.
            if best is not None and candidate.error * best.margin > best.error * candidate.margin:
                break
            best = candidate
        if best is not None and best.error < best.margin:
            return best
    return None


def detect(rows: torch.Tensor, modulus: int, chosen: Setting, dtype: torch.dtype = torch.float64, **options) -> torch.Tensor:
    """``(count, n)`` bool: what the constructed solution finds in rows of the length that ``chosen`` is for.

    options: of :func:`tensor_attention`; by default its exact path.
    """
    entries, values = (x.to(dtype) for x in solution(rows, modulus, chosen.nulls))
    out = tensor_attention(entries, [entries] * 2, [values] * 2, scale=4 / 3 * chosen.sharpness, causal=False, **options)
    return out[:, 0, : rows.shape[1], 0] > chosen.threshold

"""The near-linear path of tensor attention: its polynomials, sums and state, and that its certificate holds."""

import itertools
import math
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_multipole import tensor_attention
from hf_multipole.modeling import polynomial_attention as module
from hf_multipole.modeling.polynomial_attention import (
    BoundViolation,
    approximate,
    attend,
    feature_count,
    features,
    minimax_exponential,
)
from hf_multipole.reference import tensor_attention_reference
from tests.helpers.numerics import assert_within, peak_bytes
from tests.helpers.tensor_cases import TensorCase, cases, fixed_polynomial, make, plain_tensors, polynomial

PADDED = ((2, 3), (0, 5))
FULL = TensorCase(n=14, repeats=2, entries=1.0)


# The polynomials


@pytest.mark.parametrize("degree, bound", [(0, 0.5), (1, 1.0), (2, 1.0), (4, 3.4), (6, 3.4), (9, 3.0), (11, 8.0)])
def test_the_relative_error_alternates(degree, bound):
    """Chebyshev: an error that takes its largest size with alternating signs degree + 2 times is the least possible."""
    coefficients, delta = minimax_exponential(degree, bound)
    s = torch.linspace(-bound, bound, 20001, dtype=torch.float64)
    error = module._evaluate(coefficients, s / bound) * (-s).exp() - 1
    assert error.abs().max() <= delta
    extreme = error[error.abs() > 0.999 * delta].sign()
    assert (extreme.diff() != 0).sum() + 1 == degree + 2


def test_known_errors():
    """Degree 0 can be solved by hand; the others are the figures of a first implementation."""
    for bound in (0.1, 1.0, 3.0):
        assert minimax_exponential(0, bound)[1] == pytest.approx(math.tanh(bound), rel=1e-9)
    for degree, bound, delta in ((2, 1, 0.04), (4, 1, 5e-4), (6, 1, 3e-6), (2, 3.4, 0.76), (4, 3.4, 0.15), (6, 3.4, 0.011)):
        assert minimax_exponential(degree, float(bound))[1] == pytest.approx(delta, rel=0.1)


def errors(coefficients, bound: float, places: list[float]) -> list[float]:
    """P(x) exp(-bound x) - 1 at places that are multiples of 2^-20, to 60 digits: P exactly, exp by its own definition."""
    fraction = [Fraction(c) for c in coefficients]
    shift = max(c.denominator for c in fraction).bit_length()
    whole = [int(c * 2**shift) for c in fraction]
    out = []
    with localcontext() as context:
        context.prec = 60
        for x in places:
            total, step = 0, int(x * 2**20)
            # sum(c * step^i * 2^(20 (degree - i))), all integers.
            for i, c in enumerate(reversed(whole)):
                total = total * step + (c << 20 * i)
            value = Decimal(total) / 2 ** (shift + 20 * (len(whole) - 1))
            out.append(float(value * (Decimal(-bound) * Decimal(x)).exp() - 1))
    return out


@given(degree=st.integers(0, module.MAX_DEGREE), bound=st.floats(1e-12, 80))
@example(degree=24, bound=10.0)
@example(degree=5, bound=8.8e-5)
@example(degree=4, bound=3.7e-6)
def test_the_error_is_never_larger_than_said(degree, bound):
    """At random places and at both ends; where it is below 1, the polynomial is positive."""
    coefficients, delta = minimax_exponential(degree, bound)
    drawn = torch.randint(-(2**20), 2**20, (20,), generator=torch.Generator().manual_seed(degree))
    assert max(map(abs, errors(coefficients, bound, [-1.0, 1.0, *(drawn / 2**20).tolist()]))) <= delta


@pytest.mark.parametrize("bound", [1e-12, 3.7e-6, 8.8e-5, 1e-3, 0.03, 0.4, 3.4, 12.0, 80.0])
def test_every_degree_is_certified(bound, monkeypatch):
    """From bounds that float64 does not tell from 0 to those where exp overflows: finite, never smaller than what is found on a grid,
    hardly larger where rounding is not what limits it. No LAPACK routine is given what is not finite: some crash on it."""
    solve = torch.linalg.solve_ex

    def checked(matrix, right):
        assert matrix.isfinite().all() and right.isfinite().all()
        return solve(matrix, right)

    monkeypatch.setattr(torch.linalg, "solve_ex", checked)
    minimax_exponential.cache_clear()
    # Close to each other near the ends, as the extrema are.
    places = [round(math.cos(math.pi * i / 100) * 2**20) / 2**20 for i in range(101)]
    for degree in range(module.MAX_DEGREE + 1):
        coefficients, delta = minimax_exponential(degree, bound)
        assert len(coefficients) == degree + 1 and all(map(math.isfinite, coefficients))
        largest = max(map(abs, errors(coefficients, bound, places)))
        assert largest <= delta, degree
        noise = 2**-52 * 5 * (degree + 2) * (sum(map(abs, coefficients)) * math.exp(bound) + bound)
        if noise < delta < 1:
            # Of degree + 2 extrema, some fall between the places.
            assert delta <= largest * (1 + (math.pi * (degree + 2) / 100) ** 2) + noise, degree


@pytest.mark.parametrize("bound", [-1.0, 80.1, math.inf, math.nan])
def test_bounds_without_a_polynomial(bound):
    with pytest.raises(ValueError, match="bound is .* must be from 0 to 80"):
        minimax_exponential(3, bound)


@pytest.mark.parametrize("entry_bound, scale", [(1e200, 1.0), (1.0, math.inf), (0.0, math.inf)])
def test_scores_beyond_all_numbers(entry_bound, scale):
    for degree in (None, 3):
        with pytest.raises(BoundViolation):
            approximate(2, 3, scale, entry_bound, degree, 1e-3, torch.float64)


@pytest.mark.parametrize("bound", [1.0, 3.0])
def test_better_than_taylor_and_better_with_the_degree(bound):
    s, before = torch.linspace(-bound, bound, 2001, dtype=torch.float64), 1.0
    for degree in range(9):
        delta = minimax_exponential(degree, bound)[1]
        taylor = sum(s**i / math.factorial(i) for i in range(degree + 1))
        assert delta < ((taylor * (-s).exp() - 1).abs().max() if degree else 2)
        assert delta < before
        before = delta


def test_scores_of_zero():
    assert minimax_exponential(3, 0.0) == ((1.0, 0.0, 0.0, 0.0), 0.0)
    call = make(FULL)
    expected = call(tensor_attention_reference, scale=0.0)
    assert_within(call(polynomial, scale=0.0), expected, 1e-12, "equal weights", FULL)
    with torch.no_grad():
        call.leaves["k0"].zero_()
        call.leaves["k1"].zero_()
        call.leaves["q"].zero_()
    assert_within(call(polynomial), expected, 1e-12, "equal weights", FULL)


def test_coefficients_do_not_depend_on_the_default_device():
    """A configuration is also made where weights are not: on "meta"."""
    known = minimax_exponential(5, 1.5)
    minimax_exponential.cache_clear()
    with torch.device("meta"):
        assert minimax_exponential(5, 1.5) == known


def test_polynomials_are_found_once():
    minimax_exponential.cache_clear()
    for _ in range(3):
        make(FULL)(polynomial)
    assert minimax_exponential.cache_info().misses <= module.MAX_DEGREE + 1
    misses = minimax_exponential.cache_info().misses
    with torch.no_grad():
        call = make(FULL)
        call.leaves["q"].mul_(0.9999)  # what is measured differs, yet is rounded up alike
        call(polynomial)
    assert minimax_exponential.cache_info().misses == misses


# Features


@pytest.mark.parametrize("dim, degree", [(1, 0), (1, 5), (3, 4), (4, 1), (5, 3)])
def test_features_are_all_monomials(dim, degree):
    x = torch.rand(7, dim, dtype=torch.float64)
    found = features(x, degree)
    expected = [
        x[:, list(choice)].prod(1) for power in range(degree + 1) for choice in itertools.combinations_with_replacement(range(dim), power)
    ]
    assert found.shape[1] == feature_count(dim, degree) == len(expected)
    torch.testing.assert_close(found.sort(1).values, torch.stack(expected, 1).sort(1).values)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_features_give_the_polynomial_of_the_score(order, scale):
    dim, bound = 3, 0.9
    approximation = approximate(dim, order, scale, bound, 4, 1e-3, torch.float64)
    tensors = (torch.rand(order, 20, dim, dtype=torch.float64) * 2 - 1) * bound
    product = features(tensors / bound, 4).prod(0) @ module._weights(approximation, dim, tensors)
    score = scale * tensors.prod(0).sum(-1)
    torch.testing.assert_close(product, module._evaluate(approximation.coefficients, score / (scale * dim * bound**order)))
    assert ((product / score.exp() - 1).abs() <= approximation.delta).all()


# Outputs and gradients


@settings(max_examples=40)
@given(case=cases(windows=False, entries=1.0))
@example(replace(FULL, n=70, batch=1, cuts=(65,)))
@example(replace(FULL, n=70, batch=1, causal=False, queries=9))
@example(TensorCase(n=30, order=2, entries=1.0, padding=PADDED))
@pytest.mark.slow
def test_output_and_gradients_equal_the_reference(case):
    """With a polynomial of a high degree."""
    call = make(case)
    expected = call.with_gradients(tensor_attention_reference)
    for name, value in call.with_gradients(polynomial, tolerance=1e-11).items():
        # A gradient is a difference of terms, each of them off by delta; their number and size are below these.
        assert_within(value, expected[name], 1e-8 * max(1.0, expected[name].abs().max().item()), name, case)


@pytest.mark.parametrize("causal", [True, False])
def test_the_size_of_the_parts_does_not_matter(monkeypatch, causal):
    call = make(replace(FULL, n=40, causal=causal, queries=33))
    expected = call.with_gradients(fixed_polynomial)
    for at_once, chunk, summed in ((1, 1, 1), (20_000, 5, 7), (2**30, 16, 32)):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        monkeypatch.setattr(module, "_CHUNK", {2: chunk})
        monkeypatch.setattr(module, "_SUMMED", summed)
        for name, value in call.with_gradients(fixed_polynomial).items():
            assert_within(value, expected[name], 1e-12, name, call)


# The certificate


def holds(case: TensorCase, change=lambda call: None, **options):
    """The output lies within the certificate's error of the reference; returns the largest share of it that was used up."""
    call = make(case)
    with torch.no_grad():
        change(call)
    exact = call(tensor_attention_reference).detach()
    out, certificate = call(polynomial, return_certificate=True, **options)
    error = (out.detach().double() - exact).abs()
    assert certificate.error.shape == (*out.shape[:2], 1, out.shape[3])
    assert certificate.error.isfinite().all()
    assert (error <= certificate.error).all(), f"error {error.max():.3g}: {case}, {certificate}"
    return (error / certificate.error).max().item(), certificate


@settings(max_examples=60)
@given(
    case=cases(windows=False, entries=1.0, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    degree=st.sampled_from([None, 2, 4, 6]),
)
def test_the_certificate_holds(case, degree):
    holds(case, degree=degree, tolerance=1e-2)


@settings(max_examples=60)
@given(
    case=cases(windows=False, dtypes=(torch.float64, torch.float32, torch.bfloat16)),
    degree=st.integers(1, 6),
    entries=st.sampled_from([0.25, 1.0, 1.25]),
)
def test_the_certificate_holds_in_corners(case, degree, entries):
    """Entries of +-B and values of +-1: scores of two values, each at an end of the interval."""

    def corners(call):
        generator = torch.Generator().manual_seed(case.seed)
        for name, x in call.leaves.items():
            # Equal in all entries of a token: then every score is +-R.
            sign = torch.randint(2, x[..., :1].shape, generator=generator) * 2 - 1
            x.copy_(sign * (1.0 if name[0] == "v" else entries))

    try:
        _, certificate = holds(replace(case, scale=case.scale or 0.5), corners, degree=degree)
        assert certificate.entry_bound <= 1.03 * entries
    except BoundViolation:
        with pytest.raises(BoundViolation):  # not for rounding's sake, except where that is coarse
            approximate(case.dim, case.order, case.scale or 0.5, entries * 1.03, degree, 1.0, torch.float32)


@pytest.mark.parametrize("degree, bound", [(2, 1.0), (3, 2.0), (4, 3.4)])
def test_the_certificate_is_nearly_reached(degree, bound):
    """Scores where the polynomial is most too large carry values of 1, those where it is most too small values of -1."""
    coefficients, delta = minimax_exponential(degree, bound)
    s = torch.linspace(-bound, bound, 4001, dtype=torch.float64)
    error = module._evaluate(coefficients, s / bound) * (-s).exp() - 1
    high, low = s[error.argmax()], s[error.argmin()]
    # So many of each that both weigh the same.
    counts = [round(10 * math.exp(max(high, low) - x)) for x in (high, low)]
    keys = torch.cat([x.repeat(count) for x, count in zip((high, low), counts)])[None, None, :, None] / bound
    values = torch.cat([torch.full((count,), x, dtype=torch.float64) for x, count in zip((1, -1), counts)])[None, None, :, None]
    q, options = torch.ones_like(keys[:, :, :1]), dict(scale=bound, causal=False)
    out, certificate = polynomial(q, [keys], [values], degree=degree, entry_bound=1.0, return_certificate=True, **options)
    error = (out - tensor_attention_reference(q, [keys], [values], **options)).abs().max()
    # Equal weights are moved apart by delta; delta / (1 - delta) is for any weights.
    assert 0.95 * delta <= error <= certificate.error.max()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 200, 3000])
def test_rounding_is_within_its_part(n, causal):
    """float32 against float64, both by the polynomial; far more than the error where scores are small, yet of its order."""
    call = make(TensorCase(n=n, batch=1, kv_heads=1, dim=4, entries=1.0, causal=causal, dtype=torch.float32, seed=n))
    out, certificate = call(polynomial, degree=4, entry_bound=1.0, return_certificate=True)
    exact = call(lambda q, keys, values, **rest: polynomial(q.double(), [k.double() for k in keys], [v.double() for v in values], **rest),
                 degree=4, entry_bound=1.0)  # fmt: skip
    assert (out.double() - exact).abs().max() <= certificate.rounding.max() < 0.01 * call.leaves["v0"].abs().max() ** 2


def test_the_certificate_says_what_was_done():
    call = make(replace(FULL, dim=4))
    _, certificate = call(polynomial, entry_bound=1.0, scale=0.25, return_certificate=True)
    assert certificate.entry_bound == 1.0 and certificate.score_bound == 1.0
    # The least degree within the tolerance.
    assert certificate.delta <= 1e-3 < minimax_exponential(certificate.degree - 1, 1.0)[1]
    assert certificate.delta == minimax_exponential(certificate.degree, 1.0)[1]
    largest = max(x.abs().max().item() for name, x in call.leaves.items() if name[0] != "v")
    _, certificate = call(polynomial, return_certificate=True)
    assert largest <= certificate.entry_bound <= 1.03 * largest


def test_a_certificate_of_constant_values_is_rounding_alone():
    call = make(replace(FULL, padding=PADDED))
    with torch.no_grad():
        call.leaves["v0"].fill_(2)
        call.leaves["v1"].fill_(-3)
    _, certificate = call(polynomial, return_certificate=True)
    torch.testing.assert_close(certificate.error, certificate.rounding)
    assert certificate.error.max() < 1e-9


# Violations


@pytest.mark.parametrize(
    "change, options, words",
    [
        ({}, {"entry_bound": 0.5}, "beyond entry_bound 0.5"),
        ({}, {"scale": 30.0}, "no polynomial"),
        ({}, {"scale": 1e30}, "no polynomial"),
        ({}, {"scale": 10.0, "degree": 2}, "degree 2 says nothing"),
        ({"q": math.nan}, {}, "q or keys are not finite"),
        ({"k1": math.nan}, {}, "q or keys are not finite"),
        ({"k0": math.inf}, {"entry_bound": 1.0}, "q or keys are not finite"),
        ({"v1": math.nan}, {}, "values are not finite"),
    ],
)
def test_violations_raise_or_take_the_exact_path(change, options, words):
    call = make(FULL)
    with torch.no_grad():
        for name, value in change.items():
            call.leaves[name][0, 0, 5, 1] = value
    with pytest.raises(BoundViolation, match=words) as caught:
        call(polynomial, **options)
    assert "\n" not in str(caught.value)
    out, certificate = call(polynomial, **options, on_violation="exact", return_certificate=True)
    exact = call(tensor_attention, scale=options.get("scale"))
    assert certificate is None and torch.equal(out.isnan(), exact.isnan()) and torch.equal(out.nan_to_num(), exact.nan_to_num())


def test_large_scores_in_float32_ask_for_float64():
    """delta alone would do, but the terms cancel by more than float32 can tell."""
    call = make(replace(FULL, dim=2, entries=1.0, dtype=torch.float32))
    options = dict(scale=4.0, degree=20, entry_bound=1.0)
    with pytest.raises(BoundViolation, match="float32"):
        call(polynomial, **options)
    assert make(replace(FULL, dim=2, entries=1.0))(polynomial, return_certificate=True, **options)[1].error.max() < 1e-3


@pytest.mark.parametrize("degree", [6, None])
def test_too_many_features_are_refused_before_memory_is_taken(degree):
    arguments = plain_tensors(dim=40) | {"method": "polynomial", "entry_bound": 8.0, "scale": 8.0**-3 / 40 * 3, "tolerance": 1e-4}
    with pytest.raises(ValueError, match="features"):
        tensor_attention(**arguments, degree=degree)
    assert peak_bytes(lambda: pytest.raises(ValueError, tensor_attention, **arguments, degree=degree)) < 2**20


# The state


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_state_continues_a_row(order):
    """In parts, or token by token, each row gives what it gives at once; the state does not grow."""
    call = make(TensorCase(n=30, order=order, repeats=2, dim=2, entries=1.0))
    q, *others = (x.detach() for x in call.leaves.values())
    keys, values = torch.stack(others[: order - 1]), torch.stack(others[order - 1 :])
    approximation = approximate(2, order, 2**-0.5, 1.0, 4, 1e-3, torch.float64)
    expected, final = attend(q, keys, values, approximation, causal=True)
    assert_within(call(polynomial, degree=4, entry_bound=1.0), expected, 1e-12, "at once", call)
    assert final.shape == (order - 1, 2, 2, feature_count(2, 4), 3)
    for cuts in ([7, 8, 21], range(1, 30)):
        state, outputs = None, []
        for start, stop in itertools.pairwise([0, *cuts, 30]):
            part = slice(start, stop)
            before = None if state is None else state.clone()
            out, after = attend(q[:, :, part], keys[:, :, :, part], values[:, :, :, part], approximation, causal=True, state=state)
            assert before is None or torch.equal(state, before)  # a state may be continued twice
            state = after
            outputs.append(out)
        assert_within(torch.cat(outputs, 2), expected, 1e-12, "in parts", call)
        assert_within(state, final, 1e-9, "state", call)


def test_bidirectional_queries_see_the_state():
    call = make(replace(FULL, causal=False))
    q, k0, k1, v0, v1 = (x.detach() for x in call.leaves.values())
    approximation = approximate(3, 3, 3**-0.5, 1.0, 5, 1e-3, torch.float64)
    keys, values = torch.stack([k0, k1]), torch.stack([v0, v1])
    _, state = attend(q[:, :, :0], keys[:, :, :, :6], values[:, :, :, :6], approximation, causal=False)
    out, _ = attend(q, keys[:, :, :, 6:], values[:, :, :, 6:], approximation, causal=False, state=state)
    assert_within(out, call(fixed_polynomial), 1e-12, "out", call)


# Cost


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
def test_memory_does_not_hold_the_features(causal):
    """Forward and backward together take what inputs take, times a constant, and a part of the features at a time."""
    peaks = []
    for n in (1024, 2048, 4096):
        call = make(TensorCase(n=n, batch=1, kv_heads=1, dim=4, entries=1.0, causal=causal, dtype=torch.float32))
        peaks.append(peak_bytes(lambda: call.with_gradients(polynomial, degree=8, entry_bound=1.0)))
    inputs = 4 * (3 * 4 + 2 * 2)  # bytes of a token
    # The features of q alone would take more.
    assert (peaks[2] - peaks[1]) / 2048 <= 20 * inputs < 4 * feature_count(4, 8)


def test_long_rows_keep_their_precision():
    """Taking tokens off the state, from the end to the start, leaves the gradients of the first ones as good as of the last."""
    case = TensorCase(n=3000, batch=1, kv_heads=1, dim=2, entries=1.0, dtype=torch.float32)
    actual = make(case).with_gradients(polynomial, degree=3, entry_bound=1.0)
    exact = make(case, torch.float64, rounded=torch.float32).with_gradients(polynomial, degree=3, entry_bound=1.0)
    for name, value in exact.items():
        for part in (slice(0, 50), slice(2950, 3000)):
            size = value[:, :, part].abs().max().item()
            # Ten features, sums of 64 tokens: a hundred roundings and a few more.
            assert_within(actual[name][:, :, part], value[:, :, part], 300 * torch.finfo(torch.float32).eps * size, name, part)

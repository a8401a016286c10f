"""Properties of tensor attention, of every implementation: exact, near-linear, and the GPU kernels of both.

The kernels run on a GPU where there is one, else under Triton's interpreter, which takes small cases only.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import hf_multipole
from tests.helpers.numerics import LOW
from tests.helpers.rows import LAYOUTS
from tests.helpers.tensor_cases import TensorCase, by_kernels, cases, fixed_polynomial, make, polynomial
from tests.helpers.tensor_properties import (
    compiles_without_a_graph_break,
    documents_do_not_meet,
    future_does_not_matter,
    half_precision_is_rounded_once,
    layout_does_not_matter,
    matches_reference,
    padding_does_not_matter,
    sees_exactly_what_is_visible,
    weights_sum_to_one,
)

exact = hf_multipole.tensor_attention
PADDED = ((2, 3), (0, 5))
FULL = TensorCase(n=14, repeats=2)
SHAPES = {
    "plain": {},
    "padded": {"padding": PADDED},
    "packed": {"cuts": (3, 8)},
    "packed and padded": {"cuts": (3, 8), "padding": PADDED},
    "last queries": {"queries": 4},
}
WINDOWS = {"none": None, "both": (3, 5), "the first": (3, None), "the second": (None, 4), "narrow": (1, 2)}

# The kernels
SMALL = replace(FULL, n=18, batch=1, kv_heads=1, repeats=1, dtype=torch.float32)
NARROW = replace(SMALL, n=20, window=(3, 6))
PACKED = {"cuts": (3, 8), "padding": ((2, 1),)}
CASES = {
    "causal": SMALL,
    "bidirectional": replace(SMALL, n=17, causal=False),
    "windows": NARROW,
    "windows, bidirectional": replace(NARROW, causal=False),
    "a window of the second": replace(NARROW, window=(None, 3)),
    "the narrowest windows": replace(NARROW, window=(1, 1)),
    "grouped heads": replace(NARROW, n=12, batch=2, kv_heads=2, repeats=3, layout="fused"),
    "grouped heads, full": replace(SMALL, n=10, repeats=2, layout="strided"),
    "padded": replace(NARROW, batch=2, padding=((2, 3), (0, 5)), causal=False),
    "packed": replace(SMALL, **PACKED),
    "packed, bidirectional": replace(NARROW, causal=False, **PACKED),
    "the last queries": replace(SMALL, queries=4),
    "the last queries, bidirectional": replace(NARROW, queries=4, causal=False, repeats=2),
    "one query": replace(SMALL, queries=1),
    "one token": replace(SMALL, n=1),
    "whole widths": replace(NARROW, dim=16, value_dim=32, scale=-0.1),
}
rounded = partial(matches_reference, rounded_products=True)
wide = {"dim": 16, "value_dim": 16}
KERNELS = [
    *((matches_reference, case, name) for name, case in CASES.items()),
    *(
        (rounded, replace(CASES[name], dtype=dtype, **wide), f"{name}, {dtype}, rounded products")
        for name in ("bidirectional", "windows", "packed")
        for dtype in (torch.bfloat16, torch.float16)
    ),
    *(
        (sees_exactly_what_is_visible, replace(CASES[name], n=7, padding=((1, 1),), cuts=(4,)), f"visible, {name}")
        for name in ("causal", "windows, bidirectional")
    ),
    *(
        (partial(future_does_not_matter, values=(torch.nan, torch.inf)), replace(SMALL, n=7, window=window), f"future, {window}")
        for window in (None, (2, 4))
    ),
    *(
        (partial(padding_does_not_matter, garbage=(torch.nan, torch.inf)), replace(NARROW, n=7, dtype=dtype), f"padding, {dtype}")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    (documents_do_not_meet, replace(SMALL, n=9, cuts=(2, 6)), "documents"),
]
# The interpreter computes what is not finite as the kernels do, and says so.
interpreted = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("holds, case", [pytest.param(*pair, id=name) for *pair, name in KERNELS])
@interpreted
@pytest.mark.slow
def test_kernels(small_tiles, holds, case):
    holds(by_kernels, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@interpreted
@pytest.mark.slow
def test_kernels_with_tiles_of_the_size_that_is_used(quick_interpreter, dtype):
    rounded(by_kernels, TensorCase(n=150, batch=1, kv_heads=1, window=(2, 70), padding=((3, 0),), cuts=(20,), dtype=dtype, **wide))


@interpreted
@pytest.mark.slow
def test_near_linear_kernels_see_exactly_what_is_visible(quick_interpreter):
    near = partial(by_kernels, method="polynomial", degree=3, entry_bound=1.0)
    case = TensorCase(n=5, dim=2, batch=1, kv_heads=1, entries=1.0, dtype=torch.float32, padding=((1, 0),), cuts=(3,))
    sees_exactly_what_is_visible(near, case)


# The exact path, in chosen cases


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_equal_the_reference(causal, window, shape):
    matches_reference(exact, replace(FULL, causal=causal, window=WINDOWS[window], **SHAPES[shape]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, (3, 5)])
def test_half_precision_is_rounded_once(window, dtype):
    half_precision_is_rounded_once(exact, replace(FULL, window=window, dtype=dtype, padding=PADDED))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", [exact, fixed_polynomial], ids=["exact", "near-linear"])
def test_layout_does_not_matter(attention, layout):
    layout_does_not_matter(attention, replace(FULL, entries=1.0, layout=layout))


DIFFERENTIATED = [(exact, order, window) for order, window in ((2, None), (3, None), (3, (2, 4)), (4, None), (4, (2, None, 3)))]
DIFFERENTIATED += [(fixed_polynomial, order, None) for order in (2, 3, 4)]


@pytest.mark.parametrize("attention, order, window", DIFFERENTIATED)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
def test_gradients_are_numerical_derivatives(attention, causal, order, window):
    """Which share nothing with the reference; near-linear, they are those of the polynomial, whatever its degree."""
    sizes = dict(n=6, dim=2, value_dim=1, batch=1, kv_heads=1, repeats=2, queries=5)
    call = make(TensorCase(order=order, window=window, causal=causal, entries=0.5, **sizes))

    def function(q, *others):
        return attention(q, others[: order - 1], others[order - 1 :], **call.options)

    assert torch.autograd.gradcheck(function, tuple(call.leaves.values()))


COMPILED = [(exact, replace(FULL, window=(3, 5), **SHAPES[shape])) for shape in ("plain", "packed and padded")]


@pytest.mark.parametrize("attention, case", COMPILED)
@pytest.mark.slow
def test_compiles_without_a_graph_break(attention, case):
    compiles_without_a_graph_break(attention, case, bound=1e-11)


@interpreted
@pytest.mark.slow
def test_kernels_compile_without_a_graph_break(small_tiles):
    compiles_without_a_graph_break(by_kernels, replace(NARROW, n=6, cuts=(2,)), bound=0.0)


# In any call

EXAMPLES = {
    (exact, matches_reference): [
        TensorCase(n=6, order=4, window=(2, None, 3), queries=4),
        TensorCase(n=7, order=4, causal=False),
        TensorCase(n=40, order=2, window=(9,), batch=1),
        TensorCase(n=40, batch=1, window=(3, 20)),  # more than one block of queries
        TensorCase(n=40, batch=1, window=(3, 20), causal=False),
        TensorCase(n=5, order=5, batch=1, kv_heads=1),
    ],
    (exact, sees_exactly_what_is_visible): [replace(FULL, padding=PADDED, cuts=(8,), window=(3, 5))],
    (fixed_polynomial, sees_exactly_what_is_visible): [  # nothing but padding
        TensorCase(n=2, dim=2, batch=1, causal=False, padding=((1, 1),), entries=1.0)
    ],
    (exact, future_does_not_matter): [FULL, replace(FULL, n=30, batch=1, window=(3, 20))],
    (exact, padding_does_not_matter): [replace(FULL, causal=False, window=(3, None))],
    (exact, documents_do_not_meet): [replace(FULL, cuts=(3, 8))],
}
EVERY = {"dtypes": (torch.float64, *LOW)}
BOUNDED = {"windows": False, "entries": 1.0}
DRAWN = [  # implementation, property, what is drawn, and how often if not as the profile says
    (exact, matches_reference, {}, 40),
    (exact, matches_reference, {"dtypes": LOW}, None),
    (exact, sees_exactly_what_is_visible, {}, None),
    (exact, weights_sum_to_one, {"windows": False}, None),
    (exact, future_does_not_matter, EVERY, 10),
    (exact, padding_does_not_matter, EVERY, 15),
    (exact, documents_do_not_meet, {}, 15),
    (fixed_polynomial, sees_exactly_what_is_visible, BOUNDED | {"dim": 2}, 15),
    (fixed_polynomial, partial(future_does_not_matter, values=(0.9, -1.0)), BOUNDED, 10),
    (polynomial, padding_does_not_matter, BOUNDED, 10),
    (fixed_polynomial, documents_do_not_meet, BOUNDED, 10),
]


@pytest.mark.parametrize("attention, holds, drawn, count", DRAWN)
def test_any_call(attention, holds, drawn, count):
    @settings(max_examples=count or settings.default.max_examples)
    @given(case=cases(**drawn))
    def any_call(case):
        holds(attention, case)

    for case in EXAMPLES.get((attention, holds), []):
        any_call = example(case)(any_call)
    any_call()


@interpreted
@pytest.mark.slow
def test_any_call_of_the_kernels(small_tiles):
    @settings(max_examples=6)
    @given(case=cases(dtypes=(torch.float32,), n=st.integers(1, 9), orders=(3,)))
    def any_call(case):
        matches_reference(by_kernels, case)

    any_call()

"""Properties of multipole attention, of every implementation: PyTorch's, its O(n) form, and the GPU kernels.

The kernels run on a GPU where there is one, else under Triton's interpreter, which takes small cases only.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_multipole import multipole_attention
from tests.helpers.interpreter import DEVICE
from tests.helpers.multipole_cases import PADDED, SHAPES, Case, cases
from tests.helpers.multipole_properties import (
    arguments_are_not_written_to,
    as_many_sinks_as_tokens_are_exact_attention,
    as_without_downsampling,
    autocast_computes_in_bfloat16,
    compiles_without_a_graph_break,
    documents_do_not_meet,
    exact_when_keys_are_constant,
    exact_when_short,
    future_does_not_matter,
    gradients_are_numerical_derivatives,
    half_precision_is_rounded_once,
    layout_does_not_matter,
    masses_of_one_change_nothing,
    matches_reference,
    not_finite_reaches_whom_the_reference_says,
    one_tensor_in_every_place,
    padding_does_not_matter,
    sees_exactly_what_is_visible,
    weights_sum_to_one,
)
from tests.helpers.numerics import EVERY, LOW
from tests.helpers.rows import LAYOUTS

SUMMARIES = ("mean", "direct", "hierarchical")
HALF = (torch.bfloat16, torch.float16)
# One of everything: ragged, grouped heads, fewer bias columns than levels, a cap, other keys for the far field.
FULL = Case(n=45, repeats=2, bias_levels=2, softcap=2.0, far_keys=True, summary="hierarchical")
LINEAR = replace(FULL, downsample=True)
FORMS = {"torch": FULL, "O(n)": LINEAR}
# Sinks in the first block, in a part of it, and in several; tokens with masses.
WEIGHTED = {
    "torch, sinks": replace(FULL, sinks=3),
    "torch, saliency": replace(FULL, saliency=True),
    "torch, both": replace(FULL, sinks=9, saliency=True, far_keys=False),
    "O(n), sinks": replace(LINEAR, sinks=9),
    "O(n), both": replace(LINEAR, sinks=3, saliency=True),
}
ALL = FORMS | WEIGHTED
# As small as three levels allow.
SMALL = replace(FULL, n=17, batch=1, kv_heads=1, block_size=2, rank=1, dtype=torch.float32)
ONE_HEAD = replace(SMALL, repeats=1)
PACKED = {"cuts": (5,), "padding": ((2, 1),)}

# The kernels, by property; those of the reference have names.
CASES = {
    "causal": SMALL,
    "bidirectional": replace(ONE_HEAD, causal=False),
    "padded, bidirectional": replace(SMALL, n=12, causal=False, padding=((2, 1),)),
    "packed": replace(ONE_HEAD, **PACKED),
    "packed, bidirectional": replace(ONE_HEAD, causal=False, **PACKED),
    "two rows, two key heads, heads between tokens": replace(SMALL, n=7, batch=2, kv_heads=2, layout="fused"),
    "rows of different padding": replace(ONE_HEAD, n=11, batch=2, causal=False, padding=((3, 1), (0, 4)), layout="strided"),
    "the last queries": replace(SMALL, queries=3),
    "one query": replace(SMALL, queries=1, bias_levels=0),
    "no far field": replace(SMALL, n=3),
    "one token": replace(SMALL, n=1),
    "no size weighting, no cap": replace(SMALL, n=9, size_weighting=False, softcap=None, bias_levels=0, far_keys=False, summary="mean"),
    "direct, ragged": replace(SMALL, n=21, block_size=4, rank=2, causal=False, summary="direct", size_weighting=False),
    "whole tiles": replace(ONE_HEAD, n=70, block_size=16, rank=4, dim=16, value_dim=32),
    "fewer levels than the row has": replace(ONE_HEAD, max_levels=1),
    "O(n) form": replace(ONE_HEAD, downsample=True),
    "O(n) form, packed, bidirectional": replace(ONE_HEAD, causal=False, downsample=True, **PACKED),
    "several tiles a block, causal": replace(ONE_HEAD, n=160, block_size=100, rank=4),
    "several tiles a block": replace(ONE_HEAD, n=150, block_size=70, rank=35, causal=False, softcap=None),
    "sinks": replace(SMALL, sinks=3),
    "sinks, bidirectional": replace(ONE_HEAD, sinks=3, causal=False, far_keys=False),
    "sinks, two rows, two key heads, grouped": replace(SMALL, n=11, batch=2, kv_heads=2, sinks=1, saliency=True, layout="fused"),
    "sinks of documents, masses": replace(ONE_HEAD, **PACKED, sinks=2, saliency=True),
    "sinks of documents, masses, bidirectional": replace(SMALL, n=15, causal=False, cuts=(6,), padding=((2, 1),), sinks=2, saliency=True),
    "sinks, rows of different padding": replace(ONE_HEAD, n=13, batch=2, causal=False, padding=((3, 1), (0, 4)), sinks=2),
    "sinks, the last queries": replace(SMALL, queries=3, sinks=2, saliency=True),
    "more sinks than a tile": replace(ONE_HEAD, n=40, sinks=19, softcap=None),
    "more sinks than a tile, packed": replace(ONE_HEAD, n=44, cuts=(3,), sinks=18, block_size=4, rank=2),
    "all are sinks": replace(SMALL, sinks=17),
    "sinks, no levels": replace(SMALL, sinks=2, max_levels=0),
    "sinks, several programs": replace(ONE_HEAD, n=90, block_size=16, rank=4, dim=16, value_dim=32, sinks=4, saliency=True),
    "masses": replace(SMALL, saliency=True),
    "masses, means": replace(SMALL, saliency=True, summary="mean", softcap=None, far_keys=False),
    "masses, bidirectional, padded": replace(ONE_HEAD, n=15, causal=False, padding=((2, 1),), saliency=True),
    "masses, no size weighting": replace(ONE_HEAD, saliency=True, size_weighting=False),
    "sinks, O(n) form": replace(ONE_HEAD, downsample=True, sinks=3, saliency=True),
    "sinks, O(n) form, packed, bidirectional": replace(ONE_HEAD, causal=False, downsample=True, sinks=2, saliency=True, **PACKED),
}  # fmt: skip
# Within twice the error of a reference that rounds its products.
ROUNDED = {
    "bfloat16, bidirectional": replace(ONE_HEAD, dtype=torch.bfloat16, causal=False, **PACKED),
    "bfloat16, whole tiles": replace(CASES["whole tiles"], dtype=torch.bfloat16, softcap=None),
    "float16": replace(ONE_HEAD, dtype=torch.float16),
    "float16, bidirectional, packed": replace(SMALL, dtype=torch.float16, causal=False, **PACKED),
    "bfloat16, O(n) form": replace(ONE_HEAD, dtype=torch.bfloat16, downsample=True),
    "bfloat16, sinks, masses": replace(ONE_HEAD, dtype=torch.bfloat16, sinks=3, saliency=True),
    "bfloat16, sinks, masses, bidirectional, packed": replace(
        SMALL, dtype=torch.bfloat16, causal=False, sinks=2, saliency=True, cuts=(6,), padding=((2, 1),)
    ),
    "bfloat16, sinks, O(n) form": replace(ONE_HEAD, dtype=torch.bfloat16, downsample=True, sinks=3),
    "float16, O(n) form": replace(ONE_HEAD, dtype=torch.float16, downsample=True, causal=False, padding=((2, 1),)),
}
KERNELS = [
    *((matches_reference, case, name) for name, case in CASES.items()),
    *((partial(matches_reference, rounded_products=True), case, f"{name}, rounded products") for name, case in ROUNDED.items()),
    *((weights_sum_to_one, replace(SMALL, dtype=dtype, padding=((3, 2),)), f"weights, {dtype}") for dtype in LOW),
    *((sees_exactly_what_is_visible, replace(ONE_HEAD, n=7, causal=causal), f"visible, {causal}") for causal in (True, False)),
    (future_does_not_matter, replace(ONE_HEAD, n=7), "future"),
    (exact_when_short, SMALL, "short"),
    (exact_when_keys_are_constant, replace(SMALL, causal=False), "constant keys"),
    *((as_without_downsampling, replace(ONE_HEAD, causal=causal), f"constant queries, {causal}") for causal in (True, False)),
    *((padding_does_not_matter, replace(ONE_HEAD, n=7, causal=causal), f"padding, {causal}") for causal in (True, False)),
    (documents_do_not_meet, replace(ONE_HEAD, n=12, causal=False, cuts=(3,)), "documents"),
    (weights_sum_to_one, replace(SMALL, sinks=3, saliency=True, padding=((3, 2),)), "weights, sinks"),
    (sees_exactly_what_is_visible, replace(ONE_HEAD, n=9, sinks=3), "visible, sinks"),
    (future_does_not_matter, replace(ONE_HEAD, n=9, sinks=3), "future, sinks"),
    (padding_does_not_matter, replace(ONE_HEAD, n=9, causal=False, sinks=2), "padding, sinks"),
]


@pytest.mark.parametrize("holds, case", [pytest.param(*pair, id=name) for *pair, name in KERNELS])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes what is not finite as the kernels do, and says so
@pytest.mark.slow
def test_kernels(quick_interpreter, holds, case):
    holds(partial(multipole_attention, backend="triton"), case, DEVICE)


# The PyTorch paths, in chosen cases


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("summary", ["mean", "direct", "hierarchical"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ALL)
def test_output_and_gradients_equal_the_reference(form, causal, summary, shape):
    matches_reference(multipole_attention, replace(ALL[form], causal=causal, summary=summary, **SHAPES[shape]))


CHOSEN = [
    *(
        (half_precision_is_rounded_once, {"causal": causal, "dtype": dtype, "padding": PADDED})
        for causal in (True, False)
        for dtype in HALF
    ),
    *((layout_does_not_matter, {"layout": layout}) for layout in LAYOUTS),
    (as_many_sinks_as_tokens_are_exact_attention, {}),
    (as_many_sinks_as_tokens_are_exact_attention, {"causal": False, "padding": PADDED, "cuts": (20,)}),
    *((masses_of_one_change_nothing, {"causal": causal, "summary": summary}) for causal in (True, False) for summary in SUMMARIES),
    (arguments_are_not_written_to, {"padding": PADDED}),
    *((one_tensor_in_every_place, {"causal": causal, "n": n}) for causal, n in ((True, 45), (False, 45), (True, 7))),
    (autocast_computes_in_bfloat16, {"dtype": torch.float32, "far_keys": False, "padding": PADDED}),
]


@pytest.mark.parametrize("holds, changed", CHOSEN)
@pytest.mark.parametrize("form", FORMS)
def test_chosen_calls(form, holds, changed):
    holds(multipole_attention, replace(FORMS[form], mixed=form == "O(n)", **changed))


@pytest.mark.parametrize("form", WEIGHTED)
def test_arguments_of_sinks_and_masses_are_not_written_to(form):
    arguments_are_not_written_to(multipole_attention, WEIGHTED[form])
    one_tensor_in_every_place(multipole_attention, WEIGHTED[form])


@pytest.mark.parametrize("shape", ["plain", "padded", "packed"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name, value", [("k", torch.nan), ("v", torch.nan), ("v", torch.inf), ("q", torch.nan), ("far_keys", torch.nan)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_not_finite_reaches_whom_the_reference_says(form, name, value, causal, shape):
    case = replace(FORMS[form], summary="mean", softcap=None, causal=causal, far_keys=name == "far_keys", **SHAPES[shape])
    case = case if case.padding else replace(case, batch=1)  # a row for each token, of each padding
    not_finite_reaches_whom_the_reference_says(multipole_attention, case, name, value, (6, 20, 28, 44))


DIFFERENTIATED = [("torch", causal, shape) for causal in (True, False) for shape in SHAPES]
DIFFERENTIATED += [("O(n)", True, "packed and padded"), ("O(n)", False, "plain")]
DIFFERENTIATED += [("torch, both", True, "plain"), ("torch, both", False, "packed and padded"), ("O(n), both", True, "packed")]
COMPILED = [("torch", True, "plain"), ("torch", True, "packed and padded"), ("torch", False, "padded"), ("torch", False, "packed")]
COMPILED += [("O(n)", True, "packed and padded"), ("O(n)", False, "padded")]
COMPILED += [("torch, both", True, "plain"), ("torch, both", True, "packed and padded"), ("O(n), both", True, "padded")]


@pytest.mark.parametrize("form, causal, shape", DIFFERENTIATED)
@pytest.mark.slow
def test_gradients_are_numerical_derivatives(form, causal, shape):
    gradients_are_numerical_derivatives(multipole_attention, replace(ALL[form], causal=causal), shape)


@pytest.mark.parametrize("form, causal, shape", COMPILED)
@pytest.mark.slow
def test_compiles_without_a_graph_break(form, causal, shape):
    compiles_without_a_graph_break(multipole_attention, replace(ALL[form], causal=causal, **SHAPES[shape]))


# The PyTorch paths, in any call

EXAMPLES = {
    weights_sum_to_one: [{"padding": PADDED}],
    sees_exactly_what_is_visible: [{"padding": PADDED, "cuts": (20,)}],
    future_does_not_matter: [{}],
    as_without_downsampling: [{}, {"causal": False}],
    padding_does_not_matter: [{"causal": False}],
    documents_do_not_meet: [{"cuts": (3, 21, 30)}],
    # The masses' gradient, summed over the heads of a group.
    matches_reference: [{"causal": False, "bias_levels": 0}],
}
DRAWN = [  # property, what is drawn, and how often if not as the profile says
    (matches_reference, {}, 60),
    (matches_reference, {"dtypes": LOW}, 40),
    (weights_sum_to_one, {"dtypes": EVERY}, None),
    (sees_exactly_what_is_visible, {}, None),
    (future_does_not_matter, {"dtypes": EVERY}, None),
    (exact_when_short, {"dtypes": EVERY}, None),
    (padding_does_not_matter, {"dtypes": EVERY}, None),
    (documents_do_not_meet, {"dtypes": EVERY, "n": st.integers(2, 60)}, None),
]
FOR_ONE = [
    ("torch", exact_when_keys_are_constant, {"dtypes": EVERY, "n": st.integers(8, 60)}, None),
    ("O(n)", as_without_downsampling, {"dtypes": EVERY, "n": st.integers(8, 60)}, None),
]


@pytest.mark.parametrize("form, holds, drawn, count", [*((form, *row) for form in FORMS for row in DRAWN), *FOR_ONE])
@pytest.mark.slow
def test_any_call(form, holds, drawn, count):
    of_the_form = {"downsample": True, "queries": None} if form == "O(n)" else {}

    @settings(max_examples=count or settings.default.max_examples)
    @given(case=cases(**of_the_form, **drawn))
    def any_call(case):
        holds(multipole_attention, case)

    for changed in EXAMPLES.get(holds, []):
        any_call = example(replace(FORMS[form], **changed))(any_call)
    if holds is exact_when_short:
        for few in (Case(n=8), Case(n=1, cuts=())):
            any_call = example(replace(few, downsample=form == "O(n)"))(any_call)
    any_call()

"""Tensor attention, the exact path: the properties, the ways it is used in training, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_multipole import tensor_attention
from hf_multipole.modeling import tensor_attention as module
from hf_multipole.reference import tensor_attention_reference
from tests.helpers.commands import run
from tests.helpers.numerics import LOW, assert_within
from tests.helpers.rows import LAYOUTS
from tests.helpers.tensor_cases import TensorCase, cases, make, plain_tensors
from tests.helpers.tensor_properties import (
    documents_do_not_meet,
    future_does_not_matter,
    matches_reference,
    padding_does_not_matter,
    sees_exactly_what_is_visible,
)

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


# Properties


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_equal_the_reference(causal, window, shape):
    matches_reference(tensor_attention, replace(FULL, causal=causal, window=WINDOWS[window], **SHAPES[shape]))


@settings(max_examples=40)
@given(case=cases())
@example(TensorCase(n=6, order=4, window=(2, None, 3), queries=4))
@example(TensorCase(n=7, order=4, causal=False))
@example(TensorCase(n=40, order=2, window=(9,), batch=1))
@example(TensorCase(n=40, batch=1, window=(3, 20)))  # more than one block of queries
@example(TensorCase(n=40, batch=1, window=(3, 20), causal=False))
@example(TensorCase(n=5, order=5, batch=1, kv_heads=1))
def test_any_call_equals_the_reference(case):
    matches_reference(tensor_attention, case)


@given(case=cases(dtypes=LOW))
def test_lower_precision_stays_within_its_bound(case):
    matches_reference(tensor_attention, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, (3, 5)])
def test_half_precision_is_rounded_once(window, dtype):
    """What is computed from the arguments is float32 to the end."""
    case = replace(FULL, window=window, dtype=dtype, padding=PADDED)
    actual = make(case).with_gradients(tensor_attention)
    exact = make(case, torch.float64, rounded=dtype).with_gradients(tensor_attention_reference)
    for name, value in exact.items():
        error = (actual[name].double() - value).abs()
        assert (error <= 0.51 * torch.finfo(dtype).eps * value.abs() + 1e-5).all(), (name, error.max())


@given(case=cases())
@example(replace(FULL, padding=PADDED, cuts=(8,), window=(3, 5)))
def test_sees_exactly_what_is_visible(case):
    sees_exactly_what_is_visible(tensor_attention, case)


@settings(max_examples=10)
@given(case=cases(dtypes=(torch.float64, *LOW)))
@example(FULL)
@example(replace(FULL, n=30, batch=1, window=(3, 20)))
def test_the_future_does_not_matter(case):
    future_does_not_matter(tensor_attention, case)


@settings(max_examples=15)
@given(case=cases(dtypes=(torch.float64, *LOW)))
@example(replace(FULL, causal=False, window=(3, None)))
def test_padding_does_not_matter(case):
    padding_does_not_matter(tensor_attention, case)


@settings(max_examples=15)
@given(case=cases())
@example(replace(FULL, cuts=(3, 8)))
def test_documents_do_not_meet(case):
    documents_do_not_meet(tensor_attention, case)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e4])
def test_what_lies_outside_the_windows_does_not_matter(value):
    case = replace(FULL, n=30, batch=1, window=(3, 20))
    before = make(case)(tensor_attention).detach()
    for name, width in (("k0", 3), ("v0", 3), ("k1", 20), ("v1", 20)):
        call = make(case)
        with torch.no_grad():
            call.leaves[name][:, :, 5] = value
        after, reached = call(tensor_attention).detach(), slice(5, 5 + width)
        changed = (~torch.isclose(after, before, rtol=0, atol=1e-12)).all(-1).all(1)[0]
        assert changed[reached].all() and changed.sum() == width, name


@given(case=cases(windows=False))
def test_weights_sum_to_one(case):
    call = make(case)
    with torch.no_grad():
        for name in call.leaves:
            if name[0] == "v":
                call.leaves[name].fill_(2.0)
    real = call.visible(1).any(-1)[:, None, :, None]
    assert_within(call(tensor_attention), (2.0 ** (case.order - 1) * real).expand(call.upstream.shape), 1e-13, "constant values", case)


# Other ways to say the same


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("causal", [True, False])
def test_order_2_is_scaled_dot_product_attention(causal, dtype, bound):
    call = make(TensorCase(n=70, order=2, dim=8, value_dim=5, causal=causal, repeats=3, dtype=dtype))

    def dense(q, keys, values, causal, **_):
        return F.scaled_dot_product_attention(q, keys[0], values[0], is_causal=causal, enable_gqa=True)

    expected = call.with_gradients(dense)
    for name, value in call.with_gradients(tensor_attention).items():
        assert_within(value, expected[name], bound, name, call)


@pytest.mark.parametrize("causal", [True, False])
def test_order_3_is_a_softmax_over_pairs(causal):
    """Written at once, as one einsum over all pairs; longer than one block and one tile."""
    call = make(TensorCase(n=53, dim=6, value_dim=4, causal=causal))

    def dense(q, keys, values, causal, **_):
        n = q.shape[2]
        scores = torch.einsum("bhic,bhjc,bhkc->bhijk", q, *keys) * q.shape[-1] ** -0.5
        if causal:
            token = torch.arange(n)
            scores = scores.masked_fill(torch.maximum(token[:, None], token) > token[:, None, None], -torch.inf)
        weights = scores.flatten(3).softmax(-1).view_as(scores)
        return torch.einsum("bhijk,bhjc,bhkc->bhic", weights, *values)

    expected = call.with_gradients(dense)
    for name, value in call.with_gradients(tensor_attention).items():
        assert_within(value, expected[name], 1e-12, name, call)


def test_the_order_of_the_indices_does_not_matter():
    call = make(replace(FULL, window=(3, 5)))
    expected = call(tensor_attention)
    swapped = call(lambda q, keys, values, window, **rest: tensor_attention(q, keys[::-1], values[::-1], window=window[::-1], **rest))
    assert_within(swapped, expected, 1e-13, "swapped", FULL)


def test_an_index_of_ones_lowers_the_order():
    """A window of 1 fixes an index; with keys and values of 1 it takes no part, and what remains is of order 2."""
    call = make(replace(FULL, window=(1, None)))
    with torch.no_grad():
        call.leaves["k0"].fill_(1)
        call.leaves["v0"].fill_(1)
    lower = call(lambda q, keys, values, window, **rest: tensor_attention(q, keys[1:], values[1:], **rest))
    assert_within(call(tensor_attention), lower, 1e-13, "of order 2", FULL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_in_memory_does_not_matter(layout):
    one, other = (make(replace(FULL, layout=name)) for name in ("contiguous", layout))
    assert torch.equal(one(tensor_attention), other(tensor_attention))


@pytest.mark.parametrize("window", [None, (3, 5)])
def test_one_tensor_in_every_place(window):
    """Gradients of its uses add up, and nothing is written to."""
    call = make(replace(FULL, repeats=1, dim=4, value_dim=4, window=window, padding=PADDED))
    x = call.leaves["q"]
    before, version = x.clone(), x._version
    call.leaves = {name: x for name in ("q", "k0", "k1", "v0", "v1")}
    (actual,) = torch.autograd.grad(call(tensor_attention), x, call.upstream)
    (expected,) = torch.autograd.grad(call(tensor_attention_reference), x, call.upstream)
    assert_within(actual, expected, 1e-10, "gradient", FULL)
    assert torch.equal(x, before) and x._version == version


@pytest.mark.parametrize("causal", [True, False])
def test_a_row_of_padding_alone(causal):
    call = make(replace(FULL, causal=causal, padding=((14, 0), (0, 0))))
    result = call.with_gradients(tensor_attention)
    assert all(value.isfinite().all() and (value[0] == 0).all() for value in result.values())
    other = make(replace(FULL, causal=causal)).with_gradients(tensor_attention)
    assert_within(result["out"][1], other["out"][1], 1e-12, "the other row", call)


def test_large_scores():
    """Neither overflow nor 0 / 0, where scores differ by hundreds."""
    call = make(replace(FULL, scale=100.0, dtype=torch.float32))
    expected = make(replace(FULL, scale=100.0), rounded=torch.float32).with_gradients(tensor_attention_reference)
    for name, value in call.with_gradients(tensor_attention).items():
        # Scores of some 1000 are rounded by 6e-5, and weights by that fraction.
        assert value.isfinite().all()
        assert_within(value, expected[name], 1e-3 * max(1.0, expected[name].abs().max().item()), name, call)


# In training


@pytest.mark.parametrize("order, window", [(2, None), (3, None), (3, (2, 4)), (4, None), (4, (2, None, 3))])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal, order, window):
    """Numerical derivatives, which share nothing with the reference."""
    call = make(TensorCase(n=6, order=order, window=window, dim=2, value_dim=1, batch=1, kv_heads=1, repeats=2, causal=causal, queries=5))

    def function(q, *others):
        return tensor_attention(q, others[: order - 1], others[order - 1 :], **call.options)

    assert torch.autograd.gradcheck(function, tuple(call.leaves.values()))


@pytest.mark.parametrize("window", [None, (3, 5)])
def test_opcheck(window):
    """Schema, fake tensors and autograd of the custom operator, as torch.compile relies on them."""
    seen = []
    real = module.tensor_tiles
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "tensor_tiles", lambda *arguments: seen.append(arguments) or real(*arguments))
        make(replace(FULL, window=window, padding=PADDED))(tensor_attention)
    for arguments in seen:
        leaves = (x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in arguments)
        torch.library.opcheck(real, tuple(leaves), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("shape", ["plain", "packed and padded"])
def test_compiles_without_a_graph_break(shape):
    torch._dynamo.reset()
    compiled = torch.compile(tensor_attention, fullgraph=True, backend="aot_eager")
    case = replace(FULL, window=(3, 5), **SHAPES[shape])
    actual, expected = (make(case).with_gradients(function) for function in (compiled, tensor_attention))
    for name, value in expected.items():
        assert_within(actual[name], value, 1e-11, name, case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradient_checkpointing(dropout_p):
    call = make(replace(FULL, padding=PADDED))

    def checkpointed(q, keys, values, **options):
        return checkpoint(lambda q, keys, values: tensor_attention(q, keys, values, **options), q * 1, keys, values, use_reentrant=False)

    torch.manual_seed(5)
    expected = call.with_gradients(tensor_attention, dropout_p=dropout_p)
    torch.manual_seed(5)
    for name, value in call.with_gradients(checkpointed, dropout_p=dropout_p).items():
        assert torch.equal(value, expected[name]), name


def test_autocast():
    """float32 in, bfloat16 out, as by torch's own attention; gradients are float32."""
    call = make(replace(FULL, dtype=torch.float32, padding=PADDED))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(tensor_attention)
    assert out.dtype == torch.bfloat16
    expected = call(
        lambda q, keys, values, **rest: tensor_attention(q.bfloat16(), *([x.bfloat16() for x in t] for t in (keys, values)), **rest)
    )
    assert torch.equal(out, expected)
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.sum(), list(call.leaves.values())))


# What it is for


def match3(row, modulus):
    """Label of each token: whether some two (it and itself included) complete it to a multiple of the modulus."""
    return torch.tensor([any((x + y + z) % modulus == 0 for y in row for z in row) for x in row.tolist()])


@pytest.mark.parametrize("window", [None, (40, 50)])
def test_match3(window):
    """The constructed solution: one head of order 3 finds every triple, with a null token to compare with."""
    modulus, n = 37, 32
    angles = 2 * math.pi * torch.arange(1, 19) / modulus
    found = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        # Few different numbers, so that some tokens have no triple.
        row = torch.randint(modulus, (3 + seed % 5,), generator=generator)[torch.randint(3 + seed % 5, (n,), generator=generator)]
        c, s = (row[:, None] * angles).cos(), (row[:, None] * angles).sin()
        null, extra = torch.zeros(n, 1), torch.zeros(1, 73)
        q = torch.cat([F.pad(torch.cat([c, -c, -s, -s], 1), (0, 1), value=12.0), extra])
        extra = F.pad(extra[:, 1:], (0, 1), value=1.0)
        k1, k2 = (torch.cat([torch.cat([*parts, null], 1), extra]) for parts in ([c, s, c, s], [c, s, s, c]))
        v = torch.cat([torch.ones(n, 1), torch.zeros(1, 1)])
        out = tensor_attention(
            *(q[None, None], [k1[None, None], k2[None, None]], [v[None, None]] * 2), scale=1.0, causal=False, window=window
        )
        labels = match3(row, modulus)
        assert torch.equal(out[0, 0, :-1, 0] > 0.5, labels), seed
        found.append(labels)
    assert 0.2 < torch.cat(found).float().mean() < 0.8


# Its benchmark


def test_benchmark(tmp_path):
    lengths = ["--lengths", 20, "--window-lengths", 40, "--polynomial-lengths", 40, "--window", 3, 9, "--repeats", 1, "--threads", 1]
    run("scripts.benchmarks.tensor", *lengths, "--output", "out", cwd=tmp_path)
    record = json.loads((tmp_path / "out" / "benchmark-tensor.json").read_text())
    assert {result["part"] for result in record["results"]} == {"exact", "window", "polynomial"}
    if not torch.cuda.is_available():
        assert "--device cuda: PyTorch finds no CUDA device" in run(
            "scripts.benchmarks.tensor", "--device", "cuda", cwd=tmp_path, fails=True
        )
    assert "--repeats 0 must be positive" in run("scripts.benchmarks.tensor", "--repeats", 0, cwd=tmp_path, fails=True)


# What is refused

ONES = torch.ones(2, 20, dtype=torch.long)
HOLE = ONES.clone()
HOLE[1, 7] = 0
TORN = ONES.clone()
TORN[1, 5:9] = 3
K = torch.zeros(2, 2, 20, 4)
POLYNOMIAL = {"method": "polynomial"}

REFUSED = {
    "fewer values": ({"values": [K]}, ValueError, "there are 2 keys, but 1 values"),
    "no keys": ({"keys": []}, TypeError, "keys must be a sequence"),
    "one tensor of keys": ({"keys": K}, TypeError, "keys must be a sequence"),
    "a key that is no tensor": ({"keys": [K, 3.0]}, ValueError, r"keys\[1\] must be a tensor"),
    "a value of three dimensions": ({"values": [K[0], K]}, ValueError, r"values\[0\] must be a tensor"),
    "keys of two lengths": ({"keys": [K, K[:, :, 1:]]}, ValueError, r"keys\[1\] has shape"),
    "values of two widths": ({"values": [K, K[..., 1:]]}, ValueError, r"values\[1\] has shape"),
    "keys of two dtypes": ({"keys": [K, K.double()]}, TypeError, r"keys\[1\] has dtype"),
    "keys of two devices": ({"keys": [K, K.to("meta")]}, ValueError, r"keys\[1\] has device"),
    "integers": ({"keys": [K.long()] * 2}, TypeError, r"keys\[0\] has dtype torch.int64"),
    "another width than q": ({"keys": [K[..., 1:]] * 2}, ValueError, "it must be"),
    "values of another length": ({"values": [K[:, :, 1:]] * 2}, ValueError, "it must be"),
    "heads not grouped": ({"q": torch.zeros(2, 3, 20, 4)}, ValueError, "3 heads"),
    "more queries than keys": ({"q": torch.zeros(2, 2, 21, 4)}, ValueError, "q has 21 tokens"),
    "q of three dimensions": ({"q": K[0]}, ValueError, "q must be a tensor"),
    "mask of pairs": ({"attention_mask": torch.ones(2, 20, 20, dtype=torch.bool)}, ValueError, "attention_mask has shape"),
    "mask of documents": (
        {"attention_mask": ONES + ONES.cumsum(1) // 11},
        ValueError,
        "attention_mask holds 2, but must be 1 .* segment_ids",
    ),
    "mask with a hole": ({"attention_mask": HOLE}, ValueError, "attention_mask has a hole in row 1"),
    "torn segment": ({"segment_ids": TORN}, ValueError, "segment_ids of row 1"),
    "scale that is no number": ({"scale": float("nan")}, ValueError, "scale is nan"),
    "dropout of everything": ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
    "unknown method": ({"method": "fast"}, ValueError, "method is 'fast'"),
    "unknown backend": ({"backend": "tvm"}, ValueError, "backend is 'tvm'"),
    "unknown reaction": ({"on_violation": "warn"}, ValueError, "on_violation is 'warn'"),
    "one window for two keys": ({"window": (3,)}, ValueError, "window is"),
    "window that is a number": ({"window": 3}, ValueError, "window is 3"),
    "window of nothing": ({"window": (3, 0)}, ValueError, "width 0"),
    "window of a fraction": ({"window": (3, 2.5)}, ValueError, "width 2.5"),
    "degree of the exact path": ({"degree": 4}, ValueError, "degree belongs to"),
    "bound of the exact path": ({"entry_bound": 1.0}, ValueError, "entry_bound belongs to"),
    "certificate of the exact path": ({"return_certificate": True}, ValueError, "return_certificate belongs to"),
    "window of the polynomial": (POLYNOMIAL | {"window": (3, 3)}, ValueError, "window belongs to"),
    "dropout of the polynomial": (POLYNOMIAL | {"dropout_p": 0.1}, ValueError, "dropout_p belongs to"),
    "negative degree": (POLYNOMIAL | {"degree": -1}, ValueError, "degree is -1"),
    "degree too high": (POLYNOMIAL | {"degree": 1000}, ValueError, "degree is 1000"),
    "fractional degree": (POLYNOMIAL | {"degree": 2.0}, ValueError, "degree is 2.0"),
    "bound of nothing": (POLYNOMIAL | {"entry_bound": 0.0}, ValueError, "entry_bound is 0.0"),
    "infinite bound": (POLYNOMIAL | {"entry_bound": math.inf}, ValueError, "entry_bound is inf"),
    "no tolerance": (POLYNOMIAL | {"tolerance": None}, ValueError, "tolerance is None"),
    "negative tolerance": (POLYNOMIAL | {"tolerance": -1.0}, ValueError, "tolerance is -1.0"),
}


@pytest.mark.parametrize("options, error, words", REFUSED.values(), ids=REFUSED)
def test_refused_with_the_name_of_the_argument(options, error, words):
    with pytest.raises(error, match=words) as caught:
        tensor_attention(**plain_tensors(**options))
    assert "\n" not in str(caught.value)

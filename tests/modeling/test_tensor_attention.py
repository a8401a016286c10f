"""The operator of tensor attention: what it equals, the ways it is used in training, what it is for, and what it refuses."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_multipole import tensor_attention
from hf_multipole.modeling import tensor_attention as module
from hf_multipole.reference import tensor_attention_reference
from tests.helpers.numerics import assert_within
from tests.helpers.operators import check_operator
from tests.helpers.tensor_cases import TensorCase, make, plain_tensors

PADDED = ((2, 3), (0, 5))
FULL = TensorCase(n=14, repeats=2)


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


@pytest.mark.parametrize("window", [None, (3, 5)])
def test_opcheck(window):
    check_operator(module, "tensor_tiles", partial(make(replace(FULL, window=window, padding=PADDED)), tensor_attention))


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
@pytest.mark.slow
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

"""The operator of multipole attention: the ways it is called and used in training, its weights, and what it refuses."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_multipole import multipole_attention
from hf_multipole.modeling import multipole_attention as module
from hf_multipole.modeling.calls import Call
from hf_multipole.modeling.hierarchy import align_rows
from hf_multipole.modeling.options import MultipoleOptions
from hf_multipole.modeling.summaries import HierarchicalSummary
from hf_multipole.reference import multipole_attention_reference
from tests.helpers.multipole_cases import PADDED, SHAPES, Case, make
from tests.helpers.multipole_properties import (
    agrees,
)
from tests.helpers.numerics import assert_within
from tests.helpers.operators import check_operator
from tests.helpers.rows import mask_of

# One of everything: ragged, grouped heads, fewer bias columns than levels, a cap, other keys for the far field.
FULL = Case(n=45, repeats=2, bias_levels=2, softcap=2.0, far_keys=True, summary="hierarchical")
PLAIN = {"softcap": None, "dtype": torch.bfloat16, "summary": "mean"}


# What must not matter


def test_expanded_arguments():
    """Stride 0, as shared keys have it; the buffers written in place must not be them."""
    case = replace(FULL, far_keys=False, summary="mean")
    call = make(case)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            call.leaves[name].copy_(call.leaves[name][:1, :1].expand_as(call.leaves[name]))
    expected = call.with_gradients(multipole_attention)
    shared = {name: call.leaves[name][:1, :1].detach().requires_grad_() for name in ("q", "k", "v")}
    out = multipole_attention(
        **{name: x.expand_as(call.leaves[name]) for name, x in shared.items()}, far_bias=call.leaves["far_bias"], **call.options
    )
    assert_within(out.detach(), expected["out"], 1e-12, "out", case)
    for name, gradient in zip(shared, torch.autograd.grad(out, list(shared.values()), call.upstream)):
        assert_within(gradient, expected[name].sum((0, 1), keepdim=True), 1e-11, name, case)


def test_backward_twice():
    call = make(FULL)
    out, leaves = call(multipole_attention), list(call.leaves.values())
    first = torch.autograd.grad(out, leaves, call.upstream, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(out, leaves, call.upstream)):
        assert torch.equal(one, other)


# In training


@pytest.mark.parametrize("causal", [True, False])
def test_opcheck(causal):
    cases = replace(FULL, n=19, causal=causal, padding=PADDED[:1] * 2), replace(FULL, n=19, causal=causal, **PLAIN)
    check_operator(module, "block_attention", *(partial(make(case), multipole_attention) for case in cases))


@pytest.mark.slow
def test_compiles_to_code():
    torch._dynamo.reset()
    compiled = torch.compile(multipole_attention, fullgraph=True)
    agrees(
        compiled, multipole_attention, Case(n=12, batch=1, kv_heads=1, summary="hierarchical", padding=((2, 0),), dtype=torch.float32), 1e-5
    )


@pytest.mark.slow
def test_compiled_code_serves_other_data():
    """Masks and segments are data: others of the same shape must not compile again."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(multipole_attention, fullgraph=True, backend=backend, dynamic=False)
    for cuts in ((3, 21, 30), (7, 8), (1, 2, 3, 4)):
        for padding in (PADDED, ((0, 0), (7, 1))):
            case = replace(FULL, summary="mean", cuts=cuts, padding=padding, queries=9)
            with torch.no_grad():
                assert_within(make(case)(compiled), make(case)(multipole_attention), 1e-12, "out", case)
    assert len(graphs) == 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradient_checkpointing(reentrant, dropout_p):
    call = make(replace(FULL, padding=PADDED))
    call.options["dropout_p"] = dropout_p

    def checkpointed(q, k, v, **options):
        # Outputs of an operation before it, as in a model; summaries' weights reach it from outside.
        return checkpoint(lambda *x: multipole_attention(*x, **options), q * 1, k * 1, v * 1, use_reentrant=reentrant)

    torch.manual_seed(5)
    expected = call.with_gradients(multipole_attention)
    torch.manual_seed(5)
    if reentrant:  # accepts .backward() alone
        out = call(checkpointed)
        out.backward(call.upstream)
        actual = {"out": out.detach()} | {name: x.grad for name, x in call.leaves.items()}
    else:
        actual = call.with_gradients(checkpointed)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_autocast_takes_far_keys_of_another_dtype():
    call = make(replace(FULL, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(lambda q, **options: multipole_attention(q.bfloat16(), **options)).dtype == torch.bfloat16


# Attention weights


def aligned(call):
    """Output and weights of the case, by aligned_attention."""
    mask, ids = call.options["attention_mask"], call.options["segment_ids"]
    alignment = None if mask is None and ids is None else align_rows(mask, ids, call.options["block_size"])
    names = "block_size", "rank", "size_weighting", "sink_tokens", "downsample_queries"
    sizes = {name: call.options[name] for name in names if name in call.options}
    rest = {name: value for name, value in call.options.items() if name not in ("attention_mask", "segment_ids", *sizes)}
    learned = {name: call.leaves.get(name) for name in ("far_bias", "log_masses")}
    settings = Call(MultipoleOptions(**sizes), **learned, **rest)
    tensors = (call.leaves.get(name) for name in ("q", "k", "v"))
    return module.aligned_attention(*tensors, alignment, settings, call.leaves.get("far_keys"), return_weights=True)


@pytest.mark.parametrize("queries", [None, 1, 10])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_weights_are_those_of_the_reference(causal, queries):
    full = replace(FULL, causal=causal, queries=queries)
    for case in (full, replace(full, sinks=3, saliency=True), Case(n=7, queries=queries and 3, causal=causal, sinks=1)):
        call = make(case)
        out, weights = aligned(call)
        expected_out, expected = call(lambda *x, **options: multipole_attention_reference(*x, **options, return_weights=True))
        assert_within(weights, expected, 1e-12, "weights", case)
        assert_within(out, expected_out, 1e-12, "out", case)
        assert not weights.requires_grad


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_weights_of_padded_and_packed_rows(shape):
    """They belong to visible tokens and sum to one; in rows of one document, those of tokens are the reference's."""
    case = replace(FULL, causal=False, **SHAPES[shape])
    call = make(case)
    out, weights = aligned(call)
    real = call.real_queries()[:, None].double().expand(weights.shape[:3])
    assert_within(weights.sum(-1), real, 1e-12, "sums of weights", case)
    assert ((weights[..., : case.n] == 0) | call.visible()[:, None]).all()
    assert_within(out, call(multipole_attention), 0, "out", case)
    if case.cuts is None:
        _, expected = call(lambda *x, **options: multipole_attention_reference(*x, **options, return_weights=True))
        assert_within(weights[..., : case.n], expected[..., : case.n], 1e-12, "weights of tokens", case)


# What is refused


def tensors(n=20, heads=2, kv_heads=2, dim=4, **options):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    return {"q": q, "k": k, "v": v, "block_size": 4, "rank": 2} | options


ONES = torch.ones(2, 20, dtype=torch.long)
HOLE = ONES.clone()
HOLE[1, 7] = 0
TORN = ONES.clone()
TORN[1, 5:9] = 3

REFUSED = {
    "rank does not divide": ({"rank": 3}, ValueError, "rank 3 does not divide block_size 4"),
    "rank above block size": ({"rank": 8}, ValueError, "rank 8 does not divide block_size 4"),
    "rank 0": ({"rank": 0}, ValueError, "rank is 0"),
    "negative block size": ({"block_size": -4}, ValueError, "block_size is -4"),
    "fractional block size": ({"block_size": 4.0}, ValueError, "block_size is 4.0"),
    "truth as rank": ({"rank": True}, ValueError, "rank is True"),
    "levels below none": ({"max_levels": -1}, ValueError, "max_levels is -1"),
    "levels that are no number": ({"max_levels": 1.0}, ValueError, "max_levels is 1.0"),
    "bias that is no tensor": ({"far_bias": -6.0}, TypeError, "far_bias is float"),
    "mask that is no tensor": ({"attention_mask": [[1]]}, TypeError, "attention_mask is list"),
    "scale that is no number": ({"scale": float("nan")}, ValueError, "scale is nan"),
    "bias of other heads": ({"far_bias": torch.zeros(3, 2)}, ValueError, "far_bias has shape"),
    "bias without levels": ({"far_bias": torch.zeros(2, 0)}, ValueError, "far_bias has shape"),
    "bias of one dimension": ({"far_bias": torch.zeros(2)}, ValueError, "far_bias has shape"),
    "bias elsewhere": ({"far_bias": torch.zeros(2, 2, device="meta")}, ValueError, "far_bias is on meta"),
    "heads not grouped": ({"q": torch.zeros(2, 3, 20, 4)}, ValueError, "3 heads"),
    "fewer heads than of keys": ({"q": torch.zeros(2, 1, 20, 4)}, ValueError, "1 heads"),
    "q of another width": ({"q": torch.zeros(2, 2, 20, 5)}, ValueError, "k has shape"),
    "k of another batch": ({"k": torch.zeros(3, 2, 20, 4)}, ValueError, "k has shape"),
    "v of another length": ({"v": torch.zeros(2, 2, 19, 4)}, ValueError, "v has shape"),
    "v of other heads": ({"v": torch.zeros(2, 1, 20, 4)}, ValueError, "v has shape"),
    "far keys of another length": ({"far_keys": torch.zeros(2, 2, 19, 4)}, ValueError, "far_keys has shape"),
    "more queries than keys": ({"q": torch.zeros(2, 2, 21, 4)}, ValueError, "q has 21 tokens"),
    "no tokens": ({"q": torch.zeros(2, 2, 0, 4)}, ValueError, "q is empty"),
    "q of three dimensions": ({"q": torch.zeros(2, 20, 4)}, ValueError, "q must be a tensor"),
    "k no tensor": ({"k": [0.0]}, ValueError, "k must be a tensor"),
    "integers": ({"q": torch.zeros(2, 2, 20, 4, dtype=torch.long)}, TypeError, "q has dtype torch.int64"),
    "two dtypes": ({"k": torch.zeros(2, 2, 20, 4, dtype=torch.float64)}, TypeError, "k has dtype torch.float64, but q has torch.float32"),
    "two devices": ({"v": torch.zeros(2, 2, 20, 4, device="meta")}, ValueError, "v is on meta"),
    "mask elsewhere": ({"attention_mask": ONES.to("meta")}, ValueError, "attention_mask is on meta"),
    "segments elsewhere": ({"segment_ids": ONES.to("meta")}, ValueError, "segment_ids is on meta"),
    "mask of pairs": ({"attention_mask": torch.ones(2, 1, 20, 20, dtype=torch.bool)}, ValueError, "attention_mask has shape"),
    "mask of another length": ({"attention_mask": ONES[:, 1:]}, ValueError, "attention_mask has shape"),
    "mask of another batch": ({"attention_mask": ONES[:1]}, ValueError, "attention_mask has shape"),
    "mask of floats": ({"attention_mask": torch.zeros(2, 20)}, TypeError, "attention_mask has dtype torch.float32"),
    "mask of documents": (
        {"attention_mask": ONES + ONES.cumsum(1) // 11},
        ValueError,
        "attention_mask holds 2, but must be 1 .* segment_ids",
    ),
    "mask with a hole": ({"attention_mask": HOLE}, ValueError, "attention_mask has a hole in row 1"),
    "segments of one dimension": ({"segment_ids": ONES[0]}, ValueError, "segment_ids has shape"),
    "segments of floats": ({"segment_ids": torch.zeros(2, 20)}, TypeError, "segment_ids has dtype torch.float32"),
    "torn segment": ({"segment_ids": TORN}, ValueError, "segment_ids of row 1"),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
    "softcap inf": ({"softcap": math.inf}, ValueError, "softcap is inf"),
    "dropout of everything": ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    "unknown backend": ({"backend": "tvm"}, ValueError, "backend is 'tvm'"),
    "summary of another block size": ({"key_summary": HierarchicalSummary(2, 2, 2, 4)}, ValueError, "key_summary"),
    "summary of another rank": ({"value_summary": HierarchicalSummary(4, 4, 2, 4)}, ValueError, "value_summary"),
    "summary of other heads": ({"key_summary": HierarchicalSummary(4, 2, 1, 4)}, ValueError, "key_summary"),
    "summary of another width": ({"value_summary": HierarchicalSummary(4, 2, 2, 3)}, ValueError, "value_summary"),
}


@pytest.mark.parametrize("options, error, words", REFUSED.values(), ids=REFUSED)
def test_refused_with_the_name_of_the_argument(options, error, words):
    with pytest.raises(error, match=words):
        multipole_attention(**tensors(**options))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_row_of_padding_alone(causal, packed):
    """Zeros, without NaN in outputs and gradients; the other row is as ever."""
    cuts = (9, 30) if packed else None
    call = make(replace(FULL, causal=causal, padding=((45, 0), (0, 0)), cuts=cuts))
    result = call.with_gradients(multipole_attention)
    assert all(value.isfinite().all() for value in result.values())
    assert all((result[name][0] == 0).all() for name in ("out", "q", "k", "v", "far_keys"))
    other = make(replace(FULL, causal=causal, cuts=cuts)).with_gradients(multipole_attention)
    assert_within(result["out"][1], other["out"][1], 1e-12, "the other row", call)


def test_masks_of_every_kind_are_one():
    """Bool, integers of any width; a mask of ones is no mask."""
    call = make(replace(FULL, padding=((0, 9), (4, 0))))
    mask = mask_of(replace(FULL, padding=((0, 9), (4, 0))))
    expected = call(multipole_attention)
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.long):
        call.options["attention_mask"] = mask.to(dtype)
        assert torch.equal(call(multipole_attention), expected)
    call.options["attention_mask"] = torch.ones_like(mask)
    full = call(multipole_attention)
    call.options["attention_mask"] = None
    assert_within(full, call(multipole_attention), 1e-12, "a full mask", FULL)

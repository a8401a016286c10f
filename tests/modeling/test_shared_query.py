"""The O(n) form: the properties of multipole attention, those of its own, and its cost."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_multipole import multipole_attention
from hf_multipole.modeling import multipole_attention as module
from hf_multipole.modeling import multipole_torch as kernel
from hf_multipole.modeling import shared_query_torch as linear
from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.summaries import HierarchicalSummary
from hf_multipole.reference import multipole_attention_reference
from tests.helpers.multipole_cases import PADDED, SHAPES, Case, cases, make
from tests.helpers.multipole_properties import (
    agrees,
    as_without_downsampling,
    documents_do_not_meet,
    exact_when_short,
    future_does_not_matter,
    matches_reference,
    padding_does_not_matter,
    sees_exactly_what_is_visible,
    weights_sum_to_one,
)
from tests.helpers.numerics import EVERY, LOW, assert_within, peak_bytes
from tests.helpers.rows import LAYOUTS

# One of everything, four levels.
FULL = Case(n=45, repeats=2, bias_levels=2, softcap=2.0, far_keys=True, summary="hierarchical", downsample=True)


def linear_cases(**options):
    return cases(downsample=True, queries=None, **options)


# Properties


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("summary", ["mean", "direct", "hierarchical"])
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_equal_the_reference(causal, summary, shape):
    matches_reference(multipole_attention, replace(FULL, causal=causal, summary=summary, **SHAPES[shape]))


@settings(max_examples=60)
@given(case=linear_cases())
def test_any_call_equals_the_reference(case):
    matches_reference(multipole_attention, case)


@given(case=linear_cases(dtypes=LOW))
def test_lower_precision_stays_within_its_bound(case):
    matches_reference(multipole_attention, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_is_rounded_once(causal, dtype):
    """Closer than the bound of every implementation: what this one computes from its arguments is float32 to the end."""
    case = replace(FULL, causal=causal, dtype=dtype, padding=PADDED, mixed=True)
    actual = make(case).with_gradients(multipole_attention)
    exact = make(case, torch.float64, rounded=dtype).with_gradients(multipole_attention_reference)
    error = (actual["out"].double() - exact["out"]).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * exact["out"].abs() + 1e-5).all(), error.max()


@given(case=linear_cases(dtypes=EVERY))
@example(replace(FULL, padding=PADDED))
def test_weights_sum_to_one(case):
    weights_sum_to_one(multipole_attention, case)


@given(case=linear_cases())
@example(replace(FULL, padding=PADDED, cuts=(20,)))
def test_sees_exactly_what_is_visible(case):
    sees_exactly_what_is_visible(multipole_attention, case)


@given(case=linear_cases(dtypes=EVERY))
@example(FULL)
def test_the_future_does_not_matter(case):
    """Nor do later queries: those of a segment are not averaged."""
    future_does_not_matter(multipole_attention, case)


def test_averaged_queries_would_let_the_future_matter():
    """So that the test above can fail: bidirectional queries in causal attention."""
    with pytest.MonkeyPatch.context() as patch:

        def averaged(q, block_size, rank, levels):
            q, means, _ = module.MeanSummary(block_size, rank)(q, None, levels, everything=True)
            return q, [x.flatten(2, 3) for x in means]

        patch.setattr(module, "first_queries", averaged)
        with pytest.raises(AssertionError, match="the past of token"):
            future_does_not_matter(multipole_attention, FULL)


@given(case=linear_cases(dtypes=EVERY))
@example(Case(n=8, downsample=True))
@example(Case(n=1, cuts=(), downsample=True))
def test_exact_when_the_near_field_covers_the_row(case):
    exact_when_short(multipole_attention, case)


@given(case=linear_cases(dtypes=EVERY, n=st.integers(8, 60)))
@example(FULL)
@example(replace(FULL, causal=False))
def test_as_without_downsampling_where_queries_are_constant(case):
    as_without_downsampling(multipole_attention, case)


@given(case=linear_cases(dtypes=EVERY))
@example(replace(FULL, causal=False))
def test_padding_does_not_matter(case):
    padding_does_not_matter(multipole_attention, case)


@given(case=linear_cases(dtypes=EVERY, n=st.integers(2, 60)))
@example(replace(FULL, cuts=(3, 21, 30)))
def test_documents_do_not_meet(case):
    documents_do_not_meet(multipole_attention, case)


@pytest.mark.parametrize("shape", ["plain", "padded", "packed"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name, value", [("k", torch.nan), ("v", torch.nan), ("v", torch.inf), ("q", torch.nan), ("far_keys", torch.nan)])
def test_what_is_not_finite_reaches_whom_the_reference_says(name, value, causal, shape):
    case = replace(FULL, summary="mean", softcap=None, causal=causal, far_keys=name == "far_keys", **SHAPES[shape])
    reached = 0
    for token in (6, 20, 28, 44):
        call = make(case)
        with torch.no_grad():
            call.leaves[name][:, 0, token, 1] = value
        actual, expected = call(multipole_attention).isfinite(), call(multipole_attention_reference).isfinite()
        assert torch.equal(actual, expected), f"token {token}"
        reached += (~expected).sum()
    assert reached > 0


# What must not matter


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_size_of_the_chunks_does_not_matter(monkeypatch, causal, shape):
    case = replace(FULL, causal=causal, **SHAPES[shape])
    results = []
    for logits in (1, 1500, 2**30):
        monkeypatch.setattr(kernel, "_LOGITS_PER_THREAD", logits)
        results.append(make(case).with_gradients(multipole_attention))
    for other in results[1:]:
        for name, value in results[0].items():
            assert_within(other[name], value, 1e-12, name, case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_in_memory_does_not_matter(layout):
    one, other = (make(replace(FULL, layout=name)) for name in ("contiguous", layout))
    assert torch.equal(one(multipole_attention), other(multipole_attention))


def test_arguments_are_not_written_to():
    call = make(replace(FULL, padding=PADDED))
    tensors = call.leaves | {"upstream": call.upstream}
    before = {name: (x.clone(), x._version) for name, x in tensors.items()}
    call.with_gradients(multipole_attention)
    for name, (value, version) in before.items():
        assert torch.equal(tensors[name], value) and tensors[name]._version == version, name


@pytest.mark.parametrize("causal", [True, False])
def test_one_tensor_in_every_place(causal):
    """Gradients of its four uses add up, though some are completed in place."""
    case = replace(FULL, repeats=1, dim=4, value_dim=4, causal=causal)
    call = make(case)
    x = call.leaves["q"]
    call.leaves |= {"k": x, "v": x, "far_keys": x}
    (actual,) = torch.autograd.grad(call(multipole_attention), x, call.upstream, retain_graph=True)
    (expected,) = torch.autograd.grad(call(multipole_attention_reference), x, call.upstream)
    assert_within(actual, expected, 1e-10, "gradient", case)


def test_a_far_bias_of_minus_infinity_leaves_the_near_field():
    case = replace(FULL, far_keys=False)
    outs = []
    for downsample in (True, False):
        call = make(replace(case, downsample=downsample))
        call.leaves["far_bias"] = torch.full_like(call.leaves["far_bias"], -torch.inf)
        outs.append(call(multipole_attention))
    assert_within(outs[0], outs[1], 1e-12, "out", case)


# In training


@pytest.mark.parametrize("causal, shape", [(True, "packed and padded"), (False, "plain")])
def test_gradcheck(causal, shape):
    case = replace(FULL, n=14, block_size=2, rank=1, dim=2, value_dim=1, batch=1, kv_heads=1, causal=causal)
    padding = ((1, 2),) if "padded" in shape else None
    call = make(replace(case, padding=padding, cuts=(2, 9) if "packed" in shape else None))
    names = list(call.leaves)

    def function(*leaves):
        return call.with_leaves(dict(zip(names, leaves)))(multipole_attention)

    assert torch.autograd.gradcheck(function, tuple(call.leaves.values()))


@pytest.mark.parametrize("causal", [True, False])
def test_opcheck(causal):
    seen = []
    real = module.segment_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "segment_attention", lambda *arguments: seen.append(arguments) or real(*arguments))
        make(replace(FULL, n=19, causal=causal, padding=PADDED[:1] * 2))(multipole_attention)
        make(replace(FULL, n=19, causal=causal, softcap=None, dtype=torch.bfloat16, summary="mean"))(multipole_attention)
    assert len(seen) == 2
    for arguments in seen:
        leaves = (x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in arguments)
        torch.library.opcheck(real, tuple(leaves), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("causal, shape", [(True, "packed and padded"), (False, "padded")])
def test_compiles_without_a_graph_break(causal, shape):
    torch._dynamo.reset()
    compiled = torch.compile(multipole_attention, fullgraph=True, backend="aot_eager")
    agrees(compiled, multipole_attention, replace(FULL, causal=causal, **SHAPES[shape]))


def test_autocast():
    """float32 in, bfloat16 computed and out; gradients are float32."""
    case = replace(FULL, dtype=torch.float32, far_keys=False, padding=PADDED)
    call, rounded = make(case), make(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(multipole_attention)
    gradients = torch.autograd.grad(out, list(call.leaves.values()), call.upstream.bfloat16())
    expected = rounded(lambda q, k, v, **options: multipole_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options))
    assert torch.equal(out, expected)
    expected = torch.autograd.grad(expected, list(rounded.leaves.values()), call.upstream.bfloat16())
    for name, one, other in zip(call.leaves, gradients, expected):
        assert one.dtype == torch.float32 and torch.equal(one, other), name


# Dropout


@pytest.mark.parametrize("logits", [1, 2**30])
@pytest.mark.parametrize("causal", [True, False])
def test_dropout_is_that_of_the_reference(monkeypatch, causal, logits):
    """Near weights are dropped one by one, and far ones for all tokens of a segment; in gradients, too."""
    case = replace(FULL, causal=causal)
    generator = torch.Generator().manual_seed(0)
    heads, levels = case.kv_heads * case.repeats, level_count(case.n, case.block_size)
    summaries = case.rank * sum(-(-case.n // (case.block_size << level)) for level in range(levels))
    near, far = (
        (torch.rand(case.batch, heads, case.n, columns, dtype=torch.float64, generator=generator) > 0.3) / 0.7
        for columns in (case.n, summaries)
    )
    blocks, offsets = -(-case.n // case.block_size), torch.tensor([-1, 0] if causal else [-1, 0, 1])
    query = (torch.arange(blocks)[:, None] * case.block_size + torch.arange(case.block_size)).clamp(max=case.n - 1)
    key = (torch.arange(blocks)[:, None, None] + offsets[:, None]) * case.block_size + torch.arange(case.block_size)
    key = key.flatten(1).clamp(0, case.n - 1)  # beyond the row: hidden, whatever the factor
    of_blocks = near[:, :, query[:, :, None], key[:, None]].unflatten(1, (case.kv_heads, -1)).transpose(2, 3)
    of_blocks = of_blocks.reshape(case.batch * case.kv_heads * blocks, -1, key.shape[1])

    def known_far(weights, p):
        assert p == 0.3
        return weights * far_of(weights)

    def far_of(weights):
        """Factors laid out as the pairs of groups and the windows beside them."""
        out, start = [], 0
        for level in range(levels):
            width = case.block_size << level
            groups, segment = -(-case.n // width), width // case.rank
            pairs, child = -(-groups // 2), torch.arange(2 * case.rank)
            first = ((torch.arange(pairs)[:, None] * 2 * case.rank + child) * segment).clamp(max=case.n - 1)
            sides = (-1,) if causal else (-1, 1)
            listed = torch.cat([(torch.arange(pairs)[:, None] + side) * 2 * case.rank + child for side in sides], 1)
            listed = start + listed.clamp(0, groups * case.rank - 1)
            out.append(far[:, :, first[:, :, None], listed[:, None]])
            start += groups * case.rank
        found = torch.cat(out, 2).unflatten(1, (case.kv_heads, case.repeats)).transpose(2, 3).flatten(3, 4)
        return found.view(weights.shape)

    monkeypatch.setattr(kernel, "dropout_factors", lambda shape, p, generator, first: of_blocks[first : first + shape[0]].view(shape))
    monkeypatch.setattr(linear.nn.functional, "dropout", known_far)
    monkeypatch.setattr(kernel, "_LOGITS_PER_THREAD", logits)
    call = make(case)
    actual = call.with_gradients(lambda *tensors, **options: multipole_attention(*tensors, **options, dropout_p=0.3))
    expected = call.with_gradients(
        lambda *tensors, **options: multipole_attention_reference(*tensors, **options, dropout_near=near, dropout_far=far)
    )
    assert (call(multipole_attention_reference) - actual["out"]).abs().max() > 0.1
    for name, value in expected.items():
        assert_within(actual[name], value, 1e-10, name, case)


# Cost


@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_linear(monkeypatch, causal):
    """What a token more takes is the same at every length."""
    monkeypatch.setattr(kernel, "_LOGITS_PER_THREAD", 2**12)
    peaks = []
    for n in (1024, 2048, 4096):
        monkeypatch.setattr(kernel, "_arena", threading.local())
        call = make(replace(FULL, n=n, block_size=32, batch=1, kv_heads=1, dim=16, value_dim=16, dtype=torch.float32, causal=causal))
        peaks.append(peak_bytes(lambda: call.with_gradients(multipole_attention)))
    more = [after - before for before, after in itertools.pairwise(peaks)]
    assert more[0] > 0 and abs(more[1] / more[0] / 2 - 1) < 0.05


def test_far_logits_a_token_do_not_grow(monkeypatch):
    """Each segment of each level once: 2 * rank * rank * (1 + 1/2 + ...) logits a block, however many levels there are."""
    logits = []

    def counting(q, k, *arguments):
        logits.append(q.shape[:-1].numel() * k.shape[-2])
        return real(q, k, *arguments)

    real = linear.partial_softmax
    monkeypatch.setattr(linear, "partial_softmax", counting)
    for n in (256, 4096):
        make(Case(n=n, batch=1, kv_heads=1, block_size=4, rank=2, downsample=True))(multipole_attention)
    # The coarsest pairs of groups are rounded up.
    assert logits[0] / 256 <= logits[1] / 4096 * 1.1 and logits[1] <= 2 * 4096 / 4 * 2 * 4 * 1.01


# What is refused

QKV = [torch.randn(1, 2, 40, 4) for _ in range(3)]


def test_fewer_queries_than_keys():
    q, k, v = QKV
    with pytest.raises(ValueError, match="downsample_queries needs the queries of all 40 tokens, but q has 3.*MultipoleCache"):
        multipole_attention(q[:, :, -3:], k, v, block_size=4, rank=2, downsample_queries=True)


@pytest.mark.parametrize("options", [{"causal": False}, {"downsample_queries": True}])
def test_query_summary_elsewhere(options):
    summary = HierarchicalSummary(4, 2, 2, 4)
    with pytest.raises(ValueError, match="query_summary belongs to the bidirectional O\\(n\\) form"):
        multipole_attention(*QKV, block_size=4, rank=2, query_summary=summary, **options)


def test_query_summary_of_other_heads():
    with pytest.raises(ValueError, match="query_summary was built for heads 1, but this call has 2"):
        multipole_attention(
            *QKV, block_size=4, rank=2, query_summary=HierarchicalSummary(4, 2, 1, 4), causal=False, downsample_queries=True
        )

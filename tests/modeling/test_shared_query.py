"""The O(n) form: what is its own, and its cost."""

import itertools
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_multipole import multipole_attention
from hf_multipole.modeling import multipole_attention as module
from hf_multipole.modeling import multipole_torch as kernel
from hf_multipole.modeling import shared_query_torch as linear
from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.summaries import HierarchicalSummary
from hf_multipole.reference import multipole_attention_reference
from tests.helpers.multipole_cases import PADDED, SHAPES, Case, make
from tests.helpers.multipole_properties import future_does_not_matter
from tests.helpers.numerics import assert_within, peak_bytes
from tests.helpers.operators import check_operator

# One of everything, four levels.
FULL = Case(n=45, repeats=2, bias_levels=2, softcap=2.0, far_keys=True, summary="hierarchical", downsample=True)
PLAIN = {"softcap": None, "dtype": torch.bfloat16, "summary": "mean"}


def test_averaged_queries_would_let_the_future_matter():
    """So that this property can fail: bidirectional queries in causal attention."""
    with pytest.MonkeyPatch.context() as patch:

        def averaged(q, block_size, rank, levels):
            q, means, _ = module.MeanSummary(block_size, rank)(q, None, levels, everything=True)
            return q, [x.flatten(2, 3) for x in means]

        patch.setattr(module, "first_queries", averaged)
        with pytest.raises(AssertionError, match="the past of token"):
            future_does_not_matter(multipole_attention, FULL)


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


def test_a_far_bias_of_minus_infinity_leaves_the_near_field():
    case = replace(FULL, far_keys=False)
    outs = []
    for downsample in (True, False):
        call = make(replace(case, downsample=downsample))
        call.leaves["far_bias"] = torch.full_like(call.leaves["far_bias"], -torch.inf)
        outs.append(call(multipole_attention))
    assert_within(outs[0], outs[1], 1e-12, "out", case)


# In training


@pytest.mark.parametrize("causal", [True, False])
def test_opcheck(causal):
    cases = replace(FULL, n=19, causal=causal, padding=PADDED[:1] * 2), replace(FULL, n=19, causal=causal, **PLAIN)
    check_operator(module, "segment_attention", *(partial(make(case), multipole_attention) for case in cases))


# Dropout


@pytest.mark.parametrize("logits", [1, 2**30])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
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
@pytest.mark.slow
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

"""The PyTorch path of multipole attention: its chunks and work space, dropout, and what it costs."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch

from hf_multipole import multipole_attention
from hf_multipole.modeling import multipole_torch as kernel
from hf_multipole.modeling.hierarchy import far_columns, level_count
from hf_multipole.reference import multipole_attention_reference
from tests.helpers.multipole_cases import SHAPES, Case, make
from tests.helpers.numerics import assert_within, peak_bytes

# One of everything: ragged, grouped heads, fewer bias columns than levels, a cap, other keys for the far field.
FULL = Case(n=45, repeats=2, bias_levels=2, softcap=2.0, far_keys=True, summary="hierarchical")


# What must not matter


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_size_of_the_chunks_does_not_matter(monkeypatch, causal, shape):
    """One block at a time, a few that do not divide a row, or all at once: to the last bits."""
    case = replace(FULL, causal=causal, **SHAPES[shape])
    results, chunks = [], set()

    def counting(rows, columns, device):
        chunks.add(size := real(rows, columns, device))
        return size

    real = kernel._blocks_at_once
    monkeypatch.setattr(kernel, "_blocks_at_once", counting)
    for logits in (1, 1500, 2**30):
        monkeypatch.setattr(kernel, "_LOGITS_PER_THREAD", logits)
        results.append(make(case).with_gradients(multipole_attention))
    assert len(chunks) >= 3
    for other in results[1:]:
        for name, value in results[0].items():
            assert_within(other[name], value, 1e-12, name, case)


def test_calls_between_forward_and_backward_do_not_matter():
    """The work space kept from call to call holds nothing that a backward pass needs."""
    call = make(FULL)
    expected = call.with_gradients(multipole_attention)
    out = call(multipole_attention)
    make(replace(FULL, n=77, seed=1)).with_gradients(multipole_attention)
    gradients = torch.autograd.grad(out, list(call.leaves.values()), call.upstream)
    for name, gradient in zip(call.leaves, gradients):
        assert torch.equal(gradient, expected[name])


def test_threads_do_not_share_their_work_space():
    inputs = [make(replace(FULL, seed=seed)) for seed in range(4)]
    expected = [call.with_gradients(multipole_attention) for call in inputs]
    wrong = []

    def work(call, result):
        for _ in range(5):
            actual = call.with_gradients(multipole_attention)
            wrong.extend(name for name in result if not torch.equal(actual[name], result[name]))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Dropout


def block_layout(near, far, n, block_size, rank, kv_heads, causal):
    """Factors by query and column of the reference, ``(batch, heads, n, n)`` and ``(.., summaries)``, by block and column."""
    blocks = -(-n // block_size)
    columns = far_columns(n, block_size, level_count(n, block_size), causal)
    batch, heads = near.shape[:2]
    offsets = torch.tensor([-1, 0] if causal else [-1, 0, 1])
    query = (torch.arange(blocks)[:, None] * block_size + torch.arange(block_size)).clamp(max=n - 1)
    key = (torch.arange(blocks)[:, None, None] + offsets[:, None]) * block_size + torch.arange(block_size)
    key = key.flatten(1).clamp(0, n - 1)  # beyond the row: hidden, whatever the factor
    summary = (columns.row[..., None] * rank + torch.arange(rank)).flatten(1)
    both = torch.cat([near[:, :, query[:, :, None], key[:, None]], far[:, :, query[:, :, None], summary[:, None]]], -1)
    both = both.view(batch, kv_heads, heads // kv_heads, blocks, block_size, -1).transpose(2, 3)
    return both.reshape(batch * kv_heads * blocks, -1, both.shape[-1])


@pytest.mark.parametrize("logits", [1, 2**30])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
def test_dropout_is_that_of_the_reference(monkeypatch, causal, logits):
    """The same factors in both: zeros drop near and far weights after the softmax, in gradients too."""
    case = replace(FULL, causal=causal)
    generator = torch.Generator().manual_seed(0)
    heads, levels = case.kv_heads * case.repeats, level_count(case.n, case.block_size)
    summaries = case.rank * sum(-(-case.n // (case.block_size << level)) for level in range(levels))
    near, far = (
        (torch.rand(case.batch, heads, case.n, columns, dtype=torch.float64, generator=generator) > 0.3) / 0.7
        for columns in (case.n, summaries)
    )
    factors = block_layout(near, far, case.n, case.block_size, case.rank, case.kv_heads, causal)

    def known(shape, p, generator, first):
        assert p == 0.3
        return factors[first : first + shape[0]].view(shape)

    monkeypatch.setattr(kernel, "dropout_factors", known)
    monkeypatch.setattr(kernel, "_LOGITS_PER_THREAD", logits)
    call = make(case)
    actual = call.with_gradients(lambda *tensors, **options: multipole_attention(*tensors, **options, dropout_p=0.3))
    expected = call.with_gradients(
        lambda *tensors, **options: multipole_attention_reference(*tensors, **options, dropout_near=near, dropout_far=far)
    )
    without = call(multipole_attention)
    assert (without - actual["out"]).abs().max() > 0.1
    for name, value in expected.items():
        assert_within(actual[name], value, 1e-10, name, case)


def test_dropout_is_drawn_once_for_forward_and_backward(monkeypatch):
    """The output is linear in the values: with one set of factors, <gradient, values> is <output, upstream>."""
    monkeypatch.setattr(kernel, "_LOGITS_PER_THREAD", 1500)
    call = make(replace(FULL, summary="mean"))
    call.options["dropout_p"] = 0.4
    torch.manual_seed(0)
    first, second = call.with_gradients(multipole_attention), call.with_gradients(multipole_attention)
    for result in (first, second):
        torch.testing.assert_close((result["v"] * call.leaves["v"]).sum(), (result["out"] * call.upstream).sum())
    assert not torch.equal(first["out"], second["out"])
    torch.manual_seed(0)
    assert torch.equal(call(multipole_attention), first["out"])


def test_dropout_factors_are_zero_or_scaled_up():
    factors = kernel.dropout_factors((20, 50, 50), 0.2, torch.Generator().manual_seed(0), 0)
    assert set(factors.unique().tolist()) == {0.0, torch.tensor(1 / 0.8).item()}
    # Five standard deviations of the mean of 50 000 draws.
    assert abs(factors.mean().item() - 1) < 5 * (0.25 / factors.numel()) ** 0.5


def test_dropout_differs_between_rows_and_heads_and_blocks(monkeypatch):
    seen = []
    real = kernel.dropout_factors
    monkeypatch.setattr(kernel, "dropout_factors", lambda *arguments: seen.append(real(*arguments)) or seen[-1])
    monkeypatch.setattr(kernel, "_LOGITS_PER_THREAD", 1)
    call = make(replace(FULL, repeats=1))
    call.options["dropout_p"] = 0.5
    call(multipole_attention)
    drawn = [factors[0] for factors in seen]
    assert len(drawn) == 2 * 2 * 12
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
def test_memory_is_linear(monkeypatch, causal):
    monkeypatch.setattr(kernel, "_LOGITS_PER_THREAD", 2**12)
    peaks = []
    for n in (1024, 2048, 4096):
        monkeypatch.setattr(kernel, "_arena", threading.local())
        call = make(replace(FULL, n=n, block_size=32, batch=1, kv_heads=1, dim=16, value_dim=16, dtype=torch.float32, causal=causal))
        peaks.append(peak_bytes(lambda: call.with_gradients(multipole_attention)))
    # One weight a pair of tokens would make 64 MiB a head.
    assert peaks[2] < 4096 * 4096
    assert peaks[1] - peaks[0] > 0 and (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) < 2.5


def test_work_space_made_in_inference_mode_serves_outside_of_it():
    q = torch.randn(1, 1, 5000, 4)  # more than any call before it needed
    with torch.inference_mode():
        inside = multipole_attention(q, q, q, block_size=64)
    torch.testing.assert_close(multipole_attention(q, q, q, block_size=64), inside.clone())

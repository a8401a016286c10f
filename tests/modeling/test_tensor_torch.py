"""The PyTorch path of tensor attention: its tiles, dropout, and what it costs."""

import math
import threading
from dataclasses import replace

import pytest
import torch

from hf_multipole import tensor_attention
from hf_multipole.modeling import tensor_torch as tiles
from hf_multipole.reference import tensor_attention_reference
from tests.helpers.numerics import assert_within, peak_bytes
from tests.helpers.tensor_cases import TensorCase, make

FULL = TensorCase(n=14, repeats=2)
SHAPES = {"plain": {}, "last queries": {"queries": 4}}


@pytest.mark.parametrize("shape", ["plain", "last queries"])
@pytest.mark.parametrize("causal", [True, False])
def test_both_ways_back_agree(monkeypatch, causal, shape):
    call = make(replace(FULL, n=40, causal=causal, **SHAPES[shape]))
    expected = call.with_gradients(tensor_attention)
    monkeypatch.setattr(tiles, "_backward_by_tuples", lambda *arguments: tiles._backward_by_rows(*arguments, True))
    for name, value in call.with_gradients(tensor_attention).items():
        assert_within(value, expected[name], 1e-12, name, call)


@pytest.mark.parametrize("window", [None, (3, 12)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_size_of_the_tiles_does_not_matter(monkeypatch, causal, window):
    case = replace(FULL, n=24, batch=1, causal=causal, window=window, cuts=(20,))
    expected = make(case).with_gradients(tensor_attention)
    for logits, columns, rows, tuples in ((1, 7, 5, 3), (900, 16, 64, 50), (2**30, 2**20, 2**20, 2**20)):
        for name, size in (("_LOGITS_PER_THREAD", logits), ("_COLUMNS", columns), ("_ROWS", rows), ("_TUPLES", tuples)):
            monkeypatch.setattr(tiles, name, size)
        for name, value in make(case).with_gradients(tensor_attention).items():
            assert_within(value, expected[name], 1e-12, name, case)


# Dropout


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_is_that_of_the_reference(monkeypatch, causal):
    """The same factors in both, where one tile holds all: zeros drop weights after the softmax, in gradients too."""
    case = TensorCase(n=7, batch=1, kv_heads=1, causal=causal)
    factors = (torch.rand(1, 1, 7, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) > 0.3) / 0.7

    def known(shape, p, generator, first):
        assert p == 0.3 and shape == (1, 49, 7)
        return factors.view(shape)

    monkeypatch.setattr(tiles, "dropout_factors", known)
    call = make(case)
    actual = call.with_gradients(tensor_attention, dropout_p=0.3)
    expected = call.with_gradients(tensor_attention_reference, dropout=factors)
    assert (call(tensor_attention) - actual["out"]).abs().max() > 0.1
    for name, value in expected.items():
        assert_within(actual[name], value, 1e-10, name, case)


@pytest.mark.parametrize("window", [None, (3, 5)])
def test_dropout_is_drawn_once_for_forward_and_backward(monkeypatch, window):
    """The output is linear in the values of each index: with one set of factors, <gradient, values> is <output, upstream>."""
    monkeypatch.setattr(tiles, "_LOGITS_PER_THREAD", 200)
    call = make(replace(FULL, window=window, cuts=(3, 8)))
    torch.manual_seed(0)
    first, second = (call.with_gradients(tensor_attention, dropout_p=0.4) for _ in range(2))
    for result in (first, second):
        for name in ("v0", "v1"):
            torch.testing.assert_close((result[name] * call.leaves[name]).sum(), (result["out"] * call.upstream).sum())
    assert not torch.equal(first["out"], second["out"])
    torch.manual_seed(0)
    assert torch.equal(call(tensor_attention, dropout_p=0.4), first["out"])


def test_gradcheck_with_dropout():
    call = make(TensorCase(n=6, dim=2, value_dim=1, batch=1, kv_heads=1))

    def function(q, k0, k1, v0, v1):
        torch.manual_seed(1)
        return tensor_attention(q, [k0, k1], [v0, v1], dropout_p=0.4, **call.options)

    assert torch.autograd.gradcheck(function, tuple(call.leaves.values()))


def test_dropout_keeps_the_mean(monkeypatch):
    """Equal weights, values of 1: each output is the mean of n ** 2 factors of variance p / (1 - p)."""
    monkeypatch.setattr(tiles, "_LOGITS_PER_THREAD", 300)
    n, p = 20, 0.25
    ones = torch.ones(10, 3, n, 1, dtype=torch.float64)
    out = tensor_attention(0 * ones, [ones] * 2, [ones] * 2, dropout_p=p, causal=False)
    deviation = (p / (1 - p)) ** 0.5 / n
    assert abs(out.mean() - 1) < 5 * deviation / out.numel() ** 0.5
    assert 0.85 < out.std() / deviation < 1.15  # 600 outputs: five deviations of the deviation
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[0, 0], out[0, 1])


# Cost


@pytest.mark.parametrize("window", [None, (8, 32)])
@pytest.mark.slow
def test_memory_is_linear(monkeypatch, window):
    """Neither n ** 2 * dim nor n ** 3 numbers; and doubling n at most doubles what doubling it before added."""
    monkeypatch.setattr(tiles, "_LOGITS_PER_THREAD", 2**12)
    monkeypatch.setattr(tiles, "_ROWS", 32)
    monkeypatch.setattr(tiles, "_TUPLES", 64)
    peaks = []
    for n in (48, 96, 192):
        call = make(TensorCase(n=n, batch=1, kv_heads=1, dim=32, value_dim=32, window=window, dtype=torch.float32))
        peaks.append(peak_bytes(lambda: call.with_gradients(tensor_attention)))
    assert peaks[2] < 192 * 192 * 32  # a fourth of n ** 2 * dim floats
    assert (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) < 2.5


def logits_of(work) -> int:
    return sum((stop - start) * math.prod(span.width for span in rows) * (high - low) for start, stop, rows, low, high in work.tiles())


def test_the_cost_of_windows_follows_the_windows():
    """Logits computed are at most twice those asked for, and linear in n."""
    counts = []
    for n in (1024, 2048):
        q, tokens = torch.empty(1, 1, n, 1), torch.empty(2, 1, n, 1)
        work = tiles._Rows(q, tokens, tokens, tiles._Rule(True, (32, 512), 1.0, 0.0, None), True)
        counts.append(
            sum((stop - start) * math.prod(s.width for s in rows) * (high - low) for start, stop, rows, low, high in work.tiles())
        )
    assert counts[1] - counts[0] <= 1.05 * 1024 * 32 * 512


@pytest.mark.parametrize("window, waste", [(None, 1.15), ((None, 64), 1.6), ((8, 16), 6)])
def test_causal_queries_waste_little(window, waste):
    n = 512
    q, tokens = torch.empty(1, 1, n, 1), torch.empty(2, 1, n, 1)
    widths = sorted(n if w is None else w for w in window or (None, None))
    work = tiles._Rows(q, tokens, tokens, tiles._Rule(True, tuple(widths), 1.0, 0.0, None), True)
    computed = logits_of(work)
    asked = sum(math.prod(min(i + 1, w) for w in widths) for i in range(n))
    assert asked <= computed <= waste * asked


def test_threads_do_not_disturb_each_other():
    calls = [make(replace(FULL, seed=seed)) for seed in range(3)]
    expected, wrong = [call.with_gradients(tensor_attention) for call in calls], []

    def work(call, result):
        for _ in range(3):
            actual = call.with_gradients(tensor_attention)
            wrong.extend(name for name in result if not torch.equal(actual[name], result[name]))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""Metrics: the definitions, and that they add up over batches and processes, without the Hub."""

import math
import multiprocessing

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_multipole.training.metrics import (
    BitsPerByte,
    MaskedAccuracy,
    Perplexity,
    TokenAccuracy,
    compression_baselines,
    row_figures,
    summarise,
)


def data(rows, n=11, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, n, 7, generator=drawn)
    labels = torch.randint(7, (rows, n), generator=drawn)
    labels[torch.rand(rows, n, generator=drawn) < 0.3] = -100
    return logits, labels, np.arange(10, 10 + rows, dtype=np.float64)


@given(st.integers(1, 5), st.integers(2, 12), st.booleans())
def test_definitions(rows, n, causal):
    """Against a loop over tokens. A causal model predicts each token from those before it."""
    logits, labels, _ = data(rows, n)
    token_bytes = np.random.default_rng(rows).integers(0, 9, (rows, n))
    token_bytes[:, -1] = 5
    labels[:, -1] = 3
    nats, hits, count, row_nats, share = 0.0, 0, 0, [], []
    for row in range(rows):
        here = 0
        for token in range(1 if causal else 0, n):
            label = int(labels[row, token])
            if label != -100:
                scores = logits[row, token - 1 if causal else token].double()
                nats -= float(scores.log_softmax(0)[label])
                hits += int(scores.argmax()) == label
                here += token_bytes[row, token]
                count += 1
        share.append(here)
        row_nats.append(nats)
    losses, found = row_figures(logits, labels, causal)
    figures = summarise(losses.numpy(), found.numpy(), labels.numpy(), token_bytes, causal)
    assert figures["mean_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert figures["token_accuracy" if causal else "masked_accuracy"] == hits / count
    assert ("bits_per_byte" in figures) == causal
    if causal:
        assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(share), rel=1e-5)


def parts(metric, rows=6):
    """Predictions and references of some rows."""
    logits, labels, row_bytes = data(rows)
    losses, found = row_figures(logits, labels, True)
    return (found.numpy(), labels.numpy()) if "accuracy" in metric.__name__.lower() else (losses.sum(1).numpy(), row_bytes)


METRICS = [BitsPerByte, Perplexity, TokenAccuracy, MaskedAccuracy]


@pytest.mark.parametrize("metric", METRICS)
def test_batches_add_up(metric, tmp_path):
    predictions, references = parts(metric)
    whole = metric(cache_dir=tmp_path).compute(predictions=predictions, references=references)
    batched = metric(cache_dir=tmp_path)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        batched.add_batch(predictions=predictions[part], references=references[part])
    assert batched.compute() == pytest.approx(whole)


def _share(metric, folder, process, queue):
    predictions, references = parts(metric)
    own = metric(cache_dir=folder, num_process=2, process_id=process, experiment_id="shared")
    own.add_batch(predictions=predictions[process::2], references=references[process::2])
    queue.put((process, own.compute()))


@pytest.mark.parametrize("metric", [BitsPerByte, TokenAccuracy])
def test_processes_add_up(metric, tmp_path):
    """evaluate's own way over several processes: the first one has the result of all."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_share, args=(metric, str(tmp_path), number, queue)) for number in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    predictions, references = parts(metric)
    assert results[0] == pytest.approx(metric(cache_dir=tmp_path).compute(predictions=predictions, references=references))
    assert results[1] is None


def test_they_combine_and_describe_themselves(tmp_path):
    both = evaluate.combine([BitsPerByte(cache_dir=tmp_path), Perplexity(cache_dir=tmp_path)])
    both.add_batch(predictions=[math.log(2) * 8], references=[4])
    assert both.compute() == pytest.approx({"bits_per_byte": 2.0, "perplexity": 4.0})
    assert "nats" in BitsPerByte(cache_dir=tmp_path).inputs_description
    assert Perplexity(cache_dir=tmp_path).compute(predictions=[1e6], references=[1]) == {"perplexity": math.inf}
    assert math.isnan(MaskedAccuracy(cache_dir=tmp_path).compute(predictions=[[1, 2]], references=[[-100, -100]])["masked_accuracy"])


def test_compressors():
    figures = compression_baselines(["abab" * 200, "abab" * 100])
    assert figures["entropy of single bytes"] == 1.0 and figures["gzip -9"] < 1

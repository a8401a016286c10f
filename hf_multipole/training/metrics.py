"""Figures of language models as metrics of ``evaluate``, and what general compressors reach on the same files.

The metrics are made without the Hub, from sums that add up over batches and processes:

    metric = BitsPerByte()
    for batch in batches:
        metric.add_batch(predictions=nats, references=number_of_bytes)
    metric.compute()  # {"bits_per_byte": ...}
"""

import gzip
import lzma
import math
from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch

_CITATION = "None: the definitions are the usual ones of information theory and of language modelling."


class _Metric(evaluate.Metric):
    """Names the features of a metric; the docstring is its description."""

    predictions: datasets.features.features.FeatureType
    references: datasets.features.features.FeatureType

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=_CITATION,
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": self.predictions, "references": self.references}),
        )


_NUMBER = datasets.Value("float64")
_TOKENS = datasets.Sequence(datasets.Value("int64"))


class BitsPerByte(_Metric):
    """Bits that the model needs for a byte of text, whatever its tokenizer.

    predictions: summed cross-entropy of each row, in nats. references: bytes of text that the predicted tokens of the row stand for.
    """

    predictions = references = _NUMBER

    def _compute(self, predictions, references):
        return {"bits_per_byte": float(np.sum(predictions) / math.log(2) / np.sum(references))}


class Perplexity(_Metric):
    """Exponential of the mean cross-entropy of a token.

    predictions: summed cross-entropy of each row, in nats. references: number of predicted tokens of the row.
    """

    predictions = references = _NUMBER

    def _compute(self, predictions, references):
        mean = np.sum(predictions) / np.sum(references)
        # Beyond the largest float there is nothing to tell apart.
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}


class TokenAccuracy(_Metric):
    """Share of the next tokens that the model holds most likely.

    predictions: the most likely next token at each token of a row. references: the labels of the row, as the model takes them, not
    shifted; -100 where nothing is predicted.
    """

    predictions = references = _TOKENS

    def _compute(self, predictions, references):
        return {"token_accuracy": _accuracy([row[:-1] for row in predictions], [row[1:] for row in references])}


class MaskedAccuracy(_Metric):
    """Share of the masked tokens that the model finds.

    predictions: the most likely token at each token of a row. references: the labels of the row, -100 where nothing was masked.
    """

    predictions = references = _TOKENS

    def _compute(self, predictions, references):
        return {"masked_accuracy": _accuracy(predictions, references)}


def _accuracy(predictions, references) -> float:
    hits = total = 0
    for found, wanted in zip(predictions, references):
        found, wanted = np.asarray(found), np.asarray(wanted)
        hits += int(((found == wanted) & (wanted != -100)).sum())
        total += int((wanted != -100).sum())
    return hits / total if total else math.nan


def row_figures(logits: torch.Tensor, labels: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the metrics are made of, for the logits ``(batch, n, vocabulary)`` and labels ``(batch, n)`` of a model.

    Returns the cross-entropy of each token's label in nats, ``(batch, n)`` float32, 0 where the label is -100, and the most likely
    tokens ``(batch, n)``. For a causal model the loss of a label stands at the label, not at the token that predicts it.
    """
    scores, targets = (logits[:, :-1], labels[:, 1:]) if causal else (logits, labels)
    nats = torch.nn.functional.cross_entropy(scores.float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    if causal:
        # The first token is predicted from nothing.
        nats = torch.nn.functional.pad(nats, (1, 0))
    return nats, logits.argmax(-1)


def summarise(nats: np.ndarray, predictions: np.ndarray, labels: np.ndarray, token_bytes: np.ndarray, causal: bool) -> dict[str, float]:
    """All metrics of some rows, and their mean loss (nats a token) as ``mean_loss``.

    nats, predictions, labels: ``(batch, n)`` as of :func:`row_figures`. token_bytes: ``(batch, n)`` bytes of text of each token.
    """
    if causal:
        labels = labels.copy()
        labels[:, 0] = -100
    counted = labels != -100
    counts, sums = counted.sum(1), nats.sum(1, dtype=np.float64)
    per_token = Perplexity(keep_in_memory=True)
    figures = per_token.compute(predictions=sums, references=counts)
    accuracy = (TokenAccuracy if causal else MaskedAccuracy)(keep_in_memory=True)
    figures |= accuracy.compute(predictions=predictions, references=labels)
    if causal:
        figures |= BitsPerByte(keep_in_memory=True).compute(predictions=sums, references=(token_bytes * counted).sum(1))
    return figures | {"mean_loss": float(sums.sum() / max(counts.sum(), 1))}


def compression_baselines(texts: Sequence[str]) -> dict[str, float]:
    """Bits per byte of the texts: entropy of single bytes, and gzip -9 and xz -9 on each text by itself."""
    files = [text.encode("utf-8") for text in texts]
    size = sum(map(len, files))
    counts = Counter(b"".join(files)).values()
    return {
        "entropy of single bytes": -sum(count / size * math.log2(count / size) for count in counts),
        "gzip -9": 8 * sum(len(gzip.compress(file, 9)) for file in files) / size,
        "xz -9": 8 * sum(len(lzma.compress(file, preset=9)) for file in files) / size,
    }

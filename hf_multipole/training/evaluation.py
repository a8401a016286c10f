"""A trained model on a text: its figures at several context lengths, its loss by position, and how far back it reaches.

Over Accelerate's own API, on one process or many: each takes its share of the rows, and what they measure is gathered.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .metrics import BitsPerByte, MaskedAccuracy, Perplexity, TokenAccuracy, row_figures

# Points of the curve of losses by position.
_POSITIONS = 64
# Tokens of a needle: the key that is asked for at the end, and the value that should follow.
_KEY = _VALUE = 4


def windows(rows: Dataset, context_length: int, stride: int) -> list[dict]:
    """Overlapping rows of ``context_length`` tokens over a text: each begins ``stride`` tokens after the one before.

    rows: packed; taken for one text, of which an end that is shorter than a stride is left out. ``score_from`` of a window is the
    first position that counts, so that every token counts once, and each but those of the first window has at least
    ``context_length - stride`` tokens before it.
    """
    ids = np.concatenate([row["input_ids"] for row in rows.with_format("numpy")])
    sizes = np.concatenate([row["token_bytes"] for row in rows.with_format("numpy")])
    if len(ids) < context_length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than a context of {context_length}")
    out = []
    for start in range(0, len(ids) - context_length + 1, stride):
        first = context_length - stride if start else 0
        part = slice(start, start + context_length)
        out.append({"input_ids": ids[part], "score_from": first, "token_bytes": sizes[part]})
    return out


def measure(
    model: PreTrainedModel, rows, collator: Callable, accelerator: Accelerator, batch_size: int, causal: bool, name: str
) -> dict[str, object]:
    """Figures of a model on rows of one length: ``bits_per_byte`` (causal), ``perplexity``, ``token_accuracy`` or
    ``masked_accuracy``, ``loss`` in nats a token, ``tokens`` that were counted, and ``by_position``, the mean loss of some ranges
    of positions.

    model: prepared by ``accelerator``. rows: with ``input_ids`` and ``token_bytes``, perhaps ``position_ids`` and ``score_from``.
    """

    def batches(items: list[dict]) -> dict[str, torch.Tensor]:
        batch = collator(items)
        # Without a text before it, the first token is not predicted; and from where on a window counts.
        first = torch.tensor([item.get("score_from", 0) for item in items])
        before = torch.arange(batch["labels"].shape[1]) < first[:, None]
        batch["labels"] = batch["labels"].masked_fill(before, -100)
        return batch | {"token_bytes": torch.from_numpy(np.stack([item["token_bytes"] for item in items]))}

    loader = accelerator.prepare(DataLoader(rows, batch_size, collate_fn=batches))
    metrics = [Perplexity(), (TokenAccuracy if causal else MaskedAccuracy)(), *([BitsPerByte()] if causal else [])]
    sums = counts = np.zeros(())
    for batch in tqdm(loader, desc=name, unit=" batches", disable=not accelerator.is_main_process):
        sizes, labels = batch.pop("token_bytes"), batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits if causal else model(**batch).logits
        nats, found = row_figures(logits, labels, causal)
        if causal:
            labels[:, 0] = -100
        nats, found, labels, sizes = accelerator.gather_for_metrics((nats, found, labels, sizes))
        if not accelerator.is_main_process:
            continue
        nats, labels = nats.double().cpu().numpy(), labels.cpu().numpy()
        counted = labels != -100
        per_row, targets = nats.sum(1), counted.sum(1)
        references = [targets, labels, (sizes.cpu().numpy() * counted).sum(1)]
        for metric, predictions, reference in zip(metrics, (per_row, found.cpu().numpy(), per_row), references):
            metric.add_batch(predictions=predictions, references=reference)
        sums, counts = sums + nats.sum(0), counts + counted.sum(0)
    if not accelerator.is_main_process:
        return {}
    figures = {name: value for metric in metrics for name, value in metric.compute().items()}
    figures |= {"loss": float(sums.sum() / counts.sum()), "tokens": int(counts.sum())}
    return figures | {"by_position": by_position(sums, counts)}


def by_position(sums: np.ndarray, counts: np.ndarray) -> list[dict[str, float]]:
    """The mean loss of ranges of positions, of some evenly spaced on a logarithmic scale: ``from``, ``to`` (exclusive), ``loss``."""
    edges = np.unique(np.geomspace(1, len(sums), min(_POSITIONS, len(sums)) + 1).round().astype(int))
    edges[0] = 0
    return [
        {"from": int(start), "to": int(end), "loss": float(sums[start:end].sum() / counts[start:end].sum())}
        for start, end in zip(edges, edges[1:])
        if counts[start:end].sum()
    ]


# How far back it reaches


def probe_sizes(kind: str, length: int, span: int = 32) -> tuple[int, int]:
    """Tokens that stand at both places, and how many of them are given at the second. Raises ValueError where they do not fit."""
    size, prompt = (_KEY + _VALUE, _KEY) if kind == "needle" else (span, 1)
    if length < 2 * size:
        raise ValueError(f"a context of {length} is too short for a {kind} of {size} tokens, twice")
    return size, prompt


def probe(
    model: PreTrainedModel,
    rows: Dataset,
    accelerator: Accelerator,
    kind: str,
    cases: int,
    batch_size: int,
    seed: int = 0,
    span: int = 32,
) -> list[dict[str, float]]:
    """How well a causal model finds again what stood at some distance in its context, for distances up to the whole of it.

    kind: "needle": random tokens, a key and its value, stand in the text; the key comes again at its end, and the value should
    follow. "copy": ``span`` tokens of another text stand in it and come again at its end; from the second on they should follow.
    rows: packed; the text around. cases: rows that are tried at each distance.
    Returns for each ``distance`` (tokens between both places) the ``recall``, the share of tokens that the model holds most likely,
    and the ``gain`` over the same text in which other tokens stand at the first place, in nats a token.
    """
    length = len(rows[0]["input_ids"])
    size, prompt = probe_sizes(kind, length, span)
    top = length - size
    # The same ones at every context length, two for each doubling.
    distances = [round(size * 2 ** (step / 2)) for step in range(1 + int(2 * math.log2(top / size)))]
    drawn = np.random.default_rng(seed)
    text = np.concatenate([row["input_ids"] for row in rows.with_format("numpy")])
    items: Any = []
    for distance in distances:
        for case in range(cases):
            ids = np.array(rows[case % len(rows)]["input_ids"], dtype=np.int64)
            if kind == "needle":
                spans = [drawn.choice(text, size) for _ in range(2)]
            else:
                spans = [text[start : start + size] for start in drawn.integers(0, len(text) - size, 2)]
            for wanted in (0, 1):
                # What is asked for at the end is always the first; only here it was also said before.
                ids[top - distance : top - distance + size] = spans[wanted]
                ids[top:] = spans[0]
                items.append({"ids": torch.from_numpy(ids.copy()), "distance": int(distance), "told": 1 - wanted})
    columns = ("ids", "distance", "told")
    loader: DataLoader = DataLoader(
        items, batch_size, collate_fn=lambda part: {n: torch.stack([torch.as_tensor(i[n]) for i in part]) for n in columns}
    )
    found = []
    for batch in tqdm(accelerator.prepare(loader), desc=f"{kind} at {length}", unit=" batches", disable=not accelerator.is_main_process):
        with torch.no_grad():
            logits = model(input_ids=batch["ids"], use_cache=False).logits[:, top + prompt - 1 : -1].float()
        targets = batch["ids"][:, top + prompt :]
        likely = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
        hits = (logits.argmax(-1) == targets).float().mean(1)
        found.append(torch.stack(accelerator.gather_for_metrics((batch["distance"], batch["told"], likely, hits)), 1).cpu())
    table = torch.cat(found).double().numpy()
    out = []
    for distance in distances:
        told, untold = (table[(table[:, 0] == distance) & (table[:, 1] == said)] for said in (1, 0))
        gain = told[:, 2].mean() - untold[:, 2].mean()
        out.append({"distance": int(distance), "recall": float(told[:, 3].mean()), "gain": float(gain)})
    return out

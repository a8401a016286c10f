"""What a run leaves beside its weights: figures, the loss curve, the attention pattern, a model card."""

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, TrainerCallback

from .metrics import bits_per_token


class EvaluationCurve(TrainerCallback):
    """Collects the held-out loss, in bits per token, over the steps."""

    def __init__(self):
        self.points: list[dict[str, float]] = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics and "eval_loss" in metrics:
            self.points.append({"step": state.global_step, "bits": bits_per_token(metrics["eval_loss"])})


def write_json(path: Path, content) -> None:
    """Written beside and moved, so that a half-written file is never taken for a whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def plot_curves(curves: dict[str, list[dict[str, float]]], levels: dict[str, float], path: Path) -> None:
    """Held-out bits per byte against steps, one line a run, with horizontal lines for ``levels``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in curves.items():
        steps, bits = [point["step"] for point in points], [point["bits"] for point in points]
        (line,) = axes.plot(steps, bits, label=name)
        axes.annotate(f" {bits[-1]:.2f}", (steps[-1], bits[-1]), color=line.get_color(), va="center", fontsize=9)
    right = max(point["step"] for points in curves.values() for point in points)
    for name, level in levels.items():
        axes.axhline(level, color="0.6", linewidth=0.8, linestyle="--")
        axes.annotate(name, (right, level), ha="right", va="bottom", color="0.4", fontsize=8)
    axes.set(xlabel="step", ylabel="held-out bits per byte")
    axes.set_ylim(top=min(axes.get_ylim()[1], max(levels.values(), default=8) + 0.7))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def plot_attention(model: PreTrainedModel, tokens: torch.Tensor, path: Path) -> None:
    """Where each query looks, mean over layers and heads: the weight of every token, a summary's spread over its segment.

    tokens: ``(1, n)``; a few hundred, for the picture is n x n.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    config, n = model.config, tokens.shape[1]
    attentions = [layer for layer in model(tokens, output_attentions=True).attentions if layer is not None]
    total = torch.zeros(n, n)
    for weights in attentions:
        weights = weights[0].float().mean(0).cpu()
        total += weights[:, :n]
        column, width = n, config.block_size
        while n > 2 * width and weights.shape[1] > n:
            groups, segment = -(-n // width), width // config.rank
            spread = weights[:, column : column + groups * config.rank].repeat_interleave(segment, 1) / segment
            total += spread[:, :n]
            column, width = column + groups * config.rank, 2 * width
    figure, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    image = axes.imshow((total / len(attentions)).clamp(min=1e-6).log10(), cmap="magma", vmin=-5, vmax=0, interpolation="nearest")
    axes.set(xlabel="token looked at", ylabel="query")
    figure.colorbar(image, label="attention weight, log10", shrink=0.85)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_card(
    folder: Path, title: str, figures: dict[str, float], curve: list[dict[str, float]], command: str, images: dict[str, str]
) -> None:
    """README.md of a trained checkpoint: what it is, how to load it, the figures and the command that gave them."""
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    points = "\n".join(f"| {point['step']} | {point['bits']:.3f} |" for point in curve)
    pictures = "\n\n".join(f"![{name}]({file})" for name, file in images.items())
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["fast-multipole-attention", "hf_multipole"])
    text = f"""---
{data.to_yaml()}
---

# {title}

A language model with fast multipole attention ([arXiv 2310.11960](https://arxiv.org/abs/2310.11960)), trained with hf_multipole:

```
{command}
```

```python
import hf_multipole
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## Held-out files

| | bits per byte |
|---|---|
{rows}

{pictures}

## Curve

| step | held-out bits per byte |
|---|---|
{points}
"""
    ModelCard(text).save(folder / "README.md")

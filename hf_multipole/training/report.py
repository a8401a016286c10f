"""What a run leaves beside its weights: figures, the loss curve, the attention pattern, a model card."""

import math
import shlex
import time
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel


def curve(log_history: list[dict], causal: bool) -> list[dict[str, float]]:
    """The held-out figure over the steps, from Trainer's own log, which a run that goes on takes up again: bits per byte of a causal
    model, bits per masked token of a masked one.
    """
    points = {}
    for entry in log_history:
        if "eval_loss" in entry:
            bits = entry["eval_bits_per_byte"] if causal else entry["eval_loss"] / math.log(2)
            points[entry["step"]] = {"step": entry["step"], "bits": bits}
    return list(points.values())


def command(argv: list[str]) -> str:
    """The command line of this run, without its token."""
    shown, secret = [], False
    for part in argv:
        name, equals, _ = part.partition("=")
        names_token = name.lstrip("-").replace("-", "_") == "hub_token"
        shown.append("***" if secret else f"{name}=***" if names_token and equals else part)
        secret = names_token and not equals
    return "python " + shlex.join(shown)


def plot_curves(curves: dict[str, list[dict[str, float]]], levels: dict[str, float], path: Path, unit: str = "bits per byte") -> None:
    """Held-out bits per byte, or another ``unit``, against steps, one line a run, with horizontal lines for ``levels``."""
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
    axes.set(xlabel="step", ylabel=f"held-out {unit}")
    axes.set_ylim(top=min(axes.get_ylim()[1], max(levels.values(), default=8) + 0.7))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_positions(results: dict[str, dict], path: Path) -> None:
    """Mean loss against the position in the row, one line a name: ``by_position`` of :func:`.evaluation.measure`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, result in results.items():
        ranges = result["by_position"]
        axes.plot([(part["from"] + part["to"] - 1) / 2 + 1 for part in ranges], [part["loss"] for part in ranges], label=name)
    axes.set(xlabel="token in the row", ylabel="loss, nats a token", xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_reach(probes: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """Recall by context length and distance, a heat map for each probe, four side by side: kind, then context length, then points such
    as those of :func:`.evaluation.probe`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, lines = min(4, len(probes)), -(-len(probes) // 4)
    height = 1.6 + 0.5 * max(map(len, probes.values()))
    figure, plots = plt.subplots(lines, columns, figsize=(5.4 * columns, height * lines), squeeze=False)
    figure.set_layout_engine("constrained")
    for axes in plots.flat[len(probes) :]:
        axes.set_axis_off()
    for axes, (kind, contexts) in zip(plots.flat, probes.items()):
        distances = sorted({point["distance"] for points in contexts.values() for point in points})
        table = [[{p["distance"]: p["recall"] for p in points}.get(d, math.nan) for d in distances] for points in contexts.values()]
        image = axes.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set(xlabel="distance, tokens", ylabel="context", title=kind)
        axes.set_xticks(range(len(distances)), distances, rotation=90, fontsize=7)
        axes.set_yticks(range(len(contexts)), contexts)
    figure.colorbar(image, ax=plots.ravel().tolist(), label="recall")
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
    image = axes.imshow((total / len(attentions)).clamp(min=1e-6).log10().numpy(), cmap="magma", vmin=-5, vmax=0, interpolation="nearest")
    axes.set(xlabel="token looked at", ylabel="query")
    figure.colorbar(image, label="attention weight, log10", shrink=0.85)
    figure.savefig(path, dpi=150)
    plt.close(figure)


@torch.no_grad()
def measure_scaling(model: PreTrainedModel, longest: int) -> list[dict[str, float]]:
    """Seconds of a forward pass over one row, with the model's own attention and with exact attention on the same weights, for
    contexts up to ``longest`` tokens; the best of three.
    """
    own, device, out = model.config._attn_implementation, next(model.parameters()).device, []
    lengths = [longest >> halved for halved in range(4, -1, -1) if longest >> halved >= 16] or [longest]
    for length in lengths:
        ids, times = torch.randint(model.config.vocab_size, (1, length), device=device), {}
        for name, implementation in (("seconds", own), ("seconds_exact", "sdpa")):
            model.set_attn_implementation(implementation)
            durations = []
            for _ in range(4):
                start = time.perf_counter()
                model(ids, use_cache=False).logits.sum().item()
                durations.append(time.perf_counter() - start)
            # The first call may still have had to take memory.
            times[name] = min(durations[1:])
        out.append({"tokens": length} | times)
    model.set_attn_implementation(own)
    return out


def plot_scaling(times: list[dict[str, float]], path: Path) -> None:
    """Milliseconds of a forward pass against the context length: :func:`measure_scaling`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for name, label in (("seconds", "this model"), ("seconds_exact", "with exact attention")):
        axes.plot([point["tokens"] for point in times], [1000 * point[name] for point in times], marker="o", label=label)
    axes.set(xlabel="context, tokens", ylabel="forward pass, ms", xscale="log", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


CITATION = """@article{kang2023fast,
  title={Fast Multipole Attention: A Divide-and-Conquer Attention Mechanism for Long Sequences},
  author={Kang, Yanming and Tran, Giang and De Sterck, Hans},
  journal={arXiv preprint arXiv:2310.11960},
  year={2023}
}"""
LIMITS = (
    "A model of the text that it was trained on, with its errors and its prejudice; it was not tuned to follow instructions. "
    "Figures hold for the context length and the data that are given here."
)


def write_figures(path: Path, title: str, figures: str) -> None:
    """A report: what was measured, below the heading "Figures"; what someone wrote above it stays."""
    before = path.read_text().split("## Figures\n")[0] if path.is_file() else f"# {title}\n\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}## Figures\n{figures}")


def planned(configuration: Path) -> dict:
    """What :func:`write_card` takes, for a configuration that nobody has run yet."""
    values = yaml.safe_load(configuration.read_text())
    masked = "mlm_probability" in values
    overrides = values.pop("config_overrides", {})
    data = " ".join(filter(None, [values.get("dataset_name"), values.get("dataset_config_name")])) or values.get("train_file")
    return {
        "title": configuration.stem,
        "causal": not masked,
        "multipole": True,
        "code": True,
        "data": data,
        "dataset": values.get("dataset_name"),
        "configuration": overrides | {name: value for name, value in values.items() if name not in ("output_dir", "report_to")},
        "command": "accelerate launch --config_file configs/accelerate/multi_gpu.yaml "
        f"scripts/run_{'mlm' if masked else 'clm'}.py --config configs/{configuration.name}",
        "metrics": {},
        "baselines": {},
        "curve": [],
        "images": {},
    }


def write_card(path: Path, run: dict) -> None:
    """The model card of a trained checkpoint: what it is, how to load it, the figures and the command that gave them.

    run: title, causal, multipole (whether its attention is), code (whether it lies beside the weights), data (a sentence), dataset
    (name on the Hub or None), configuration (fields to list), command, metrics (final figures by name; empty for a run that nobody
    has made yet, and the card then says so), baselines (bits per byte by name), curve and images (file by name).
    """
    task, auto = ("text-generation", "AutoModelForCausalLM") if run["causal"] else ("fill-mask", "AutoModelForMaskedLM")
    unit = "bits per byte" if run["causal"] else "bits per masked token"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=run["dataset"] or "local",
            dataset_name=run["data"],
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=round(value, 4),
        )
        for name, value in run["metrics"].items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["hf_multipole", *(["fast-multipole-attention"] if run["multipole"] else [])],
        datasets=[run["dataset"]] if run["dataset"] else None,
        model_name=run["title"] if results else None,
        eval_results=results or None,
    )
    measured = bool(results)
    figures = {"this model": run["metrics"]["bits_per_byte"]} | run["baselines"] if run["causal"] and measured else {}
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    others = "\n".join(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in run["metrics"].items() if name != "bits_per_byte")
    table = (f"| | bits per byte |\n|---|---|\n{rows}\n\n" if rows else "") + f"| this model | |\n|---|---|\n{others}"
    if not measured:
        table = "Not measured: nobody has run this configuration yet. The command above does, and writes a card with its figures."
    points = "\n".join(f"| {point['step']} | {point['bits']:.3f} |" for point in run["curve"])
    fields = "\n".join(f"| {name} | {value} |" for name, value in run["configuration"].items())
    pictures = "\n\n".join(f"![{name}]({file})" for name, file in run["images"].items())
    history = f"## Curve\n\n| step | held-out {unit} |\n|---|---|\n{points}\n\n" if points else ""
    pictures = pictures and pictures + "\n\n"
    code = "Without hf_multipole installed, `trust_remote_code=True` runs the code that lies beside the weights.\n\n" if run["code"] else ""
    kind = f"A {'language' if run['causal'] else 'masked language'} model"
    kind += " with fast multipole attention ([arXiv 2310.11960](https://arxiv.org/abs/2310.11960))," if run["multipole"] else ""
    kind += " trained" if measured else " to be trained"
    text = f"""---
{data.to_yaml()}
---

# {run["title"]}

{kind} with hf_multipole on {run["data"]}:

```
{run["command"]}
```

```python
import hf_multipole
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{code}## Held-out text

{table}

{pictures}## Configuration

| | |
|---|---|
{fields}

{history}## Limits

{LIMITS}

## Citation

```bibtex
{CITATION}
```
"""
    ModelCard(text).save(path)

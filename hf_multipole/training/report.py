"""What a run leaves beside its weights, but for the pictures: the curve, times, a report, a model card."""

import math
import shlex
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch.utils.benchmark import Timer
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


@torch.no_grad()
def measure_scaling(model: PreTrainedModel, longest: int) -> list[dict[str, float]]:
    """Seconds of a forward pass over one row, with the model's own attention and with exact attention on the same weights, for
    contexts up to ``longest`` tokens: medians, after a first call.
    """
    own, device, out = model.config._attn_implementation, next(model.parameters()).device, []
    lengths = [longest >> halved for halved in range(4, -1, -1) if longest >> halved >= 16] or [longest]
    for length in lengths:
        ids, times = torch.randint(model.config.vocab_size, (1, length), device=device), {}
        for name, implementation in (("seconds", own), ("seconds_exact", "sdpa")):
            model.set_attn_implementation(implementation)
            known = {"model": model, "ids": ids}
            timer = Timer("model(ids, use_cache=False).logits.sum().item()", globals=known, num_threads=torch.get_num_threads())
            times[name] = timer.blocked_autorange(min_run_time=0.1).median
        out.append({"tokens": length} | times)
    model.set_attn_implementation(own)
    return out


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

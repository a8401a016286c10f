"""Model cards, from the templates in hf_multipole/templates."""

import shlex
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATES = Path(__file__).parents[1] / "templates"


def command(argv: list[str]) -> str:
    """The command line of this run, without its token."""
    shown, secret = [], False
    for part in argv:
        name, equals, _ = part.partition("=")
        names_token = name.lstrip("-").replace("-", "_") == "hub_token"
        shown.append("***" if secret else f"{name}=***" if names_token and equals else part)
        secret = names_token and not equals
    script = shown[0].endswith(".py") and not shown[0].endswith("__main__.py")
    return shlex.join(["python", *shown] if script else ["hf-multipole", *shown[1:]])


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
    task, auto_class = ("text-generation", "AutoModelForCausalLM") if run["causal"] else ("fill-mask", "AutoModelForMaskedLM")
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
    unit = "bits per byte" if run["causal"] else "bits per masked token"
    card = ModelCard.from_template(data, str(TEMPLATES / "trained.md.jinja"), auto_class=auto_class, unit=unit, **run)
    card.save(path)

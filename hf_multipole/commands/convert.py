"""Gives a checkpoint of a stock architecture another attention, and reports what that costs before it is trained."""

import argparse
import inspect
import math
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer

from ..integration.conversion import attention_modules, convert, is_chosen
from ..integration.measurement import layer_errors, loss
from ..modeling.options import MultipoleOptions, fields_of
from ..training.cards import TEMPLATES, command
from ..training.checkpoints import write_json
from ..training.errors import load, told_in_a_line
from ..training.figures import OTHERS, figure


def prepare(args: argparse.Namespace):
    """Model, tokenizer and tokens (None where nothing is measured); raises before any work is done."""
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output {args.output} is there already; name a new folder")
    text = args.text and args.text.read_text(encoding="utf-8")
    config = load("checkpoint", args.model, AutoConfig.from_pretrained)
    # The class of the checkpoint, so that its head stays.
    name = (config.architectures or ["none"])[0]
    if not hasattr(transformers, name):
        raise ValueError(f"{args.model} is a checkpoint of {name}, which is not an architecture of Transformers")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = getattr(transformers, name).from_pretrained(args.model).eval()
    if model.main_input_name != "input_ids":
        raise ValueError(f"{name} does not take text, so that no errors can be measured; call hf_multipole.convert")
    broken = [key for key, x in model.named_parameters() if not torch.isfinite(x).all()]
    if broken:
        raise ValueError(f"{args.model} has weights that are not finite: {broken[0]}")
    # Everything that convert refuses is refused here, on the model's shape alone.
    with torch.device("meta"):
        shape = type(model)(AutoConfig.from_pretrained(args.model))
    convert(shape, **options_of(args))
    return model, tokenizer, None if text is None else read(text, tokenizer, model.config, args)


def read(text: str, tokenizer, config, args) -> torch.Tensor:
    """The first tokens of the text, ``(1, n)``."""
    count = min(args.tokens, getattr(config, "max_position_embeddings", args.tokens))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :count]
    if ids.shape[1] <= 2 * args.block_size:
        raise ValueError(
            f"{args.text} gives {ids.shape[1]} tokens, but up to {2 * args.block_size} multipole attention is exact: give more"
        )
    return ids


def options_of(args) -> dict:
    """What was given, for convert."""
    names = inspect.signature(convert).parameters.keys() - {"model"}
    return {name: x for name, x in vars(args).items() if name in names and x is not None}


def measure(model, ids, args) -> list[dict]:
    """A row for each layer: its error, and for causal models the bits a token with it alone converted."""
    # What counts without anything learned: the options of the operator.
    given = {name: getattr(args, name, None) for name in fields_of("operator", MultipoleOptions)}
    sizes = {name: value for name, value in given.items() if value is not None}
    errors = layer_errors(model, ids, [sizes], args.kind)[0]
    exact = model.config._attn_implementation
    rows = [{"layer": "all exact", "bits": loss(model, ids, exact) / math.log(2)}] if model.can_generate() else []
    modules = [(name, module) for name, module in attention_modules(model).items() if is_chosen(module)]
    for name, module in tqdm(modules, desc="layers", unit="layer"):
        row = {"layer": getattr(module, "layer_idx", None), "module": name, "error": errors[name]}
        if model.can_generate() and row["layer"] is not None:
            row["bits"] = loss(model, ids, args.kind, sizes | {"layers": [row["layer"]]}) / math.log(2)
        rows.append(row)
    if model.can_generate():
        rows.append({"layer": "all multipole", "bits": loss(model, ids, args.kind, sizes) / math.log(2)})
    return rows


def plot(rows: list[dict], tolerance: float, path: Path) -> None:
    layers = [row for row in rows if "error" in row]
    with figure(path, size=(max(4, 0.3 * len(layers) + 2), 3)) as (_, ((axes,),)):
        colours = [OTHERS[row["error"] > tolerance] for row in layers]
        axes.bar(range(len(layers)), [row["error"] for row in layers], color=colours)
        axes.axhline(tolerance, color="0.5", linewidth=0.8, linestyle="--")
        axes.set(xlabel="layer", ylabel="error of the attention output", title="What conversion changes, untrained")


def report(rows: list[dict], args, tokens: int) -> str:
    def cell(row, name):
        return f"{row[name]:.3f}" if name in row else ""

    lines = ["| layer | error of its attention output | bits a token with it alone multipole |", "|---|---:|---:|"]
    lines += [
        f"| {row['layer'] if row['layer'] is not None else row['module']} | {cell(row, 'error')} | {cell(row, 'bits')} |" for row in rows
    ]
    over = [row["layer"] for row in rows if row.get("error", 0) > args.tolerance]
    kept = [row["layer"] for row in rows if row.get("error", args.tolerance + 1) <= args.tolerance]
    if not over:
        advice = f"No layer has an error over {args.tolerance}: nothing needs to stay exact."
    elif None in over:
        advice = f"{len(over)} layers have an error over {args.tolerance}, but this architecture has no layer numbers to choose by."
    else:
        advice = (
            f"Suggestion: leave exact, until they are trained, the layers with an error over {args.tolerance}: {', '.join(map(str, over))}"
        )
        advice += f" (`--layers {' '.join(map(str, kept))}`)." if kept else ", which are all: train before use."
    return f"On the first {tokens} tokens of `{args.text.name}`, with untrained summaries:\n\n" + "\n".join(lines) + f"\n\n{advice}\n"


# Of each kind: its attention, the paper, and what is learned.
_WORDS = {
    "multipole": ("fast multipole attention", "2310.11960", "learned summaries"),
    "multipole_linear": ("fast multipole attention in its O(n) form", "2310.11960", "learned summaries"),
    "tensor": ("tensor attention", "2310.04064", "tensor branches"),
}


def card(args, class_name: str, text: str) -> ModelCard:
    attention, paper, learned = _WORDS[args.kind]
    tag = "tensor-attention" if args.kind == "tensor" else "fast-multipole-attention"
    data = ModelCardData(library_name="transformers", tags=[tag, "hf_multipole"])
    words = {"title": args.output.name, "source": args.model, "class_name": class_name, "report": text, "command": command(sys.argv)}
    return ModelCard.from_template(data, str(TEMPLATES / "converted.md.jinja"), attention=attention, paper=paper, learned=learned, **words)


def run(args: argparse.Namespace) -> None:
    with told_in_a_line(args.program, RuntimeError):
        model, tokenizer, ids = prepare(args)
    text, record = "Its gates are 0: until it is trained, it computes what the checkpoint does.\n", {}
    if ids is not None:
        rows = measure(model, ids, args)
        text, record = report(rows, args, ids.shape[1]), {"tokens": ids.shape[1], "layers": rows}
    print(text)

    convert(model, **options_of(args))
    # Beside it, and moved: a half-written checkpoint is never taken for a whole one.
    part = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    write_json(part / "conversion.json", {"options": model.config.multipole} | record)
    if ids is not None and find_spec("matplotlib"):
        plot(rows, args.tolerance, part / "conversion.png")
        text += "\n![error by layer](conversion.png)\n"
    card(args, type(model).__name__, text).save(part / "README.md")
    if args.output.exists():
        args.output.rmdir()  # it is empty
    part.rename(args.output)
    print(f"wrote {args.output}")

"""What a converted model is worth: a small Llama is trained with exact attention, converted, and trained on.

    python -m scripts.studies.conversion --output runs/conversion --report model_cards/reports/conversion.md

All arms start from the same exact checkpoint and take the same further steps over the same rows in the same order. Each has a folder
of its own: one that is complete is not run again, and one that was interrupted goes on from its last checkpoint.
"""

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_multipole import convert
from hf_multipole.integration.measurement import layer_errors, with_attention
from hf_multipole.training.checkpoints import write_json
from hf_multipole.training.data import first_files, pack, standard_library
from hf_multipole.training.figures import OTHERS, figure, label_ends
from scripts.common.measuring import machine
from scripts.common.reports import command, table, write_beside, write_figures

CONTEXT, LONG = 1024, 4096
EVALUATED = 2**18  # held-out bytes that each figure is measured on
# A far field that starts low does not drown the near one before its summaries mean something.
SIZES = {"block_size": 64, "rank": 4, "far_bias_init": -2.0, "sink_tokens": 4}
NEAR_ONLY = SIZES | {"summary": "mean", "far_bias_init": -1e4}
NO_SINKS = {"sink_tokens": 0}
# name: how the exact checkpoint is converted, which parameters are trained then, and how fast
ARMS = {
    "exact": (None, "all", 1e-3),
    "multipole, all weights": (SIZES, "all", 1e-3),
    "multipole with saliency, all weights": (SIZES | {"saliency": True}, "all", 1e-3),
    "multipole without sinks, all weights": (SIZES | NO_SINKS, "all", 1e-3),
    "multipole, summaries alone": (SIZES, "far field", 3e-3),
    "multipole with saliency, summaries alone": (SIZES | {"saliency": True}, "far field", 3e-3),
    "near field and sinks only, all weights": (NEAR_ONLY, "model", 1e-3),
}
BLOCK_SIZES, RANKS = (16, 32, 64, 128), (1, 2, 4, 8, 16)


def new_model() -> LlamaForCausalLM:
    sizes = dict(vocab_size=384, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4)
    # A narrow model needs wide weights.
    return LlamaForCausalLM(
        LlamaConfig(**sizes, max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.1, attn_implementation="sdpa")
    )


@torch.no_grad()
def evaluate(model, held_out: torch.Tensor, contexts=(CONTEXT, LONG)) -> dict[str, float]:
    """Bits per byte at each context length."""
    model.eval()
    out = {}
    for context in contexts:
        losses = [model(rows, labels=rows, use_cache=False).loss.item() for rows in held_out.view(-1, context).split(2 * LONG // context)]
        out[str(context)] = sum(losses) / len(losses) / math.log(2)
    return out


def train(model, rows, folder: Path, steps: int, rate: float, seed: int) -> list[float]:
    """Trains with Trainer, from its last checkpoint where there is one; returns the training loss, in bits, every 20 steps."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=min(50, steps // 4),
        adam_beta2=0.95,
        weight_decay=0.01,
        save_steps=200,
        save_total_limit=1,
        logging_steps=20,
        report_to="none",
        dataloader_pin_memory=False,
        seed=seed,
    )
    collator = DataCollatorForLanguageModeling(ByT5Tokenizer(), mlm=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    last = get_last_checkpoint(folder / "trainer") if (folder / "trainer").is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return [entry["loss"] / math.log(2) for entry in trainer.state.log_history if "loss" in entry]


def run_arm(name: str, base: Path, folder: Path, rows, held_out, steps: int, seed: int) -> dict:
    if not (folder / "figures.json").is_file():
        options, trained, rate = ARMS[name]
        model = AutoModelForCausalLM.from_pretrained(base)
        if options is not None:
            convert(model, **options)
        for key, parameter in model.named_parameters():
            parameter.requires_grad = trained == "all" or (trained == "far field") == (".far_field." in key)
        curve = train(model, rows, folder, steps, rate, seed)
        model.save_pretrained(folder)
        write_json(folder / "figures.json", {"bits_per_byte": evaluate(model, held_out), "curve": curve})
    return json.loads((folder / "figures.json").read_text())


def untrained(base: Path, held_out, path: Path) -> dict:
    """Means in place of learned summaries, for all block sizes and ranks: bits per byte, and the error of the attention output."""
    if not path.is_file():
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        settings = [{"block_size": m, "rank": p} for m in BLOCK_SIZES for p in RANKS if p <= m // 2]
        errors = layer_errors(model, held_out[: 4 * CONTEXT].view(-1, CONTEXT), settings)
        grid = []
        for options, found in zip(tqdm(settings, desc="untrained", unit="setting"), errors):
            with with_attention(model, "multipole", options):
                bits = evaluate(model, held_out[: 64 * CONTEXT], (CONTEXT,))[str(CONTEXT)]
            grid.append({name: options[name] for name in ("block_size", "rank")} | {"bits": bits, "errors": list(found.values())})
        exact = evaluate(model, held_out[: 64 * CONTEXT], (CONTEXT,))[str(CONTEXT)]
        chosen = {}
        plain = SIZES | {"far_bias_init": None}
        ways = {"multipole": plain, "multipole without sinks": plain | NO_SINKS}
        ways |= {"near field and sinks only": NEAR_ONLY, "near field only": NEAR_ONLY | NO_SINKS}
        for name, options in ways.items():
            chosen[f"{name}, untrained"] = evaluate(
                convert(AutoModelForCausalLM.from_pretrained(base), **{"summary": "mean"} | options), held_out
            )
        write_json(path, {"exact": exact, "grid": grid, "chosen": chosen})
    return json.loads(path.read_text())


def plot(arms: dict, grid: list[dict], path: Path) -> None:
    from matplotlib import colormaps

    with figure(path, 2, 1, (12, 4)) as (_, ((left, right),)):
        # Most are one method, whose shades would be too many to tell apart.
        for name, colour in zip(arms, OTHERS):
            curve = arms[name]["curve"]
            left.plot([20 * (i + 1) for i in range(len(curve))], curve, color=colour, label=name)
        left.set(xlabel="steps after the conversion", ylabel="bits per byte", title="Training loss after the conversion")
        for i, block_size in enumerate(BLOCK_SIZES):
            points = [(row["rank"], sum(row["errors"]) / len(row["errors"])) for row in grid if row["block_size"] == block_size]
            right.plot(*zip(*points), marker="o", color=colormaps["viridis"](0.85 * i / len(BLOCK_SIZES)), label=f"block size {block_size}")
        right.set(yscale="log", xlabel="rank", ylabel="relative error", title="Attention output with means, untrained: error")
        right.set_xscale("log", base=2)
        for axes in (left, right):
            label_ends(axes)


def report(args, base: dict, arms: dict, means: dict, picture: str) -> str:
    rows = {f"exact, {args.steps} steps": base["bits_per_byte"]} | means["chosen"]
    rows |= {f"{name}, {args.further_steps} steps more": figures["bits_per_byte"] for name, figures in arms.items()}
    figures = [[name, f"{bits[str(CONTEXT)]:.3f}", f"{bits[str(LONG)]:.3f}"] for name, bits in rows.items()]
    exact, multipole, near = (arms[name]["bits_per_byte"][str(CONTEXT)] for name in [*ARMS][:2] + [*ARMS][-1:])
    head = ["block size", "rank", "bits per byte", "against exact", *(f"layer {i}" for i in range(len(means["grid"][0]["errors"])))]
    grid = [
        [str(row["block_size"]), str(row["rank"]), f"{row['bits']:.3f}", f"{100 * (row['bits'] / means['exact'] - 1):+.1f} %"]
        + [f"{error:.2f}" for error in row["errors"]]
        for row in means["grid"]
    ]
    return f"""
A Llama of 4 layers of width 128 was trained with exact attention on the source text of Python's standard library, byte by byte, with a
context of {CONTEXT}: {args.steps} steps of 8 rows. Its checkpoint was then converted with `block_size` {SIZES["block_size"]},
`rank` {SIZES["rank"]}, a far bias from {SIZES["far_bias_init"]} and {SIZES["sink_tokens"]} sinks, and trained for
{args.further_steps} steps more, as was the exact model, over the same rows.

```bash
{command()}
```

Bits per byte on {EVALUATED:,} held-out bytes, one seed:

{table(["", f"context {CONTEXT:,}", f"context {LONG:,}"], figures)}

At the trained context the fine-tuned multipole model is {100 * (multipole / exact - 1):+.2f} % from the exact one. What exact attention
gains over near field and sinks alone ({near:.3f} to {exact:.3f}) is what the far context is worth here; the {near - multipole:.3f} that
multipole attention gains are of one seed, and too little to be told from chance. No model was trained beyond {CONTEXT:,} positions: at
{LONG:,} rotary angles are new to all of them, and multipole attention leaves out the levels of groups that training never had.
Training losses (left) are of rows that the first training has partly seen.

![training after the conversion, and the error of untrained means]({picture})

### Without training

Means in place of learned summaries (`attn_implementation="multipole"` on the exact checkpoint), on {64 * CONTEXT:,} bytes: bits per byte
(exact: {means["exact"]:.3f}), and the relative error of the attention output of each layer.

{table(head, grid, 0)}

A drop-in without training is sane where the blocks are so wide that little lies outside of the near field. Otherwise train: keys that
were rotated by their positions do not average well, and untrained summaries are a little worse than the near field alone.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--report", type=Path, required=True, help="Markdown file to write, with a picture under images/ beside it")
    parser.add_argument("--steps", type=int, default=1600, help="steps with exact attention, before the conversion")
    parser.add_argument("--further-steps", type=int, default=300, help="steps after it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    training, held_out = standard_library()
    rows = pack(ByT5Tokenizer(), training, CONTEXT)
    held_out = torch.tensor(pack(ByT5Tokenizer(), first_files(held_out, EVALUATED), EVALUATED, 1)[0]["input_ids"])

    base = args.output / "base"
    if not (base / "figures.json").is_file():
        set_seed(args.seed)
        model = new_model()
        curve = train(model, rows, base, args.steps, 3e-3, args.seed)
        model.save_pretrained(base)
        write_json(base / "figures.json", {"bits_per_byte": evaluate(model, held_out), "curve": curve})
    means = untrained(base, held_out, args.output / "untrained.json")
    arms = {
        name: run_arm(
            name, base, args.output / name.replace(", ", "-").replace(" ", "-"), rows, held_out, args.further_steps, args.seed + 1
        )
        for name in ARMS
    }
    picture = Path("images") / f"{args.report.stem}.png"
    (args.report.parent / "images").mkdir(parents=True, exist_ok=True)
    if find_spec("matplotlib"):
        plot(arms, means["grid"], args.report.parent / picture)
    figures = json.loads((base / "figures.json").read_text())
    write_beside(args.report, {"command": command(), "machine": machine(), "base": figures, "arms": arms, "untrained": means})
    write_figures(args.report, "Conversion of a small Llama", report(args, figures, arms, means, picture.as_posix()))
    print(f"wrote {args.report}")


if __name__ == "__main__":
    main()

"""What the far field carries in a trained causal model: how much attention each level gets in each layer, and what is lost without it.

    python -m scripts.studies.ablations --models runs/quickstart --folder stdlib --output runs/ablations

"Weight": of a level's summaries, in the mean over heads, rows and the queries of the second half of the context. "Lost": how many bits
a byte more the model needs on held-out text while that level, that layer or all of the far field is silenced (a far bias of -10,000),
without further training. Needs a model with a far bias. Writes ablations.json, ablations.md and a picture.
"""

import argparse
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_multipole import MultipoleForCausalLM
from hf_multipole.modeling.hierarchy import group_count, level_count
from hf_multipole.training.arguments import DataArguments
from hf_multipole.training.batches import collate
from hf_multipole.training.data import load_texts, pack, spread
from hf_multipole.training.errors import BAD_INPUT, fail
from hf_multipole.training.evaluation import measure
from hf_multipole.training.figures import figure
from scripts.common.measuring import machine
from scripts.common.reports import command, table, write_beside

SILENT = -1e4


def far_fields(model) -> dict[int, torch.nn.Module]:
    """Those with a far bias, by the number of their layer."""
    found = {i: getattr(layer.self_attn, "far_field", None) for i, layer in enumerate(model.model.layers)}
    return {i: x for i, x in found.items() if x is not None and getattr(x, "far_bias", None) is not None}


@contextmanager
def silenced(model, layer: int | None = None, level: int | None = None):
    """Without the far field of a layer, or of all; of it a level (1, ...), or all."""
    biases = [x.far_bias for i, x in far_fields(model).items() if layer in (None, i)]
    before = [bias.detach().clone() for bias in biases]
    for bias in biases:
        bias.data[:, slice(None) if level is None else level - 1] = SILENT
    try:
        yield
    finally:
        for bias, kept in zip(biases, before):
            bias.data.copy_(kept)


@torch.no_grad()
def weights(model, rows) -> dict[int, list[float]]:
    """Of each layer with a far field, the share of attention that goes to each level."""
    config, n = model.config, len(rows[0]["input_ids"])
    levels = level_count(n, config.block_size)
    sizes = [n, *(group_count(n, config.block_size, level + 1) * config.rank for level in range(levels))]
    total = {i: torch.zeros(levels) for i in far_fields(model)}
    for row in rows:
        attentions = model(torch.tensor([row["input_ids"]]), use_cache=False, output_attentions=True).attentions
        for i, found in total.items():
            seen = attentions[i][0, :, n // 2 :].split(sizes, -1)
            found += torch.stack([x.sum(-1).mean() for x in seen[1:]]) / len(rows)
    return {i: found.tolist() for i, found in total.items()}


def study(path: str, o) -> dict:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="multipole").eval()
    if not isinstance(model, MultipoleForCausalLM) or not far_fields(model):
        raise ValueError(f"{path} has no far bias to silence: it needs a MultipoleForCausalLM with far_bias_init")
    levels = level_count(o.context, model.config.block_size)
    most = min(x.far_bias.shape[1] for x in far_fields(model).values())
    if not 0 < levels <= most:
        raise ValueError(f"--context {o.context} has {levels} far levels, but the far biases of {path} are of levels 1 to {most}")
    training, held_out = load_texts(DataArguments(train_folder=o.folder, train_file=o.file, context_length=o.context))
    rows = spread(pack(AutoTokenizer.from_pretrained(path), training if held_out is None else held_out, o.context), o.rows, "held-out")
    accelerator = Accelerator(cpu=True)

    def bits(name: str, **what) -> float:
        with silenced(model, **what):
            return measure(model, rows, collate, accelerator, 1, True, name)["bits_per_byte"]

    whole = measure(model, rows, collate, accelerator, 1, True, "whole")["bits_per_byte"]
    found = weights(model, rows.select(range(min(4, o.rows))))
    return {
        "model": path,
        "bits_per_byte": whole,
        "weights": found,
        "without_all": bits("no far field") - whole,
        "without_layer": {i: bits(f"layer {i}", layer=i) - whole for i in found},
        "without_level": [bits(f"level {level}", level=level) - whole for level in range(1, levels + 1)],
    }


def markdown(records: list[dict]) -> str:
    parts = []
    for record in records:
        levels = len(record["without_level"])
        rows = [
            *(
                [str(i), *(f"{100 * x:.2f}" for x in found), f"{100 * sum(found):.1f}", f"{record['without_layer'][i]:+.4f}"]
                for i, found in record["weights"].items()
            ),
            ["lost", *(f"{x:+.4f}" for x in record["without_level"]), "", f"{record['without_all']:+.4f}"],
        ]
        found = table(["layer", *(f"level {i + 1}" for i in range(levels)), "far, %", "lost without it"], rows, 0)
        parts.append(f"{record['model']}: {record['bits_per_byte']:.4f} bits per byte; weights in per cent\n\n{found}\n")
    return "\n".join(parts)


def draw(records: list[dict], path: Path) -> None:
    size = (5 * len(records), 3.4)
    with figure(path, len(records), 1, size, "Attention to the summaries of each level, % of a query's") as (picture, (plots,)):
        for axes, record in zip(plots, records):
            shares = torch.tensor(list(record["weights"].values()))
            image = axes.imshow(100 * shares, aspect="auto", cmap="viridis")
            axes.set(xlabel="level", ylabel="layer", title=record["model"])
            axes.set_xticks(range(shares.shape[1]), range(1, shares.shape[1] + 1))
            axes.set_yticks(range(len(shares)), record["weights"])
            picture.colorbar(image, ax=axes)


def parse(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", required=True, help="causal multipole checkpoints")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", help="folder of Python source text, or stdlib, of which some files are held out")
    source.add_argument("--file", nargs="+", help="text, JSON, CSV or Parquet files: all of it")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=16, help="spread over the text")
    parser.add_argument("--output", type=Path, required=True, help="folder for what was found")
    o = parser.parse_args(arguments)
    for name in ("context", "rows"):
        if getattr(o, name) < 1:
            sys.exit(f"ablations.py: --{name} is {getattr(o, name)}, but must be positive")
    return o


def main(arguments: list[str]) -> None:
    o = parse(arguments)
    try:
        records = [study(path, o) for path in o.models]
    except BAD_INPUT as error:
        fail("ablations.py", error)
    o.output.mkdir(parents=True, exist_ok=True)
    write_beside(o.output / "ablations.md", {"command": command(), "machine": machine(), "models": records})
    (o.output / "ablations.md").write_text(text := markdown(records))
    if find_spec("matplotlib"):
        draw(records, o.output / "ablations.png")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Trains small models of equal size to find again what stood at a distance, one for each task and kind of attention, and measures how
far back each one reaches, on rows as long as those of training and longer ones.

    python -m scripts.studies.recall --output runs/recall --report model_cards/reports/recall.md
    python -m scripts.studies.recall --output runs/recall --tasks needle --kinds multipole    # some of it, perhaps beside others

Each model that is trained, and each length that it is measured at, leaves a file in the folder and is not done again; what was
interrupted starts anew. The report is on all that the folder holds; what stands in it above the heading "Figures" is left as it is.
"""

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import get_cosine_with_min_lr_schedule_with_warmup, set_seed

from hf_multipole import MultipoleConfig, MultipoleForCausalLM, token_masses
from hf_multipole.training.checkpoints import write_json
from hf_multipole.training.figures import plot_masses, plot_reach
from scripts.common import peers
from scripts.common.measuring import machine
from scripts.common.reports import table, write_beside, write_figures
from scripts.studies.recall_tasks import NEEDLES, NOISE, PASSAGE, TASKS, VALUES, VOCABULARY, distances, draw, item_counts

BLOCK_SIZE, RANK, LAYERS = 32, 4, 2
BRIDGED = 2 * BLOCK_SIZE * LAYERS  # tokens: further than near fields reach, one on top of the other
EXACT = {"layer_types": ["full_attention"] * LAYERS}


class Kind(NamedTuple):
    options: dict  # of MultipoleConfig
    implementation: str | None = None  # of attention, where it is a peer's


KINDS = {
    "full attention": Kind(EXACT),
    "near field only": Kind({"summary": "mean", "far_bias_init": -10000.0}),
    "multipole": Kind({"far_bias_init": 0.0}),
    "multipole, means": Kind({"far_bias_init": 0.0, "summary": "mean"}),
    "multipole, hierarchical and saliency": Kind({"far_bias_init": 0.0, "saliency": True}),
    "multipole, means and saliency": Kind({"far_bias_init": 0.0, "saliency": True, "summary": "mean"}),
    # Two tokens in a summary of the first level instead of eight.
    "multipole, rank 16": Kind({"far_bias_init": 0.0, "rank": 16, "summary": "mean"}),
    "multipole, O(n)": Kind({"far_bias_init": 0.0, "layer_types": ["multipole_linear_attention"] * LAYERS}),
    "multipole, then full attention": Kind({"far_bias_init": 0.0, "layer_types": ["multipole_attention", "full_attention"]}),
    "linear attention": Kind(EXACT, "peer_linear"),
    "h-transformer-1d": Kind(EXACT, "peer_h_transformer_1d"),
}
POOL = 10  # batches drawn at once
POINTS = 20  # of a curve
# What the report says of them, and the symbols that an answer is one of.
ASKED = {
    "copy": f"passages of {PASSAGE} tokens after a marker; asked for the marker, the model gives the passage, token by token",
    "needle": "tokens hold a key and a value each; asked for a key, the model gives the value",
    "induction": "pairs of symbols like those of the noise; asked for the first, the model gives the second",
}
SYMBOLS = {"copy": PASSAGE, "needle": VALUES, "induction": NOISE}
LOADS = (1, 4, 16)  # needles in a row that holds nothing else


# Models


def options_of(kind: str, settings: dict) -> dict:
    hidden_size = settings["hidden_size"]
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": settings["heads"],
        "max_position_embeddings": settings["train_lengths"][-1],
        "block_size": BLOCK_SIZE,
        "rank": RANK,
        "saliency": False,
        # A narrow model needs wide weights.
        "initializer_range": hidden_size**-0.5,
    } | KINDS[kind].options


def new_model(kind: str, settings: dict) -> MultipoleForCausalLM:
    """The MLP is as wide as gives every kind the parameters of the largest, in which it is as wide as the model."""

    def build(kind, width):
        model = MultipoleForCausalLM(MultipoleConfig(**options_of(kind, settings), intermediate_size=width))
        if KINDS[kind].implementation:
            model.set_attn_implementation(KINDS[kind].implementation)
        return model

    hidden_size = settings["hidden_size"]
    missing = build("multipole", hidden_size).num_parameters() - build(kind, 1).num_parameters()
    return build(kind, 1 + round(missing / (3 * LAYERS * hidden_size)))


def answers(model, ids: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The logits of the answers ``(answers, vocabulary)``, the answers and their distances."""
    there = asked[:, 1:] > 0
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    return model.lm_head(hidden[there]), *(x[:, 1:][there] for x in (ids, asked))


# One run


class Run(NamedTuple):
    task: str
    kind: str
    seed: int

    def __str__(self):
        return f"{self.task}, {self.kind}, seed {self.seed}"

    def folder(self, output: Path) -> Path:
        return output / f"{self.task}-{self.kind.replace(',', '').replace(' ', '-')}-{self.seed}"


def rows_of(task: str, count: int, n: int, generator: torch.Generator, items: int | None = None, measured: bool = False):
    """Rows of one task, with as many items as rows of this length have, and the distances of their answers, as from :func:`draw`."""
    return draw(count, n, generator, {task: item_counts(n)[task] if items is None else items}, measured)[:2]


def stages(settings: dict) -> list[tuple[int, int]]:
    """Row lengths and steps, the short rows first."""
    return list(zip(settings["train_lengths"], settings["steps"]))


def examples(task: str, seed: int, settings: dict):
    """Batches, the same for every kind: as many tokens in each."""
    generator = torch.Generator().manual_seed(seed)
    for n, steps in stages(settings):
        count = max(1, settings["batch_tokens"] // n)
        for start in range(0, steps, POOL):
            drawn = rows_of(task, POOL * count, n, generator)
            yield from itertools.islice(zip(*(x.split(count) for x in drawn)), steps - start)


def train(run: Run, settings: dict) -> tuple[MultipoleForCausalLM, dict]:
    """The trained model; parameters, seconds of processor time, and a curve of the recall beyond all near fields on rows of training."""
    set_seed(run.seed)
    accelerator = Accelerator()
    model = new_model(run.kind, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.99), weight_decay=0.0)
    steps = sum(settings["steps"])
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, min(100, steps // 4), steps, min_lr_rate=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    every, curve, hits = max(1, steps // POINTS), [], []
    start = time.process_time()
    bar = tqdm(examples(run.task, run.seed, settings), str(run), steps, mininterval=1)
    for step, batch in enumerate(bar, 1):
        logits, wanted, distance = answers(model, *(x.to(accelerator.device) for x in batch))
        loss = F.cross_entropy(logits, wanted)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        hits.append((logits.argmax(-1) == wanted)[distance > BRIDGED])
        if step % every == 0 or step == steps:
            share = torch.cat(hits).float().mean().item() if sum(map(len, hits)) else 0.0
            curve.append({"step": step, "tokens": batch[0].shape[1], "loss": loss.item(), "recall": share})
            bar.set_postfix(loss=f"{loss.item():.3f}", recall=f"{share:.3f}")
            hits = []
    figures = {"parameters": model.num_parameters(), "seconds": time.process_time() - start, "curve": curve}
    return accelerator.unwrap_model(model), figures


@torch.no_grad()
def recall(model, task: str, n: int, rows: int, items: int | None = None) -> list[dict]:
    """For each ``distance``: the share of answers that the model holds most likely, ``recall``, its standard ``error``
    over items (those of one passage are not independent), and how many ``items`` were asked for.
    """
    model.eval()
    device = next(model.parameters()).device
    found, size = {distance: [] for distance in distances(task, n)}, TASKS[task].asked - 1
    drawn = rows_of(task, rows, n, torch.Generator().manual_seed(2**31), items, measured=True)
    for row in tqdm(zip(*(x.split(1) for x in drawn)), f"{n} tokens", rows, mininterval=1, leave=False):
        logits, wanted, distance = (x.cpu() for x in answers(model, *(x.to(device) for x in row)))
        hits = (logits.argmax(-1) == wanted).double()
        # The answers to an item stand side by side.
        for at, share in zip(distance.view(-1, size)[:, 0].tolist(), hits.view(-1, size).mean(1).tolist()):
            found[at].append(share)
    return [point(at, shares) for at, shares in found.items() if shares]


def point(distance: int, shares: list[float]) -> dict:
    return {"distance": distance, "recall": statistics.mean(shares), "error": error(shares), "items": len(shares)}


def error(shares: list[float]) -> float:
    """Standard error of the mean; that of one more success and one more failure, since a few items may all be alike."""
    shares = [*shares, 0.0, 1.0]
    return statistics.pstdev(shares) / math.sqrt(len(shares))


def measure(model, task: str, n: int, settings: dict) -> dict:
    """Recall at a length, and of needles at the shortest one, how it depends on how much there is to keep."""
    start = time.process_time()
    rows = settings["rows"][settings["lengths"].index(n)]
    figures = {"rows": rows, "recall": recall(model, task, n, rows)}
    if task == "needle" and n == settings["lengths"][0]:
        figures["load"] = {str(items): recall(model, task, n, rows, items) for items in LOADS}
    return figures | {"seconds": time.process_time() - start}


def study(run: Run, folder: Path, lengths: list[int], settings: dict) -> None:
    """Trains and measures what the folder does not hold. The JSON files are written last: weights without one are not whole."""
    trained, weights, measured = folder / "training.json", folder / "weights.pt", {n: folder / f"recall-{n}.json" for n in lengths}
    for path in (trained, *measured.values()):
        if path.is_file() and json.loads(path.read_text())["settings"] != settings:
            sys.exit(f"{path} was made with other settings; name another --output")
    about = run._asdict() | {"settings": settings}
    folder.mkdir(parents=True, exist_ok=True)
    if not trained.is_file():
        model, figures = train(run, settings)
        torch.save(model.state_dict(), weights)
        write_json(trained, about | figures)
    missing = {n: path for n, path in measured.items() if not path.is_file()}
    if missing:
        model = new_model(run.kind, settings)
        model.load_state_dict(torch.load(weights, map_location="cpu"))
        model = model.to(Accelerator().device)
        for n, path in missing.items():
            write_json(path, about | {"tokens": n} | measure(model, run.task, n, settings))
            print(f"{run}: measured at {n} tokens", flush=True)


# The report


def results(output: Path) -> tuple[dict[Run, dict], dict[Run, dict[int, dict]]]:
    """Training, and what was measured by length, of each run in the order of TASKS and KINDS."""
    read = [json.loads(path.read_text()) for path in sorted(output.glob("*/*.json"))]
    order = list(TASKS), list(KINDS)
    read.sort(key=lambda x: (order[0].index(x["task"]), order[1].index(x["kind"]), x["seed"], x.get("tokens", 0)))
    if any(file["settings"] != read[0]["settings"] for file in read):
        sys.exit(f"the runs in {output} were made with different settings: report them from folders of their own")
    training, measured = {}, {}
    for file in read:
        run = Run(*(file[name] for name in Run._fields))
        if "tokens" in file:
            measured.setdefault(run, {})[file["tokens"]] = file
        else:
            training[run] = file
    return training, measured


def pooled(points: list[dict], low: int, high: int) -> str:
    """Recall at distances beyond ``low`` up to ``high``, in per cent, an item as good as another; its standard error."""
    inside = [p for p in points if low < p["distance"] <= high]
    items = sum(p["items"] for p in inside)
    if not items:
        return ""
    share = sum(p["recall"] * p["items"] for p in inside) / items
    return f"{100 * share:.0f} ± {100 * math.hypot(*(p['error'] * p['items'] for p in inside)) / items:.0f}"


def named(run: Run, seeds: set[int]) -> str:
    return run.kind if len(seeds) == 1 else f"{run.kind}, seed {run.seed}"


@torch.no_grad()
def draw_masses(run: Run, folder: Path, settings: dict, path: Path) -> None:
    """What the tokens of one row of needles weigh in a model that was trained."""
    model = new_model(run.kind, settings).eval()
    model.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu"))
    ids, _ = rows_of("needle", 1, settings["lengths"][0], torch.Generator().manual_seed(2**31), measured=True)
    masses = {f"layer {i}": x[0] for i, x in enumerate(token_masses(model, input_ids=ids).values())}
    plot_masses(masses, (ids[0] >= NOISE) & (ids[0] < NOISE + NEEDLES), path)


def report(output: Path, path: Path) -> str:
    training, measured = results(output)
    if not measured:
        sys.exit(f"--output {output} holds nothing that was measured: name some --kinds")
    settings, seeds = next(iter(training.values()))["settings"], {run.seed for run in training}
    lengths = settings["lengths"]
    edges = [0, BLOCK_SIZE, BRIDGED, *(n for n in lengths if n > BRIDGED)]
    bands = list(zip(edges, edges[1:]))
    parts = []
    tasks = [task for task in TASKS if any(run.task == task for run in measured)]
    for task in tasks:
        picture = Path("images") / f"{path.stem}-{task}.png"
        probes = {named(run, seeds): {str(n): file["recall"] for n, file in by.items()} for run, by in measured.items() if run.task == task}
        (path.parent / "images").mkdir(parents=True, exist_ok=True)
        if find_spec("matplotlib"):
            plot_reach(probes, path.parent / picture)
        rows = [
            [name, f"{int(n):,}", *(pooled(points, *band) for band in bands)] for name, by in probes.items() for n, points in by.items()
        ]
        head = ["attention", "row", *(f"{low + 1:,} to {high:,}" for low, high in bands)]
        parts.append(f"### {task.capitalize()}\n\n{table(head, rows)}\n\n![{task}]({picture.as_posix()})")
        shown = next((run for run in measured if task == "needle" and KINDS[run.kind].options.get("saliency")), None)
        if shown and find_spec("matplotlib") and (shown.folder(output) / "weights.pt").is_file():
            picture = Path("images") / f"{path.stem}-masses.png"
            draw_masses(shown, shown.folder(output), settings, path.parent / picture)
            parts.append(f"What the tokens of a row weigh ({named(shown, seeds)}):\n\n![masses of tokens]({picture.as_posix()})")
    runs = [
        [
            run.task,
            named(run, seeds),
            f"{file['parameters']:,}",
            f"{file['seconds']:,.0f}",
            f"{file['curve'][-1]['loss']:.2f}",
            f"{100 * file['curve'][-1]['recall']:.0f}",
        ]
        for run, file in training.items()
    ]
    loads = [
        [named(run, seeds), *(pooled(by[n]["load"][str(items)], BRIDGED, n) for items in LOADS)]
        for run, by in measured.items()
        for n in by
        if "load" in by[n]
    ]
    keeping = f"""### How much there is to keep

Needles in rows of {lengths[0]:,} tokens, further away than {BRIDGED} tokens, by their number:

{table(["attention", *map(str, LOADS)], loads)}
"""
    done = {run for run, by in measured.items() if set(lengths) <= set(by)}
    have = {(run.task, run.kind) for run in done}
    missing = [f"{kind} ({task})" for task in tasks for kind in KINDS if (task, kind) not in have]
    told = f"**Partial:** not, or not at all lengths, measured yet: {'; '.join(missing)}."
    partial = f"\n{textwrap.fill(told, 140)}\n" if missing else ""
    last = settings["train_lengths"][-1]
    return f"""
```bash
{command(output, path, settings, tasks)}
```
{partial}
Models of {LAYERS} layers, width {settings["hidden_size"]}, {settings["heads"]} heads, as many parameters in each (the MLP takes up the
difference), block size {BLOCK_SIZE}, rank {RANK}; the far bias starts at 0.
Trained on rows of {within(settings)} tokens, in this order,
{settings["batch_tokens"]:,} tokens a step, each task by a model of its own, the same rows for every kind; the loss is on the answers alone.
Measured on rows of {" and ".join(f"{n:,}" for n in lengths)} tokens. Tasks (`scripts/studies/recall_tasks.py`):

{chr(10).join(f"- {task}: up to {TASKS[task].items} {ASKED[task]}" for task in tasks)}

Recall is the share of answers that the model holds most likely, by the distance between both places, in per cent, with the standard error
over items, as if one more had been found and one more missed. {seeds_of(seeds)}.
Guesses within the right symbols: {", ".join(f"{task} {100 / SYMBOLS[task]:.1f} %" for task in tasks)}.
The near field of the multipole kinds holds {BLOCK_SIZE + 1} to {2 * BLOCK_SIZE} tokens, by the place of the query in its block: up to
{BLOCK_SIZE} back all of them see what is asked for, from {BRIDGED} on nothing but summaries has any of it.

### Training

Recall in the last twentieth of training, further away than {BRIDGED} tokens, on rows of {last:,} tokens:

{table(["task", "attention", "parameters", "CPU seconds", "loss", "recall"], runs)}

{(chr(10) * 2).join(parts)}

{keeping if loads else ""}"""


def seeds_of(seeds: set[int]) -> str:
    return f"Seed {min(seeds)}" if len(seeds) == 1 else f"Seeds {', '.join(map(str, sorted(seeds)))}"


def within(settings: dict) -> str:
    return ", then ".join(f"{n:,} ({steps:,} steps)" for n, steps in stages(settings))


# The command


SETTINGS = ("train_lengths", "steps", "batch_tokens", "lengths", "rows", "hidden_size", "heads", "learning_rate")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--report", type=Path, help="Markdown file to write, with pictures under images/ beside it")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="of attention; none to write the report alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train-lengths", type=int, nargs="+", default=[128, 512, 1024], help="tokens of a row, short rows first")
    parser.add_argument("--steps", type=int, nargs="+", default=[1500, 1000, 1500], help="for each of them")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="of rows to measure")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 32, 16, 8], help="for each of them")
    parser.add_argument("--only", type=int, nargs="+", help="of the lengths, to measure at now; all by default")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser


def parse(arguments):
    o = parser().parse_args(arguments)
    o.only = o.only or o.lengths
    # An item takes at most a third of a row of training; the longest has room at 15/16 of a row to be measured.
    least = {name: (3 * (task.kept + task.asked), 16 * task.asked) for name, task in TASKS.items() if name in o.tasks}
    trained, measured = map(max, zip(*least.values()))
    faults = [
        (len(o.steps) != len(o.train_lengths), f"--steps {o.steps} must be as many as --train-lengths {o.train_lengths}"),
        (len(o.rows) != len(o.lengths), f"--rows {o.rows} must be as many as --lengths {o.lengths}"),
        (min(o.train_lengths) < trained, f"--train-lengths {o.train_lengths} must be at least {trained}, to hold {', '.join(o.tasks)}"),
        (min(o.lengths) < measured, f"--lengths {o.lengths} must be at least {measured}, to hold {', '.join(o.tasks)}"),
        (not set(o.only) <= set(o.lengths), f"--only {o.only} must be among --lengths {o.lengths}"),
        (min(*o.steps, *o.rows, o.batch_tokens) < 1, "--steps, --rows and --batch-tokens must be positive"),
        (o.heads < 1 or o.hidden_size % (2 * o.heads) != 0, f"--hidden-size {o.hidden_size} must be a multiple of twice --heads {o.heads}"),
        (not o.learning_rate > 0, f"--learning-rate {o.learning_rate} must be positive"),
        (o.output.exists() and not o.output.is_dir(), f"--output {o.output} is a file; name a folder"),
    ]
    if any(wrong for wrong, _ in faults):
        sys.exit("\n".join(message for wrong, message in faults if wrong))
    return o


def command(output: Path, path: Path, settings: dict, tasks: list[str]) -> str:
    """The command line of these runs and of this report."""
    parts = ["python", "-m", "scripts.studies.recall", "--output", str(output)]
    parts += ["--tasks", *tasks] if tasks != list(TASKS) else []
    for name, value in settings.items():
        if value != parser().get_default(name):
            parts += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*parts, "--report", str(path)])


def main(arguments) -> None:
    o = parse(arguments)
    settings = {name: getattr(o, name) for name in SETTINGS}
    peers.register()
    for seed, task, kind in itertools.product(o.seeds, o.tasks, o.kinds):
        run = Run(task, kind, seed)
        study(run, run.folder(o.output), o.only, settings)
    if o.report is not None:
        write_figures(o.report, "Recall: what small models find again, and how far back", report(o.output, o.report))
        runs = [json.loads(path.read_text()) for path in sorted(o.output.glob("*/*.json"))]
        write_beside(o.report, {"machine": machine(), "runs": runs})
        print(f"wrote {o.report}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Trains one-layer models of equal size on Match3 and Match2, one for each kind of attention, on the same examples.

    python -m scripts.studies.match3 --output runs/match3 --report model_cards/reports/match3.md
    python -m scripts.studies.match3 --output runs/match3 --kinds full tensor --seeds 0    # some of the runs, perhaps beside others

Each run leaves a file in the folder, and what has one is not run again. The report has the accuracy on held-out rows by kind of
attention, of all runs that the folder holds, and what the constructed solution of Match3 asks of the polynomial path.
"""

import argparse
import itertools
import json
import shlex
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import get_cosine_with_min_lr_schedule_with_warmup, set_seed

from hf_multipole import MultipoleConfig, MultipoleForTokenClassification
from hf_multipole.modeling.polynomial_attention import MAX_DEGREE, MAX_FEATURES
from hf_multipole.training.checkpoints import write_json
from hf_multipole.training.figures import colours, figure
from scripts.common.measuring import machine, timed
from scripts.common.reports import table, write_beside
from scripts.studies.match3_task import best_setting, detect, draw, labels

TASKS = {"match3": 3, "match2": 2}  # and the order of the attention that can do them
CONTROL = 2  # steps of Match3 for one of Match2
SMALL_START = "tensor, small start"  # with queries, keys and values from weights that start at 0.02, as most models do
KINDS = {
    "full": {"layer_types": ["full_attention"]},
    "multipole": {"layer_types": ["multipole_attention"], "block_size": 8, "far_bias_init": 0.0},
    "tensor": {"layer_types": ["tensor_attention"]},
    "tensor, polynomial": {"layer_types": ["tensor_attention"], "tensor_method": "polynomial", "tensor_score_dim": 4},
    SMALL_START: {"layer_types": ["tensor_attention"]},
}
HELD_OUT = 1024  # rows of each length that accuracy is measured on
POOL = 10  # batches drawn at once, of one length
POINTS = 20  # of each curve
TIMED = 9  # steps
# What the constructed solution is tried with.
MODULI, LENGTHS, MARGINS = (5, 7), (4, 8, 16, 32, 64), (0.0, 0.001, 0.01, 0.1)


# One run


def new_model(kind: str, modulus: int, hidden_size: int) -> MultipoleForTokenClassification:
    """One layer; the MLP is as wide as gives every kind the parameters of the tensor model."""

    def build(kind, **sizes):
        return MultipoleForTokenClassification(
            MultipoleConfig(
                vocab_size=modulus + 1,
                hidden_size=hidden_size,
                num_hidden_layers=1,
                num_attention_heads=2,
                is_causal=False,
                num_labels=2,
                max_position_embeddings=64,
                # A narrow model needs wide weights.
                initializer_range=hidden_size**-0.5,
                **sizes | KINDS[kind],
            )
        )

    missing = build("tensor").num_parameters() - build(kind, intermediate_size=1).num_parameters()
    model = build(kind, intermediate_size=1 + round(missing / (3 * hidden_size)))
    if kind == SMALL_START:
        attention = model.model.layers[0].self_attn
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj):
            torch.nn.init.normal_(proj.weight, std=0.02)
    return model


def logits(model, rows: torch.Tensor, modulus: int) -> torch.Tensor:
    """``(count, n, 2)``. A first token stands before the row; nothing tells positions, of which labels do not depend."""
    ids = F.pad(rows, (1, 0), value=modulus)
    return model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.zeros_like(ids)).logits[:, 1:]


def examples(task: str, short_steps: int, settings: dict, seed: int):
    """Batches without end, the same for every kind of attention: short rows at first, which cost a tensor layer little."""
    generator = torch.Generator().manual_seed(seed)
    for drawn in itertools.count():
        n = int(torch.randint(settings["lengths"][0], settings["lengths"][1] + 1, (), generator=generator))
        if drawn * POOL < short_steps:
            n = settings["short_length"]
        rows, ones = draw(POOL * settings["batch_size"], n, settings["modulus"], TASKS[task], generator)
        yield from zip(rows.split(settings["batch_size"]), ones.split(settings["batch_size"]))


def held_out(task: str, settings: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2**31)
    return [draw(HELD_OUT, n, settings["modulus"], TASKS[task], generator) for n in sorted(set(settings["lengths"]))]


@torch.no_grad()
def evaluate(model, sets, modulus: int) -> dict[str, float]:
    model.eval()
    pairs = [
        (logits(model, part, modulus).argmax(-1), ones_of) for rows, ones in sets for part, ones_of in zip(rows.split(128), ones.split(128))
    ]
    model.train()
    found, ones = (torch.cat([x.flatten() for x in xs]) for xs in zip(*pairs))
    recalls = [(found[ones == label] == label).float().mean().item() for label in (0, 1)]
    return {"accuracy": (found == ones).float().mean().item(), "balanced accuracy": sum(recalls) / 2}


def train(task: str, kind: str, seed: int, settings: dict) -> dict:
    modulus = settings["modulus"]
    set_seed(seed)
    accelerator = Accelerator()
    model = new_model(kind, modulus, settings["hidden_size"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.99), weight_decay=0.0)
    steps, short_steps = (x // (CONTROL if task == "match2" else 1) for x in (settings["steps"], settings["short_steps"]))
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, min(100, steps // 4), steps, min_lr_rate=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    device = accelerator.device
    sets = [tuple(x.to(device) for x in pair) for pair in held_out(task, settings)]
    # A few rows of each length, to draw the curve; all of them at the end.
    some = [tuple(x[: HELD_OUT // 8] for x in pair) for pair in sets]
    every, curve = max(1, steps // POINTS), []
    batches = itertools.islice(examples(task, short_steps, settings, seed), steps)
    bar = tqdm(batches, f"{task}, {kind}, seed {seed}", steps, mininterval=1)
    for step, (rows, ones) in enumerate(bar, 1):
        loss = F.cross_entropy(logits(model, rows.to(device), modulus).flatten(0, 1), ones.to(device).flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            curve.append({"examples": step * settings["batch_size"], "accuracy": evaluate(model, some, modulus)["accuracy"]})
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{curve[-1]['accuracy']:.3f}")
    return evaluate(model, sets, modulus) | {"parameters": model.num_parameters(), "curve": curve}


# The report


def guesses(task: str, settings: dict) -> list[float]:
    """What can be had without looking for matches."""
    sets = held_out(task, settings)
    ones = torch.cat([ones.float().mean(1) for _, ones in sets])
    distinct = torch.cat([F.one_hot(rows, settings["modulus"]).amax(1).sum(1) for rows, _ in sets])
    share = ones.mean().item()
    by_distinct = 0.0
    for count in distinct.unique():
        of_count = ones[distinct == count]
        by_distinct += max(of_count.mean().item(), 1 - of_count.mean().item()) * len(of_count) / len(ones)
    return [max(share, 1 - share), by_distinct, torch.maximum(ones, 1 - ones).mean().item()]


def step_times(kinds: list[str], settings: dict) -> dict[str, float]:
    """Seconds of processor time of a training step on the longest rows: the median of steps taken in turns."""
    models = {kind: new_model(kind, settings["modulus"], settings["hidden_size"]) for kind in kinds}
    rows = torch.randint(settings["modulus"], (settings["batch_size"], settings["lengths"][1]))
    times = {kind: [] for kind in kinds}
    for _ in range(TIMED + 1):
        for kind, model in models.items():
            times[kind].append(timed("cpu", lambda model=model: logits(model, rows, settings["modulus"]).square().mean().backward())[1])
    # The first step may still have had to take memory.
    return {kind: statistics.median(of_kind[1:]) for kind, of_kind in times.items()}


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in per cent."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f} %" if len(values) > 1 else " %")


def results(runs: list[dict], settings: dict) -> str:
    """The table of the runs with these settings, and what guesses reach."""
    head = ["task", "attention", "seeds", "parameters", "examples", "accuracy", "worst seed", "balanced accuracy", "CPU ms a step"]
    rows = []
    times = step_times(list(dict.fromkeys(run["kind"] for run in runs)), settings)
    for task, kind in itertools.product(TASKS, KINDS):
        figures = [run["figures"] for run in runs if (run["task"], run["kind"]) == (task, kind)]
        if figures:
            cells = [task, kind, str(len(figures)), f"{figures[0]['parameters']:,}", f"{figures[0]['curve'][-1]['examples']:,}"]
            accuracy, balanced = ([100 * found[name] for found in figures] for name in ("accuracy", "balanced accuracy"))
            cells += [spread(accuracy), f"{min(accuracy):.1f} %", spread(balanced)]
            cells.append(f"{1000 * times[kind]:.0f}")
            rows.append(cells)
    guessed = [[task, *(f"{100 * x:.1f} %" for x in guesses(task, settings))] for task in dict.fromkeys(run["task"] for run in runs)]
    ways = ["the more frequent label", "by the number of different residues", "the better label of each row, if it were known"]
    return "\n\n".join([table(head, rows, 2), "Without looking for matches:", table(["task", *ways], guessed)])


def construction() -> str:
    """For each modulus, length and margin: the least degree that makes every label certain, tried on random rows."""
    found_by_size, generator = [], torch.Generator().manual_seed(0)
    for modulus, n in tqdm(list(itertools.product(MODULI, LENGTHS)), "constructed solution"):
        size = torch.randint(1, modulus, (20, 1), generator=generator)
        rows = (torch.rand(20, modulus, generator=generator).argsort(1)).gather(1, (torch.rand(20, n, generator=generator) * size).long())
        cells = [str(modulus), str(n)]
        for margin in MARGINS:
            chosen = best_setting(n, modulus, margin=margin)
            if chosen is None:
                cells.append("none")
                continue
            found = detect(rows, modulus, chosen, method="polynomial", degree=chosen.degree, entry_bound=1.0)
            if not torch.equal(found, labels(rows, modulus)):
                sys.exit(f"modulus {modulus}, n {n}: labels are wrong that the certificate says are certain")
            cells.append(f"{chosen.degree} ({chosen.features:,}), {chosen.score_bound:.2g}, {chosen.delta:.1g}")
        found_by_size.append(cells)
    return table(["modulus", "n", *(f"margin over {margin:g}" for margin in MARGINS)], found_by_size, 0)


def plot(groups: list[tuple[dict, list[dict]]], path: Path) -> None:
    """Accuracy against examples, a panel for each task and each of the settings, a line for each run."""
    panels = [
        (f"{task}, modulo {settings['modulus']}", [run for run in runs if run["task"] == task])
        for settings, runs in groups
        for task in TASKS
        if any(run["task"] == task for run in runs)
    ]
    title, shades = "Accuracy on held-out rows during training; a line for each seed", colours(KINDS)
    with figure(path, len(panels), 1, (0.4 + 3.6 * len(panels), 4.2), title, sharey=True) as (picture, (plots,)):
        for axes, (panel, runs) in zip(plots, panels):
            for run in runs:
                points = [(point["examples"], point["accuracy"]) for point in run["figures"]["curve"]]
                axes.plot(*zip(*points), color=shades[run["kind"]], linewidth=1.2, alpha=0.8)
            axes.set(xlabel="examples", title=panel)
            axes.locator_params(axis="x", nbins=5)
        plots[0].set(ylabel="accuracy")
        drawn = [kind for kind in KINDS if any(run["kind"] == kind for _, runs in panels for run in runs)]
        lines = [plots[0].plot([], [], color=shades[kind])[0] for kind in drawn]
        picture.legend(lines, drawn, loc="outside lower center", ncols=len(drawn), frameon=False)


def command_of(output: Path, settings: dict, runs: list[dict], defaults: dict) -> str:
    """What makes these runs."""
    chosen = settings | {
        "tasks": [task for task in TASKS if any(run["task"] == task for run in runs)],
        "kinds": [kind for kind in KINDS if any(run["kind"] == kind for run in runs)],
    }
    line = ["python", "-m", "scripts.studies.match3", "--output", str(output)]
    for name, value in chosen.items():
        if value != defaults[name]:
            line += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(line)


def report(o, groups: list[tuple[dict, list[dict]]], picture: str) -> str:
    commands = "\n".join(command_of(o.output, settings, runs, o.defaults) for settings, runs in groups)
    studies = "\n\n".join(
        f"### Modulo {settings['modulus']}, rows of {settings['lengths'][0]} to {settings['lengths'][1]}\n\n"
        f"Width {settings['hidden_size']}; batches of {settings['batch_size']}, the first {settings['short_steps']} of {settings['steps']} "
        f"with rows of {settings['short_length']} (a half of both for Match2); AdamW, {settings['learning_rate']:g}, cosine.\n\n"
        f"{results(runs, settings)}"
        for settings, runs in groups
    )
    return f"""# Match3: what attention to pairs of tokens is for

Label a token x by whether its row has y and z with x + y + z = 0 modulo M (Match3), or y with x + y = 0 (Match2, the control). One
head of order 3 can do Match3, a one-layer transformer of reasonable size cannot ([arXiv 2306.02896](https://arxiv.org/abs/2306.02896)).

```bash
{commands}
python -m scripts.studies.match3 --output {o.output} --kinds --report {o.report}
```

## Learning it

Models of one layer and 2 heads, without positions, and of the same size: wider MLPs make up for the projections of a tensor layer. All
kinds see the same examples, which are never repeated. Rows are drawn so that labels are spread evenly over the four quarters of the share
of ones ([arXiv 2501.19215](https://arxiv.org/abs/2501.19215)). Rows of Match3 hold no 0 and never both x and -2x: matches that repeat a
residue, which attention to single tokens finds, would otherwise be some two thirds of the ones. Accuracy on {2 * HELD_OUT:,} held-out
rows of the least and the greatest length, mean and standard deviation over seeds; processor time of forward and backward on the longest
rows.

{studies}

On Match3, full attention is far below what tensor attention reaches with as many examples, though its curves still rise: longer training
may bring it further. At modulus 37 it has not even caught up with counting the residues of a row. On Match2 every kind that was tried
succeeds.

All weights start with a standard deviation of the inverse square root of the width; "{SMALL_START}" is the same tensor layer with
queries, keys and values from weights that start at 0.02. Products of three small entries, and of two small values, have hardly a gradient:
learning starts later, but then goes faster and at least as far. No run of either start failed. Short rows at first save time, since a
step of tensor attention costs n^3.

The polynomial has a score width of 4 and entries within 0.7, so that its scores cannot point at single pairs; but weighted sums of
products of values are nearly products of sums, in which the MLP can see something of the matches. At modulus 19 it ends between full
attention and the exact path, at 37 it does not learn the task with so few examples.

![accuracy against examples]({picture})

## Writing it down, with bounded entries

With entries cos(2 pi (f x / M + k / 3)), f = 1, ..., (M - 1) / 2, k = 0, 1, 2, of the query and of both keys, and scale 4 beta / 3, a
match has the score beta (M - 1) / 2, any other pair -beta / 2. Values are 1; null tokens, of entries and values 0, are what matches are
compared with. With sharp scores the exact path finds every label. Entries within 1 allow scores up to R = 2 beta (M - 1), and the
polynomial's relative error on [-R, R] is delta. Every label is certain where half the distance between the outputs of no match and of one
match, the margin, exceeds the certified error. Least degree (features), R and delta for that, in float64, on an output from 0 to 1; every
entry was run on random rows, and every label was right; "none" is within {MAX_FEATURES:,} features and degree {MAX_DEGREE}:

{construction()}

Sums are exact enough to count: with bounded scores one match among n^2 pairs can be found in rows of any length. But it moves the output
by a share of e^R / n^2 at most, and what follows has to see that: in float32, whose rounding the certificate includes, rows of
{float32_limit()} residues modulo {MODULI[0]} are the longest. For an output that stands out, by a margin that does not shrink, scores grow
with log n, the degree with them, and the features with a power of the degree that the modulus sets: this is where detection and bounded
entries part ways, as the theorem says ([arXiv 2310.04064](https://arxiv.org/abs/2310.04064)).
"""


def float32_limit() -> int:
    """The longest row in which the constructed solution is certain in float32."""
    return next(n for n in itertools.count(1) if best_setting(n + 1, MODULI[0], torch.float32) is None)


# The command


SETTINGS = ("modulus", "lengths", "steps", "short_steps", "short_length", "batch_size", "hidden_size", "learning_rate")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--report", type=Path, help="Markdown file to write, with a picture under images/ beside it")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="of attention; none to write the report alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modulus", type=int, default=37, help="odd")
    parser.add_argument("--lengths", type=int, nargs=2, default=[30, 35], help="shortest and longest rows")
    parser.add_argument("--steps", type=int, default=1300, help="of Match3; half as many of Match2")
    parser.add_argument("--short-steps", type=int, default=1000, help="those of them with short rows, before the others")
    parser.add_argument("--short-length", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    o = parser.parse_args(arguments)
    o.defaults = {name: parser.get_default(name) for name in (*SETTINGS, "tasks", "kinds")}
    faults = [
        (o.modulus < 3 or o.modulus % 2 == 0, f"--modulus {o.modulus} must be odd, and at least 3"),
        (not 1 <= o.lengths[0] <= o.lengths[1] <= 63, f"--lengths {o.lengths} must ascend from at least 1 to at most 63"),
        (not 1 <= o.short_length <= 63, f"--short-length {o.short_length} must lie between 1 and 63"),
        (o.steps < 2 or o.short_steps < 0, f"--steps {o.steps} must be at least 2, and --short-steps {o.short_steps} not negative"),
        (o.batch_size < 2 or o.batch_size % 2, f"--batch-size {o.batch_size} must be even"),
        (o.hidden_size < 4 or o.hidden_size % 4, f"--hidden-size {o.hidden_size} must be a multiple of 4"),
        (not o.learning_rate > 0, f"--learning-rate {o.learning_rate} must be positive"),
        (o.output.exists() and not o.output.is_dir(), f"--output {o.output} is a file; name a folder"),
    ]
    if any(wrong for wrong, _ in faults):
        sys.exit("\n".join(message for wrong, message in faults if wrong))
    return o


def main(arguments) -> None:
    o = parse(arguments)
    settings = {name: getattr(o, name) for name in SETTINGS}
    o.output.mkdir(parents=True, exist_ok=True)
    for seed, task, kind in itertools.product(o.seeds, o.tasks, o.kinds):
        path = o.output / f"{task}-{o.modulus}-{kind.replace(',', '').replace(' ', '-')}-{seed}.json"
        if not path.is_file():
            write_json(path, {"task": task, "kind": kind, "seed": seed, "settings": settings, "figures": train(task, kind, seed, settings)})
        run = json.loads(path.read_text())
        if run["settings"] != settings:
            sys.exit(f"{path} was made with other settings: {run['settings']}; name another --output")
        print(f"{task}, {kind}, seed {seed}: {100 * run['figures']['accuracy']:.1f} %", flush=True)
    if o.report is not None:
        groups = []
        for run in (json.loads(path.read_text()) for path in sorted(o.output.glob("*.json"))):
            alike = [runs for other, runs in groups if other == run["settings"]]
            alike[0].append(run) if alike else groups.append((run["settings"], [run]))
        if not groups:
            sys.exit(f"--output {o.output} holds no runs to report: name some --kinds")
        groups.sort(key=lambda group: -group[0]["modulus"])
        picture = Path("images") / f"{o.report.stem}.png"
        (o.report.parent / "images").mkdir(parents=True, exist_ok=True)
        if find_spec("matplotlib"):
            plot(groups, o.report.parent / picture)
        write_beside(o.report, {"machine": machine(), "runs": [run for _, runs in groups for run in runs]})
        o.report.write_text(report(o, groups, picture.as_posix()))
        print(f"wrote {o.report}")


if __name__ == "__main__":
    main(sys.argv[1:])

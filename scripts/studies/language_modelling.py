"""Runs a study that a YAML file describes: models side by side, at some training lengths, contexts and seeds; then a report.

    python -m scripts.studies.language_modelling configs/studies/language-modelling-causal.yaml --list
    python -m scripts.studies.language_modelling configs/studies/language-modelling-causal.yaml --jobs 2

The file has
    base: a configuration of run_clm.py, or of run_mlm.py where it has mlm_probability;
    rows: by name, what differs from base; config_overrides and convert are merged. The first row is what others are compared with.
        A row has every budget, context and seed, or those of its grids: a list of {budgets, contexts, seeds}, some of the study's;
    budgets: steps, by name; contexts: tokens in a row; seeds. At every context a step, and the held-out text, have as many tokens as
        in base: half the context, twice the rows.

Each run is one call of the training script in runs/STUDY/ROW/BUDGET-CONTEXT-SEED. It is done when its figures.json is there, and not
run again; otherwise it goes on from its newest complete checkpoint, so that an interrupted study goes on by the same command. Several
of these commands may work on one study. After every run what is done is collected in runs/STUDY/results.json and becomes the report.
Attention functions of scripts/common/peers.py may be named as attn_implementation.
"""

import argparse
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_multipole  # noqa: F401 (registers the multipole models)
from hf_multipole.training import checkpoints
from hf_multipole.training.arguments import DataArguments, MaskingArguments, ModelArguments, RunArguments, check_names
from hf_multipole.training.errors import BAD_INPUT, one_line
from hf_multipole.training.figures import plot_curves, plot_positions
from hf_multipole.training.parsing import parse
from scripts.benchmarks.tensor import machine
from scripts.common.peers import PEERS

AXES = ("budgets", "contexts", "seeds")
# What the study itself decides in every run.
DECIDED = ("max_steps", "seed", "output_dir", "resume_from_checkpoint", "push_to_hub")
# So many rows a step or of held-out text, at the context of base.
ROWS_OF_TOKENS = ("per_device_train_batch_size", "eval_rows", "test_rows")
DRAWN = 6  # rows, from the first, in the plots that have a line for each


@dataclass(frozen=True, eq=False)
class Run:
    """One training run of a study."""

    row: str
    budget: str
    context: int
    seed: int
    folder: Path
    values: dict  # its whole configuration

    @property
    def done(self) -> bool:
        return (self.folder / "figures.json").is_file()

    @property
    def step(self) -> int:
        """Steps that are safe: all, or those of the newest complete checkpoint."""
        if self.done:
            return self.values["max_steps"]
        return max((int(path.name[11:]) for path in checkpoints.complete(self.folder)[:1]), default=0)

    @property
    def name(self) -> str:
        return f"{self.row}, {self.budget}, context {self.context}, seed {self.seed}"


# The plan


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.=]+", "-", name.lower()).strip("-")


def read_study(path: Path) -> dict:
    """What a study's file holds, its form and names checked. Raises ValueError and OSError with one line."""
    try:
        study = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    parts = ("base", "rows", *AXES)
    check_names(study if isinstance(study, dict) else [study], parts, str(path))
    for part, kind in zip(parts, (dict, dict, dict, list, list)):
        if not isinstance(study.get(part), kind) or not study[part]:
            raise ValueError(f"{path} needs {part}: a {'mapping' if kind is dict else 'list'} that is not empty")
    for axis, least in zip(AXES, (1, 2, 0)):
        numbers = list(study[axis].values()) if axis == "budgets" else study[axis]
        for number in numbers:
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{axis} of {path} has {number!r}, but they are whole numbers of at least {least}")
            if numbers.count(number) > 1:
                raise ValueError(f"{axis} of {path} has {number} twice")
    known = {name for kind in kinds(study["base"]) for name in kind.__dataclass_fields__}
    for where, values, names in [
        (f"base of {path}", study["base"], known),
        *((f"row {row!r} of {path}", values or {}, {*known, "grids"}) for row, values in study["rows"].items()),
    ]:
        check_names(values, names, where)
        for name in DECIDED:
            if name in values:
                raise ValueError(f"{where} has {name}, which the study decides: leave it out")
        grids = values.get("grids", [{}])
        if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
            raise ValueError(f"grids of {where} must be a list of mappings, like [{{budgets: [...], contexts: [...], seeds: [...]}}]")
        for grid in grids:
            check_names(grid, AXES, f"grids of {where}")
            for axis, chosen in grid.items():
                if not isinstance(chosen, list) or not chosen:
                    raise ValueError(f"{axis} in grids of {where} must be a list that is not empty")
                if unknown := [x for x in chosen if x not in study[axis]]:
                    raise ValueError(f"{where} has {axis} {unknown[0]!r}, but the study's are {', '.join(map(str, study[axis]))}")
    return study


def plan(path: Path, output: Path) -> tuple[list[Run], list[str]]:
    """The runs of a study, and its rows. Short budgets and first seeds come first: a study under way compares as many rows as it can.

    Raises ValueError and OSError with one line for what cannot be run.
    """
    study, runs = read_study(path), []
    for row, overrides in study["rows"].items():
        overrides = dict(overrides or {})
        grids = [[grid.get(axis, list(study[axis])) for axis in AXES] for grid in overrides.pop("grids", [{}])]
        # Grids may overlap.
        places = dict.fromkeys(place for grid in grids for place in itertools.product(*grid))
        at = {}
        for context in dict.fromkeys(context for _, context, _ in places):
            at[context] = at_context(merge(study["base"], overrides), study["base"], context, f"row {row!r} of {path}")
            refuse_what_cannot_run(at[context], f"row {row!r} of {path}")
        for budget, context, seed in places:
            folder = output / slug(row) / f"{slug(budget)}-{context}-{seed}"
            decided = {"max_steps": study["budgets"][budget], "seed": seed, "output_dir": str(folder)}
            runs.append(Run(row, budget, context, seed, folder, at[context] | decided))
    runs.sort(key=lambda run: (run.values["max_steps"], study["seeds"].index(run.seed), study["contexts"].index(run.context)))
    owner = {}
    for run in runs:
        if (other := owner.setdefault(run.folder, run)) is not run:
            raise ValueError(f"{path}: {run.name!r} and {other.name!r} have one folder, {run.folder}: give one another name")
        refuse_another(run)
    return runs, list(study["rows"])


def kinds(base: dict) -> tuple[type, ...]:
    masked = (MaskingArguments,) if "mlm_probability" in base else ()
    return (ModelArguments, DataArguments, RunArguments, TrainingArguments, *masked)


def merge(base: dict, overrides: dict) -> dict:
    nested = {name: base.get(name, {}) | overrides[name] for name in ("config_overrides", "convert") if overrides.get(name)}
    return base | overrides | nested


def at_context(values: dict, base: dict, context: int, where: str) -> dict:
    """As many tokens a step, and of held-out text, as in base."""
    out = values | {"context_length": context}
    for name in ROWS_OF_TOKENS:
        if name not in values or "context_length" not in base:
            raise ValueError(f"base needs context_length, {', '.join(ROWS_OF_TOKENS)}: a step has as many tokens at every context")
        tokens = values[name] * base["context_length"]
        if tokens % context:
            raise ValueError(f"{where} has {name} of {tokens} tokens in all, which is no multiple of the context {context}")
        out[name] = tokens // context
    out["per_device_eval_batch_size"] = max(1, values.get("per_device_eval_batch_size", 8) * base["context_length"] // context)
    return out


def refuse_what_cannot_run(values: dict, where: str) -> None:
    """Raises ValueError for what the training script would refuse, as far as that can be seen without text and weights."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "configuration.yaml"
        file.write_text(yaml.safe_dump(values | {"output_dir": folder}))
        try:
            model, *_ = parse(["--config", str(file)], kinds(values))
            if not model.model_name_or_path:
                CONFIG_MAPPING[model.model_type](**model.config_overrides)
        except BAD_INPUT as error:
            raise ValueError(f"{where}: {one_line(error).replace(str(file), 'it')}") from None
    name = values.get("attn_implementation")
    known = {*ALL_ATTENTION_FUNCTIONS.valid_keys(), "eager", *PEERS}
    if name is not None and name not in known:
        check_names([name], known, f"{where}: attn_implementation")
    if name in PEERS and not PEERS[name].installed():
        raise ValueError(f"{where}: {name} needs {PEERS[name].package}: pip install {PEERS[name].package}")


def refuse_another(run: Run) -> None:
    """Raises ValueError where the folder of a run holds one of another configuration."""
    file = run.folder / "configuration.yaml"
    if file.is_file():
        known = yaml.safe_load(file.read_text())
        for name in {**known, **run.values}:
            if name != "output_dir" and known.get(name) != run.values.get(name):
                values = f"{name} {known.get(name)!r}, not {run.values.get(name)!r}"
                raise ValueError(f"{run.folder} was begun with {values}: rename the row, or remove that folder")


# Running


def start(run: Run, threads: int) -> tuple[subprocess.Popen, object] | None:
    """The training script as a process, its output in log.txt; None where another process works on this run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log = (run.folder / "log.txt").open("a")
    try:
        # Held until the training process ends, whatever becomes of this one.
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    file = run.folder / "configuration.yaml"
    part = file.with_suffix(".part")
    part.write_text(yaml.safe_dump(run.values, sort_keys=False))
    part.replace(file)
    script = "run_mlm" if "mlm_probability" in run.values else "run_clm"
    module = ["scripts.common.peers", script] if run.values.get("attn_implementation") in PEERS else [f"scripts.{script}"]
    command = [sys.executable, "-m", *module, "--config", str(file)]
    if (run.folder / checkpoints.RUN).is_file():
        command += ["--resume_from_checkpoint", "intact"]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True), log


def stop(signal_number, frame):
    raise KeyboardInterrupt


def run_all(runs: list[Run], jobs: int, collect) -> list[str]:
    """Runs what is not done, ``jobs`` at once; returns a line for each run that failed. What runs is ended when this process is."""
    waiting, running, failed = [run for run in runs if not run.done], {}, []
    threads, steps = max(1, (os.cpu_count() or 1) // jobs), {run: run.step for run in runs}
    signal.signal(signal.SIGTERM, stop)
    with tqdm(total=sum(run.values["max_steps"] for run in runs), initial=sum(steps.values()), unit=" steps", desc="study") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    process = None if run.done else start(run, threads)
                    if process is not None:
                        running[run] = process
                    elif not run.done:
                        tqdm.write(f"{run.name}: left to the process that works on it")
                time.sleep(0.2)
                for run, (process, log) in list(running.items()):
                    ended = process.poll() is not None
                    steps[run] = run.step
                    if not ended:
                        continue
                    del running[run]
                    log.close()
                    if process.returncode == 0 and run.done:
                        collect()
                    else:
                        lines = (run.folder / "log.txt").read_text().strip().splitlines() or [f"exit status {process.returncode}"]
                        failed.append(f"{run.name}: {lines[-1]} ({run.folder / 'log.txt'})")
                        tqdm.write(failed[-1])
                bar.set_postfix_str(f"{len(runs) - len(waiting) - len(running)} of {len(runs)} runs, {len(running)} at work", refresh=False)
                bar.update(sum(steps.values()) - bar.n)
        finally:
            for process, log in running.values():
                process.terminate()
                process.wait()
                log.close()
    return failed


# Results


def results(runs: list[Run]) -> list[dict]:
    """What the runs that are done left in their figures.json."""
    names = ("parameters", "metrics", "curve", "by_position", "seconds_per_step", "cpu_seconds_per_step", "peak_memory")
    out = []
    for run in (run for run in runs if run.done):
        figures = json.loads((run.folder / "figures.json").read_text())
        place = {"row": run.row, "budget": run.budget, "steps": run.values["max_steps"], "context": run.context, "seed": run.seed}
        out.append(place | {name: figures[name] for name in names})
    return out


def student_t(freedom: int, share: float = 0.975) -> float:
    """The value that Student's t of so many degrees of freedom stays below with that probability: the density summed, and bisection."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    low, high = 0.0, 1e3
    while high - low > 1e-6:
        middle = (low + high) / 2
        x = middle * torch.linspace(0, 1, 20001, dtype=torch.float64) ** 2
        below = 0.5 + scale * torch.trapezoid((1 + x**2 / freedom) ** (-(freedom + 1) / 2), x).item()
        low, high = (middle, high) if below < share else (low, middle)
    return low


def pooled(values: dict[str, list[float]]) -> tuple[float, int] | None:
    """Standard deviation within the rows, pooled over those with two seeds or more, and its degrees of freedom.

    Rows that vary by less than a fifth of what the most varying row does are left out: they are almost the same model as the one that they
    are compared with, and say little of chance.
    """
    several = [row for row in values.values() if len(row) > 1]
    most = max(map(statistics.variance, several), default=0.0)
    several = [row for row in several if statistics.variance(row) >= most / 25]
    freedom = sum(len(row) - 1 for row in several)
    if not freedom:
        return None
    return math.sqrt(sum((len(row) - 1) * statistics.variance(row) for row in several) / freedom), freedom


def group(found: list[dict], budget: str, context: int) -> dict[str, list[dict]]:
    rows = {}
    for result in found:
        if (result["budget"], result["context"]) == (budget, context):
            rows.setdefault(result["row"], []).append(result)
    return rows


def second_half(found: list[dict]) -> float:
    """Bits a token in the second half of the context, mean over seeds."""
    ranges = mean_positions(found)["by_position"]
    tokens = [max(0, part["to"] - max(part["from"], ranges[-1]["to"] / 2)) for part in ranges]
    return float(np.average([part["loss"] for part in ranges], weights=tokens)) / math.log(2)


def last_fall(found: list[dict]) -> float | None:
    """Share of its loss that a row lost over the last quarter of its steps; None where the curve does not say."""
    steps, bits = ([point[name] for point in mean_curve(found)] for name in ("step", "bits"))
    if not steps or steps[0] > 0.75 * steps[-1]:
        return None
    return 1 - bits[-1] / float(np.interp(0.75 * steps[-1], steps, bits))


def differences(rows: dict[str, list[dict]], first: str, metric: str) -> dict[str, list[float]]:
    """Of each row from the first, at equal seeds: these share their order of the text, which matters more than most rows do."""
    of_first = {result["seed"]: result["metrics"][metric] for result in rows.get(first, ())}
    others = {row: [result for result in found if result["seed"] in of_first] for row, found in rows.items() if row != first}
    return {row: [result["metrics"][metric] - of_first[result["seed"]] for result in found] for row, found in others.items()}


def table(rows: dict[str, list[dict]], first: str, metric: str) -> str:
    """One budget and context: a line for each row, in Markdown, and how large a difference has to be."""
    apart, lines = differences(rows, first, metric), []
    spread = pooled(apart)

    def least(seeds: int) -> float:
        return student_t(spread[1]) * spread[0] / math.sqrt(seeds)

    for row, found in rows.items():
        values = [result["metrics"][metric] for result in found]
        mean = statistics.mean(values)
        cells = [row, f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(found) > 1 else ""), str(len(found)), ""]
        if apart.get(row):
            difference = statistics.mean(apart[row])
            cells[-1] = f"{difference:+.4f}"
            if spread and abs(difference) > least(len(apart[row])):
                cells[-1] = f"**{cells[-1]}**"
        fall = last_fall(found)
        cells.append(f"{statistics.mean(result['metrics']['perplexity'] for result in found):.3f}")
        cells += [f"{second_half(found):.3f}", "" if fall is None else f"{100 * fall:.1f}", f"{found[0]['parameters']:,}"]
        for name in ("seconds_per_step", "cpu_seconds_per_step"):
            seconds = [result[name] for result in found if result[name]]
            cells.append(f"{statistics.median(seconds):.3g}" if seconds else "")
        memory = [result["peak_memory"] for result in found if result["peak_memory"]]
        lines.append(f"| {' | '.join([*cells, f'{max(memory) / 1e6:,.0f}' if memory else ''])} |")
    head = ["row", metric.replace("_", " "), "seeds", f"against {first}", "perplexity", "second half", "last fall, %", "parameters"]
    head += ["s a step", "CPU s a step", "peak memory, MB"]
    text = "\n".join([f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1), *lines])
    if spread:
        most = max(map(len, apart.values()))
        text += f"\n\nA difference from {first} over one seed counts from {least(1):.4f} on, over {most} seeds from {least(most):.4f} on: "
        text += f"t s / sqrt(seeds), with s = {spread[0]:.4f}, the deviation of differences within a row, pooled, and t = "
        text += f"{student_t(spread[1]):.3f} (5 %, two-sided, {spread[1]} degrees of freedom)."
    return text


def mean_curve(found: list[dict]) -> list[dict]:
    """The curve of a row, mean over its seeds, at the steps that all of them have."""
    points = [{point["step"]: point["bits"] for point in result["curve"]} for result in found]
    steps = sorted(set.intersection(*map(set, points)))
    return [{"step": step, "bits": statistics.mean(one[step] for one in points)} for step in steps]


def mean_positions(found: list[dict]) -> dict:
    ranges = zip(*(result["by_position"] for result in found))
    return {"by_position": [parts[0] | {"loss": statistics.mean(part["loss"] for part in parts)} for parts in ranges]}


def plot_rows(found: list[dict], rows: list[str], metric: str, path: Path) -> None:
    """Every run as a point: rows below each other, a panel for each context, a colour for each budget; a bar at the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contexts, budgets = (list(dict.fromkeys(result[axis] for result in found)) for axis in ("context", "budget"))
    figure, panels = plt.subplots(
        1, len(contexts), figsize=(3 + 3.6 * len(contexts), 1.4 + 0.26 * len(rows)), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, context in zip(panels[0], sorted(contexts)):
        for i, budget in enumerate(budgets):
            for row, several in group(found, budget, context).items():
                values, place = [result["metrics"][metric] for result in several], rows.index(row)
                axes.plot(values, [place] * len(values), "o", color=f"C{i}", markersize=4, alpha=0.6)
                axes.plot([statistics.mean(values)], [place], "|", color=f"C{i}", markersize=12)
        axes.set(title=f"context {context:,}", xlabel=metric.replace("_", " "))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(rows)), rows)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend([plt.Line2D([], [], marker="o", linestyle="", color=f"C{i}") for i in range(len(budgets))], budgets, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_report(name: str, command: str, runs: list[Run], rows: list[str], record: dict, path: Path) -> None:
    """The tables, and under images/ the plots."""
    found = record["runs"]
    masked = "mlm_probability" in runs[0].values
    metric, unit = ("masked_accuracy", "bits per masked token") if masked else ("bits_per_byte", "bits per byte")
    cells = list(dict.fromkeys((run.budget, run.context) for run in runs))
    cells = [cell for cell in cells if group(found, *cell)]
    images, sections = path.parent / "images", []
    images.mkdir(parents=True, exist_ok=True)
    plots = bool(find_spec("matplotlib"))
    if plots:
        plot_rows(found, [row for row in rows if any(result["row"] == row for result in found)], metric, images / f"{name}.png")
        sections.append(f"![every run, and means](images/{name}.png)")
    for budget, context in cells:
        part = {row: several for row in rows if (several := group(found, budget, context).get(row))}
        steps = next(iter(part.values()))[0]["steps"]
        sections += [f"## {budget}: {steps:,} steps, context {context:,}", table(part, rows[0], metric)]
    if plots:
        # The longest training, at its longest context.
        budget, context = max(cells, key=lambda cell: (next(iter(group(found, *cell).values()))[0]["steps"], cell[1]))
        shown = {row: several for row in rows if (several := group(found, budget, context).get(row))}
        shown = dict(itertools.islice(shown.items(), DRAWN))
        curves = {row: curve for row, several in shown.items() if (curve := mean_curve(several))}
        sections.append(f"## Curves: {budget}, context {context:,}")
        if curves:
            plot_curves(curves, {}, images / f"{name}-curves.png", unit)
            sections.append(f"![held-out curve](images/{name}-curves.png)")
        plot_positions({row: mean_positions(several) for row, several in shown.items()}, images / f"{name}-positions.png")
        sections.append(f"![loss by position](images/{name}-positions.png)")
    info = record["machine"]
    text = f"""# Study: {name.replace("-", " ")}

```bash
{command}
```

{len(found)} of {len(runs)} runs are done, on {info["processor"]} ({info["cores"]} cores, torch {info["torch"]}). Figures are means over
seeds ± their standard deviation, on held-out text, at the end of training. Differences are means over the seeds that both rows have; in
bold, larger than chance makes them in 95 % of comparisons, so that of twenty rows that do not differ one is in bold. "Second half": bits a
token in the second half of the context. "Last fall": how much of the held-out loss the last quarter of the steps took away; where that is
little, longer training would give little. "s a step" is the median of the steps' own time, "CPU s" of their processor time, and of these
the median over seeds; where runs share a processor, the latter compares them. Peak memory is the whole process's, or on CUDA that of the
tensors.
"""
    part = path.with_name(path.name + ".part")
    part.write_text("\n".join([text, *(section + "\n" for section in sections)]))
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="YAML file")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; default: 1")
    parser.add_argument("--list", action="store_true", help="show the runs and which are done, and run nothing")
    parser.add_argument("--output", type=Path, help="folder of the runs; default: runs/STUDY")
    parser.add_argument("--report", type=Path, help="Markdown file, with plots under images/; default: model_cards/reports/STUDY.md")
    args = parser.parse_args()
    name = args.study.stem
    args.output = args.output or Path("runs") / name
    args.report = args.report or Path("model_cards/reports") / f"{name}.md"
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}, but must be positive")
        runs, rows = plan(args.study, args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"study.py: {one_line(error)}")
    if args.list:
        for run in runs:
            print(f"{'done' if run.done else run.step or '-':>6}  {run.values['max_steps']:>6}  {run.name}")
        return print(f"{sum(run.done for run in runs)} of {len(runs)} runs are done")

    def collect():
        command = shlex.join(["python", *sys.argv])
        if not any(run.done for run in runs):
            return
        with (args.output / "results.lock").open("w") as lock:
            # Another study.py may be at it, too.
            fcntl.flock(lock, fcntl.LOCK_EX)
            record = {"study": name, "command": command, "machine": machine(), "runs": results(runs)}
            checkpoints.write_json(args.output / "results.json", record)
            write_report(name, command, runs, rows, record, args.report)

    try:
        failed = run_all(runs, args.jobs, collect)
    except KeyboardInterrupt:
        sys.exit("study.py: interrupted; the same command goes on")
    finally:
        collect()
    if failed:
        sys.exit("\n".join([f"study.py: {len(failed)} of {len(runs)} runs failed; the same command tries them again", *failed]))
    print(f"wrote {args.report}")


if __name__ == "__main__":
    main()

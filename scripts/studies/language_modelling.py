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
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml
from tqdm.auto import tqdm
from transformers import CONFIG_MAPPING, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_multipole  # noqa: F401 (registers the multipole models)
from hf_multipole.training import checkpoints
from hf_multipole.training.arguments import DataArguments, MaskingArguments, ModelArguments, RunArguments, check_names
from hf_multipole.training.errors import BAD_INPUT, one_line
from hf_multipole.training.parsing import parse
from scripts.common.measuring import machine
from scripts.common.peers import PEERS
from scripts.common.reports import command
from scripts.studies.language_modelling_report import results, write_report

AXES = ("budgets", "contexts", "seeds")
# What the study itself decides in every run.
DECIDED = ("max_steps", "seed", "output_dir", "resume_from_checkpoint", "push_to_hub")
# So many rows a step or of held-out text, at the context of base.
ROWS_OF_TOKENS = ("per_device_train_batch_size", "eval_rows", "test_rows")


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


def refuse_what_is_missing(runs: list[Run]) -> None:
    """Raises ValueError where a run that is not done needs a package that is not installed, or the report does."""
    for run in (run for run in runs if not run.done):
        peer = PEERS.get(run.values.get("attn_implementation"))
        if peer is not None and not peer.installed():
            raise ValueError(f"row {run.row!r} needs {peer.package}: pip install {peer.package}, or -e '.[peers]' for all of them")
    if not find_spec("scipy"):
        raise ValueError("the report needs scipy: pip install -e '.[studies]'")


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
        sys.exit(f"language_modelling.py: {one_line(error)}")
    if args.list:
        for run in runs:
            print(f"{'done' if run.done else run.step or '-':>6}  {run.values['max_steps']:>6}  {run.name}")
        return print(f"{sum(run.done for run in runs)} of {len(runs)} runs are done")
    try:
        refuse_what_is_missing(runs)
    except ValueError as error:
        sys.exit(f"language_modelling.py: {error}")

    def collect():
        if not any(run.done for run in runs):
            return
        with (args.output / "results.lock").open("w") as lock:
            # Another process may be at it, too.
            fcntl.flock(lock, fcntl.LOCK_EX)
            record = {"study": name, "command": command(), "machine": machine(), "runs": results(runs)}
            checkpoints.write_json(args.output / "results.json", record)
            write_report(name, runs, rows, record, args.report)

    try:
        failed = run_all(runs, args.jobs, collect)
    except KeyboardInterrupt:
        sys.exit("language_modelling.py: interrupted; the same command goes on")
    finally:
        collect()
    if failed:
        sys.exit(
            "\n".join([f"language_modelling.py: {len(failed)} of {len(runs)} runs failed; the same command tries them again", *failed])
        )
    print(f"wrote {args.report}")


if __name__ == "__main__":
    main()

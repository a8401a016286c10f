"""Short training runs, in this process or in one that dies on its way."""

import json
import os
import random
import resource
import signal
import sys
import unittest.mock
from importlib.util import find_spec

import torch

from hf_multipole.training import checkpoints
from hf_multipole.training.run import run
from hf_multipole.training.trainer import LanguageModelTrainer
from tests.helpers.processes import JOIN, ranks, start

SMALL = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, block_size: 8, rank: 2, attention_dropout: 0.1}"


def write_texts(path, count=7):
    """Documents of random words, as lines of JSON."""
    random.seed(0)
    words = ["".join(random.choices("abcdefgh", k=random.randint(2, 7))) for _ in range(40)]
    rows = (" ".join(random.choices(words, k=random.randint(2, 60))) for _ in range(count))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def arguments(texts, folder, *more, config=SMALL):
    """A run of 12 steps of two rows, over more than one epoch of a small text, with everything that has a state of its own."""
    fixed = {
        "train_file": texts,
        "output_dir": folder,
        "context_length": 64,
        "eval_rows": 3,
        "test_rows": 3,
        "validation_split_percentage": 20,
        "max_steps": 12,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    line = [str(part) for name, value in fixed.items() for part in (f"--{name}", value)]
    return line + (["--config_overrides", config] if config else []) + [str(part) for part in more]


def train(command, masked=False, plots=False):
    """Runs the script in this process; without its plots, which take longer than a short run itself."""
    argv = ["run_mlm.py" if masked else "run_clm.py", *command]
    found = find_spec if plots else lambda name: None
    with unittest.mock.patch.object(sys, "argv", argv), unittest.mock.patch("hf_multipole.training.run.find_spec", found):
        run(argv[0], command, masked)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _train_with_a_fault(command, masked, fault, at, log, environment):
    """The script, until its process is killed: in a step, in the middle of a file, or before the marker is in its place."""
    os.environ |= environment
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    save_model = LanguageModelTrainer.save_model
    if fault == "step":
        step = LanguageModelTrainer.training_step

        def training_step(self, *arguments, **options):
            return _die() if self.state.global_step == at else step(self, *arguments, **options)

        LanguageModelTrainer.training_step = training_step
    elif fault == "file":
        save = torch.save

        def half(content, path, **options):
            save(content, path, **options)
            if f"checkpoint-{at}" in str(path) and str(path).endswith("optimizer.pt"):
                os.truncate(path, os.path.getsize(path) // 2)
                _die()

        torch.save = half
    elif fault == "marker":
        write = checkpoints.write_json

        def half_a_marker(path, content):
            if f"checkpoint-{at}" in str(path):
                path.with_name(path.name + ".part").write_text("{")
                _die()
            write(path, content)

        checkpoints.write_json = half_a_marker
    elif fault == "end":
        LanguageModelTrainer.save_model = lambda self, *arguments, **options: (
            save_model(self, *arguments, **options) if self.is_in_train else _die()
        )
    elif fault == "full disk":
        # No file may grow beyond this: writing fails as it does on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    try:
        train(command, masked)
    except SystemExit as error:
        print(error.code)
        os._exit(1 if error.code else 0)


def train_in_a_process(command, log, fault=None, at=None, masked=False):
    """Runs the script in a new process; returns its exit code and what it wrote."""
    process = start(_train_with_a_fault, command, masked, fault, at, str(log), {})
    process.join(JOIN)
    assert process.exitcode is not None, "the run does not end"
    return process.exitcode, log.read_text()


def train_in_two_processes(command, log, fault=None, at=None, masked=False):
    """Runs the script on two gloo ranks; the fault is the first one's. Returns their exit codes and what the first one wrote."""
    logs = [log, log.with_name(log.name + "-1")]
    arguments = zip((fault, None), logs, ranks(2))
    both = [start(_train_with_a_fault, command, masked, fault, at, str(log), names) for fault, log, names in arguments]
    both[0].join(JOIN)
    # A launcher ends the others when one has died; left alone, they wait for it.
    both[1].join(JOIN if both[0].exitcode == 0 else 0)
    both[1].kill()
    both[1].join()
    return [process.exitcode for process in both], log.read_text()


def history(folder, step):
    """Everything that Trainer logged up to a checkpoint, but for the clock's part."""
    log = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    clock = ("runtime", "per_second", "flos")
    return [{name: value for name, value in entry.items() if not name.endswith(clock)} for entry in log]

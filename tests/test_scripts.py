"""The scripts, as someone runs them: a short run of each that no other test covers, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import build

ROOT = Path(__file__).parent.parent


def run(script, *arguments, cwd, fails=False):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def test_benchmark_of_generation(tmp_path):
    sizes = ["--heads", 2, "--head-dim", 8, "--block-size", 8, "--rank", 2, "--layers", 1, "--repeats", 1, "--threads", 1]
    run("benchmark_generation.py", *sizes, "--contexts", 100, "--prompts", 100, "--tokens", 2000, "--output", "out", cwd=tmp_path)
    record = json.loads((tmp_path / "out" / "benchmark-generation.json").read_text())
    assert record["steps"][0]["context"] == 100 and len(record["writing"]["multipole"]["seconds_per_1000"]) == 2
    assert "must be at least 2000" in run("benchmark_generation.py", "--tokens", 10, cwd=tmp_path, fails=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import ByT5Tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    build(vocab_size=384).float().save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def test_generate_with_a_state(checkpoint, tmp_path):
    """A text read at once, and the same text read in two runs, go on in the same way."""
    greedy = ["--model", checkpoint, "--temperature", 0, "--max-new-tokens", 12]
    whole = run("generate.py", *greedy, "--prompt", "a long text, and a question", cwd=tmp_path)
    first = ["--model", checkpoint, "--prompt", "a long text, and", "--save-state", "text.state", "--max-new-tokens", 0, "--chunk", 5]
    run("generate.py", *first, cwd=tmp_path)
    second = run("generate.py", *greedy, "--load-state", "text.state", "--prompt", " a question", cwd=tmp_path)
    assert whole.removeprefix("a long text, and") == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--load-state", "nothing"], "no state file nothing"),
        (["--prompt", "a", "--save-state", "nowhere/a.state"], "must be a file in a folder that exists"),
        (["--prompt-file", "nothing"], "No such file"),
        (["--prompt", "a", "--max-new-tokens", -1], "must be at least 0"),
    ],
)
def test_generate_refuses(checkpoint, tmp_path, arguments, message):
    errors = run("generate.py", "--model", checkpoint, *arguments, cwd=tmp_path, fails=True)
    assert message in errors.strip().splitlines()[-1] and "Traceback" not in errors

"""Help and refusals of the command lines, which need no torch."""

import dataclasses
import os
import re
import resource
import subprocess
import sys

import pytest
from transformers import TrainingArguments

from hf_multipole.commands import parsers
from hf_multipole.commands.startup import SCRIPTS
from hf_multipole.integration.conversion import KINDS
from hf_multipole.modeling.options import default_of, fields_of
from hf_multipole.training.arguments import DataArguments, MaskingArguments, ModelArguments, RunArguments
from hf_multipole.training.parsing import MASKED_KINDS
from tests.helpers.processes import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("OMP_WAIT_POLICY", None)
CALLS = [["-m", "hf_multipole.commands", command] for command in parsers.COMMANDS]
CALLS += [[f"{ROOT}/scripts/{script}"] for script in SCRIPTS] + [["-m", f"scripts.{script.removesuffix('.py')}"] for script in SCRIPTS]


def answer(call, cwd):
    """Exit code, what a fresh process prints, and the modules that it imported."""
    done = subprocess.run([sys.executable, "-X", "importtime", *call], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    imported = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)
    return done.returncode, done.stdout + re.sub(r"^import time:.*\n", "", done.stderr, flags=re.MULTILINE), imported


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(call[-2:]).rpartition("/")[2])
def test_help_is_answered_at_once(call, tmp_path):
    """Without torch and Transformers, which take seconds, in less than one of the processor."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, printed, imported = answer([*call, "--help"], tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0 and printed.startswith("usage: ") and "hf_multipole.commands.parsers" in imported
    assert not {"torch", "transformers", "huggingface_hub", "numpy"} & set(imported)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian-clm"], "there is no command 'trian-clm'; did you mean 'train-clm'?"),
        (["generate", "--model", "a"], "one of the arguments --prompt --prompt-file is required"),
        (["generate", "--model", "a", "--prompt", "b", "--chunk", "0"], "argument --chunk: is 0, but must be at least 1"),
        (["generate", "--model", "a", "--prompt", "b", "--top", "1"], "unrecognized arguments: --top 1"),
        (["evaluate", "--model", "a", "--file", "b", "--context-lengths", "many", "--output", "c"], "invalid int value: 'many'"),
        (["convert", "--model", "a", "--output", "b"], "--kind multipole needs --text"),
        (["convert", "--model", "a", "--output", "b", "--kind", "tensor", "--text", "c"], "--text belongs to multipole attention"),
    ],
)
def test_refused_at_once(arguments, message, tmp_path):
    code, printed, imported = answer(["-m", "hf_multipole.commands", *arguments], tmp_path)
    assert code != 0 and message in printed.strip().splitlines()[-1] and "torch" not in imported


def test_other_processes_are_left_alone(tmp_path):
    """One that has a script of such a name, or such arguments, of its own."""
    (tmp_path / "generate.py").write_text("import os, hf_multipole\nprint(hf_multipole.__version__, os.environ.get('OMP_WAIT_POLICY'))")
    for call in (["generate.py", "--help"], ["-c", "import hf_multipole; print(hf_multipole.__version__, None)", "generate", "--help"]):
        done = subprocess.run([sys.executable, *call], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.stdout == "0.1.0 None\n", done.stderr


def help_of(capsys, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["hf-multipole", command, "--help"])
    with pytest.raises(SystemExit):
        parsers.read(None)
    # Lines are broken at spaces, and at hyphens.
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_help_of_training(capsys, monkeypatch):
    """Every option of ours with its default, and of Trainer's with that of the installed Transformers; what resuming takes."""
    text = help_of(capsys, monkeypatch, "train-mlm")
    for kind in (ModelArguments, DataArguments, RunArguments, MaskingArguments):
        for field in dataclasses.fields(kind):
            assert f"--{field.name} " in text
            if field.default not in (None, False):
                assert f"(default: {field.default})" in text.split(f" --{field.name} ")[1].split(" --")[0]
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, (default, _) in parsers.TRAINER_OPTIONS.items():
        known = getattr(defaults[name], "value", defaults[name])
        # Transformers has words for some, and chooses others in the run.
        assert default == known or (default in (None, False) and known in (None, False)), (name, default, known)
    resuming = text.split("--resume_from_checkpoint X ")[1]
    assert "true: from the newest complete checkpoint" in resuming and "intact: from the newest one whose files are" in resuming
    assert "--mlm_probability" not in help_of(capsys, monkeypatch, "train-clm")


def test_help_of_conversion(capsys, monkeypatch):
    """Every option of convert with its default."""
    text = help_of(capsys, monkeypatch, "convert")
    for name, field in fields_of("convert").items():
        assert f"--{name.replace('_', '-')} " in text
        default = default_of(field, "convert")
        if default is not None:
            assert f"({default} by default)" in text
    assert tuple(KINDS) == parsers.KINDS
    assert "(default: 0.8)" in help_of(capsys, monkeypatch, "generate") and "(default: 4)" in help_of(capsys, monkeypatch, "evaluate")


def test_all_options_of_training(capsys):
    from hf_multipole.training.parsing import parse

    with pytest.raises(SystemExit):
        parse(["--help-all"], MASKED_KINDS)
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for kind in MASKED_KINDS for field in dataclasses.fields(kind) if field.init)

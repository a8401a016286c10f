"""Interrupted runs: killed at any time they go on as if nothing had happened; damaged checkpoints are told, not used."""

import json
import os
import random
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from hf_multipole.training import checkpoints
from hf_multipole.training.trainer import LanguageModelTrainer
from tests.helpers.training_runs import arguments, history, train, train_in_a_process, write_texts

WHOLE = ["--eval_strategy", "steps", "--eval_steps", "4", "--length_warmup_steps", "6", "--length_warmup_start", "16"]
DOCUMENTS = ["--document_boundaries", "true", "--save_total_limit", "2"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


def same_run(one, other):
    assert checkpoints.damage(one / "checkpoint-12") is checkpoints.damage(other / "checkpoint-12") is None
    assert history(one, 12) == history(other, 12)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    figures = [json.loads((folder / "figures.json").read_text()) for folder in (one, other)]
    assert all(figures[0][name] == figures[1][name] for name in ("metrics", "curve", "bits_per_byte") if name in figures[0])


@pytest.mark.parametrize("kind", ["causal", "masked", "streaming"])
def test_killed_runs_go_on(texts, tmp_path, kind):
    """Killed before the first checkpoint, at a random step, in the middle of a file of a checkpoint and before its marker; the
    curve, the weights and the figures are those of the run that was left alone, to the last bit."""
    masked = kind == "masked"
    options = (*WHOLE, *DOCUMENTS, *(["--streaming", "true", "--validation_file", texts] if kind == "streaming" else []))
    train(arguments(texts, tmp_path / "whole", *options), masked)
    command = arguments(texts, tmp_path / "killed", *options)
    draw = random.Random(kind)
    faults = [("step", draw.randrange(0, 3)), ("file", 6), ("step", draw.randrange(9, 12)), ("marker", 12)]
    more = []
    for number, (fault, at) in enumerate(faults):
        code, output = train_in_a_process(command + more, tmp_path / f"log-{number}", fault, at, masked)
        assert code == -signal.SIGKILL, output
        more = ["--resume_from_checkpoint", "true"]
    assert [path.name for path in checkpoints.complete(tmp_path / "killed")] == ["checkpoint-9", "checkpoint-6"]
    assert (tmp_path / "killed" / "checkpoint-12").is_dir()
    train(command + more, masked)
    same_run(tmp_path / "whole", tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 2


def test_an_interrupted_run_says_how_to_go_on(texts, tmp_path, monkeypatch, capfd):
    """One line, before and after the first checkpoint; what goes on names its checkpoint, and no weight is missed that is another's."""
    command, step, at = arguments(texts, tmp_path / "run"), LanguageModelTrainer.training_step, 1

    def training_step(self, *given, **options):
        if self.state.global_step == at:
            raise KeyboardInterrupt
        return step(self, *given, **options)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", training_step)
    for at, line in ((1, "it has no checkpoint yet, so that the same command starts it anew"), (10, "go on from {} by the same command")):
        with pytest.raises(SystemExit) as caught:
            train(command)
        newest = tmp_path / "run" / "checkpoint-9"
        last = capfd.readouterr().err.strip().splitlines()[-1]
        assert caught.value.code == 130
        assert last.startswith(f"run_clm.py: interrupted at step {at} of 12; {line.format(newest)}")
    assert "--resume_from_checkpoint true" in last
    at, warned = None, []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *more: warned.append(text))
    train([*command, "--resume_from_checkpoint", "true"])
    assert capfd.readouterr().out.count(f"it goes on from {newest}") == 1
    assert not [text for text in warned if "missing keys" in text]


def test_missing_weights_are_told(texts, tmp_path, monkeypatch):
    """Those that are no other's."""
    command, warned = arguments(texts, tmp_path / "run", "--max_steps", "3"), []
    train(command)
    load = torch.nn.Module.load_state_dict

    def forget(self, state, *more, **options):
        return load(self, {name: x for name, x in state.items() if "norm" not in name}, *more, **options)

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", forget)
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda text, *more: warned.append(text))
    train([*command, "--resume_from_checkpoint", "true"])
    (line,) = [text for text in warned if "missing keys" in text]
    assert "norm" in line and "lm_head" not in line


def test_the_oldest_checkpoint_is_the_one_with_the_fewest_steps(texts, tmp_path, monkeypatch):
    """Whatever the clock said."""
    mark = checkpoints.mark

    def mark_late(folder):
        mark(folder)
        os.utime(folder, (4e9, 4e9 - 1e6 * int(folder.name[11:])))

    monkeypatch.setattr(checkpoints, "mark", mark_late)
    train(arguments(texts, tmp_path / "run", "--save_total_limit", "2"))
    assert [path.name for path in checkpoints.complete(tmp_path / "run")] == ["checkpoint-12", "checkpoint-9"]


@pytest.fixture(scope="module")
def stopped(texts, tmp_path_factory):
    """A run that was killed at step 10, and the whole one."""
    folder = tmp_path_factory.mktemp("stopped")
    train(arguments(texts, folder / "whole"))
    code, output = train_in_a_process(arguments(texts, folder / "run"), folder / "log", "step", 10)
    assert code == -signal.SIGKILL, output
    return folder


def refuse(command, capsys=None):
    with pytest.raises(SystemExit) as caught:
        train(command)
    message = str(caught.value.code)
    assert message.startswith("run_clm.py: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[:100]), "optimizer.pt has 100 bytes"),
        ("model.safetensors", lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), "model.safetensors is not what was written"),
        ("rng_state.pth", lambda path: path.unlink(), "rng_state.pth is missing"),
        ("complete.json", lambda path: path.write_text("{"), "its marker complete.json cannot be read"),
    ],
)
def test_damaged_checkpoints(texts, stopped, tmp_path, capsys, name, change, message):
    """One line that names the damage and the checkpoint before it; that one is used when it is asked for."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-9"
    change(newest / name)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    command = arguments(texts, tmp_path / "run")
    for request in ("true", str(newest)):
        line = refuse([*command, "--resume_from_checkpoint", request])
        assert f"checkpoint-9 is damaged: {message}" in line and "checkpoint-6" in line
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    if name == "optimizer.pt":
        train([*command, "--resume_from_checkpoint", "intact"])
        assert "checkpoint-9 is passed over" in capsys.readouterr().out
        same_run(stopped / "whole", tmp_path / "run")
        assert checkpoints.damage(newest) is None


def test_a_checkpoint_is_marked_anew_when_it_is_written_again(texts, stopped, tmp_path):
    """The marker of the old one is gone before its files are touched."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    command = [*arguments(texts, tmp_path / "run"), "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-6")]
    code, output = train_in_a_process(command, tmp_path / "log", "file", 9)
    assert code == -signal.SIGKILL, output
    assert [path.name for path in checkpoints.complete(tmp_path / "run")] == ["checkpoint-6", "checkpoint-3"]


def test_a_full_disk(texts, tmp_path):
    """The weights fit, the optimizer's state does not: one line, and what was complete stays."""
    folder = tmp_path / "run"
    command = arguments(texts, folder, "--save_steps", "3", "--max_steps", "4")
    train(command)
    size = (folder / "checkpoint-3" / "optimizer.pt").stat().st_size
    shutil.rmtree(folder)
    code, output = train_in_a_process(command, tmp_path / "log", "full disk", size - 1000)
    line = output.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in output
    assert "checkpoint-3 could not be written" in line and "there is no complete one yet" in line
    assert checkpoints.complete(folder) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "holds another run (up to checkpoint-9)"),
        (["--resume_from_checkpoint", "true", "--context_length", "32"], "was begun with context_length 64, not 32"),
        (["--resume_from_checkpoint", "nowhere"], "there is no checkpoint folder nowhere"),
        (["--resume_from_checkpoint", "true", "--output_dir", "nowhere"], "there is no run in nowhere"),
    ],
)
def test_refused(texts, stopped, more, message):
    folder = stopped / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert message in refuse([*arguments(texts, folder), *more])
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_killed_after_the_last_step(texts, stopped, tmp_path):
    """No step more is taken: what is left to do is to measure and to write."""
    command = arguments(texts, tmp_path / "run")
    code, output = train_in_a_process(command, tmp_path / "log", "end")
    assert code == -signal.SIGKILL and not (tmp_path / "run" / "model.safetensors").exists(), output
    train([*command, "--resume_from_checkpoint", "true"])
    same_run(stopped / "whole", tmp_path / "run")
    train([*command, "--resume_from_checkpoint", "true"])
    same_run(stopped / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint-13").exists()


def test_patience_goes_on(texts, tmp_path):
    """A model that learns nothing is stopped at the third evaluation, interrupted or not."""
    options = [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--save_steps",
        "1",
        "--learning_rate",
        "0",
        "--early_stopping_patience",
        "2",
    ]
    command = arguments(texts, tmp_path / "run", *options)
    code, output = train_in_a_process(command, tmp_path / "log", "step", 2)
    assert code == -signal.SIGKILL, output
    for _ in range(2):
        train([*command, "--resume_from_checkpoint", "true"])
        assert [path.name for path in checkpoints.complete(tmp_path / "run")] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]


def test_weights_alone_cannot_go_on(texts, tmp_path):
    command = [*arguments(texts, tmp_path / "run"), "--max_steps", "3", "--save_only_model", "true"]
    train(command)
    assert "holds no state of the optimizer" in refuse([*command, "--resume_from_checkpoint", "true"])


def test_an_incomplete_checkpoint_is_refused_by_name(stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-9" / checkpoints.MARKER).unlink()
    with pytest.raises(ValueError, match="is not complete: .* the newest complete one is .*checkpoint-6"):
        checkpoints.choose(tmp_path / "run", str(tmp_path / "run" / "checkpoint-9"), print)
    assert checkpoints.choose(tmp_path / "run", "true", print).name == "checkpoint-6"

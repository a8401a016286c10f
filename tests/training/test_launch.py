"""More than one process: the same losses as one at the same global batch, a run that goes on, and sharded weights."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from tests.helpers.processes import ROOT, environment, on_ranks, ranks
from tests.helpers.tiny_models import build, tokens
from tests.helpers.training_runs import arguments, history, train, train_in_two_processes, write_texts

# Without dropout, whose random numbers belong to a process.
STILL = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, block_size: 8, rank: 2}"
OPTIONS = ["--eval_strategy", "steps", "--eval_steps", "4", "--document_boundaries", "true"]
# Sums of gradients in float32, in another order, over a dozen steps.
CLOSE = {"rel": 2e-4, "abs": 2e-5}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


def same_curve(one, other, step=12):
    first, second = history(one, step), history(other, step)
    assert len(first) == len(second) >= step
    for left, right in zip(first, second):
        assert left == pytest.approx(right, **CLOSE)


@pytest.mark.parametrize("kind", ["causal", "masked", "streaming"])
@pytest.mark.slow
def test_two_processes_are_as_one(texts, tmp_path, kind):
    masked = kind == "masked"
    options = [*OPTIONS, *(["--streaming", "true", "--validation_file", texts] if kind == "streaming" else [])]
    train(arguments(texts, tmp_path / "one", *options, "--gradient_accumulation_steps", "4", config=STILL), masked)
    codes, output = train_in_two_processes(arguments(texts, tmp_path / "two", *options, config=STILL), tmp_path / "log", masked=masked)
    assert codes == [0, 0], output
    same_curve(tmp_path / "one", tmp_path / "two")
    figures = [json.loads((tmp_path / run / "figures.json").read_text())["metrics"] for run in ("one", "two")]
    assert figures[0] == pytest.approx(figures[1], **CLOSE)


@pytest.mark.slow
def test_two_killed_processes_go_on(texts, tmp_path):
    """To the last bit, dropout included; one dies in a step and one while a checkpoint is written."""
    code, output = train_in_two_processes(arguments(texts, tmp_path / "whole", *OPTIONS), tmp_path / "log")
    assert code == [0, 0], output
    command = arguments(texts, tmp_path / "killed", *OPTIONS)
    for number, fault in enumerate((("step", 4), ("file", 6))):
        codes, output = train_in_two_processes(command, tmp_path / f"log-{number}", *fault)
        assert codes[0] == -signal.SIGKILL, output
        command = arguments(texts, tmp_path / "killed", *OPTIONS, "--resume_from_checkpoint", "true")
    codes, output = train_in_two_processes(command, tmp_path / "log-last")
    assert codes == [0, 0], output
    assert history(tmp_path / "whole", 12) == history(tmp_path / "killed", 12)
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.slow
def test_torchrun(texts, tmp_path):
    """The command that is documented."""
    few = [*OPTIONS, "--max_steps", "4", "--save_steps", "4"]
    train(arguments(texts, tmp_path / "one", *few, "--per_device_train_batch_size", "2", config=STILL))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", ranks(1)[0]["MASTER_PORT"]]
    command += [str(ROOT / "scripts" / "run_clm.py"), *arguments(texts, tmp_path / "two", *few, config=STILL)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment() | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    same_curve(tmp_path / "one", tmp_path / "two", 4)


def _evaluate(environment, argv):
    os.environ |= environment
    sys.argv = ["evaluate_lm.py", *argv]
    runpy.run_module("scripts.evaluate_lm", run_name="__main__")


@pytest.mark.slow
def test_evaluation_on_two_processes(texts, tmp_path):
    """The same figures and the same reach as on one; seven rows do not divide evenly."""
    build(vocab_size=384).float().save_pretrained(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    more = ["--model", tmp_path / "model", "--file", texts, "--context-lengths", 64, "--max-tokens", 7 * 64, "--batch-size", 2]
    for count in (1, 2):
        argv = [*more, "--probes", "needle", "--cases", 3, "--output", tmp_path / f"by-{count}"]
        assert on_ranks(count, _evaluate, [str(part) for part in argv]) == [0] * count
    one, two = (json.loads((tmp_path / f"by-{count}" / "evaluation.json").read_text()) for count in (1, 2))
    assert one["contexts"]["64"]["tokens"] == two["contexts"]["64"]["tokens"] == 7 * 63
    for name in ("bits_per_byte", "token_accuracy", "loss", "perplexity"):
        assert two["contexts"]["64"][name] == pytest.approx(one["contexts"]["64"][name], rel=1e-5)
    for left, right in zip(two["probes"]["needle"]["64"], one["probes"]["needle"]["64"], strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)


def _sharded(environment, folder):
    """A few steps of a model under FSDP2, sharded block by block; the first rank gives the losses, gradients and final weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    os.environ |= environment
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = _model()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = _steps(model, slice(rank, None, 2), lambda loss: torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.AVG))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=weights)
        torch.save(losses, Path(folder) / "losses.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _model():
    return build(num_hidden_layers=2).train()


def _steps(model, share, average=lambda loss: None):
    """Losses of three steps of AdamW, each on this process' share of four rows."""
    # The loss is worked out in float32: a large eps keeps its rounding from being blown up where gradients are small.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)
    losses = []
    for step in range(3):
        ids = tokens(rows=4, n=61, seed=step)[share]
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average(loss := loss.detach())
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.slow
def test_sharded_weights(tmp_path):
    """fully_shard over two gloo ranks gives the losses and weights of one process, and a checkpoint that loads as any other."""
    assert on_ranks(2, _sharded, str(tmp_path / "sharded")) == [0, 0]
    model = _model()
    losses = _steps(model, slice(None))
    torch.testing.assert_close(torch.load(tmp_path / "sharded" / "losses.pt"), losses, rtol=1e-6, atol=1e-6)
    other = type(model).from_pretrained(tmp_path / "sharded", dtype=torch.float64)
    assert other.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configurations(path, tmp_path):
    """Every key is one that Accelerate knows, and of FSDP one that its plugin reads."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert config.num_processes == given["num_processes"] and config.use_cpu == given["use_cpu"]
    if path.stem == "fsdp2":
        from accelerate.commands.launch import launch_command_parser

        options = {action.dest for action in launch_command_parser()._actions}
        assert set(given["fsdp_config"]) <= options

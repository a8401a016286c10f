"""Model cards: one for every configuration, and none with figures that nobody measured."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import TrainingArguments

from hf_multipole import MultipoleConfig
from hf_multipole.training.arguments import DataArguments, MaskingArguments, ModelArguments, RunArguments
from hf_multipole.training.cards import command, planned, write_card
from hf_multipole.training.parsing import parse
from hf_multipole.training.report import curve
from hf_multipole.training.run import check

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_every_configuration_is_valid_and_has_its_card(path, tmp_path):
    kinds = (ModelArguments, DataArguments, RunArguments, TrainingArguments)
    values = yaml.safe_load(path.read_text())
    kinds = (*kinds, MaskingArguments) if "mlm_probability" in values else kinds
    model, data, run, training, *_ = parse(["--config", str(path), "--use_cpu", "true"], kinds)
    check(data, run, training)
    MultipoleConfig(**model.config_overrides)
    assert data.rows_are_documents or data.dataset_name
    assert training.output_dir == f"runs/{path.stem}"
    card = ModelCard.load(ROOT / "model_cards" / f"{path.stem}.md")
    assert f"configs/{path.name}" in card.text
    if "Not measured" in card.text:
        write_card(tmp_path / "card.md", planned(path))
        # Otherwise: write_card(card, planned(configuration)) writes it anew.
        assert (tmp_path / "card.md").read_text() == (ROOT / "model_cards" / f"{path.stem}.md").read_text()
        assert not card.data.eval_results


def test_the_command_does_not_tell_the_token():
    for name in ("--hub_token", "--hub-token"):
        assert command(["run.py", name, "hf_x", "--a", "b c"]) == f"python run.py {name} '***' --a 'b c'"
        assert command(["run.py", f"{name}=hf_x"]) == f"python run.py '{name}=***'"


def test_the_curve_of_a_run_that_was_resumed():
    """One point a step, the last one where a step was taken twice."""
    log = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_loss": 1.0, "eval_bits_per_byte": 1.4},
        {"step": 2, "eval_64_loss": 9.0},
        {"step": 2, "eval_loss": 1.0, "eval_bits_per_byte": 1.5},
    ]
    assert curve(log, causal=True) == [{"step": 2, "bits": 1.5}]
    assert curve(log, causal=False) == [{"step": 2, "bits": pytest.approx(1.4427, abs=1e-4)}]

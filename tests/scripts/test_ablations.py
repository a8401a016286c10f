"""The study of ablations: what it silences is silent, what it counts is there, and nothing stays behind."""

import json

import pytest
import torch

from scripts.studies import ablations
from tests.helpers.commands import run
from tests.helpers.tiny_models import BLOCK, build, tokens


def test_silenced():
    """Without any far field, far tokens do not matter; without a level, those that only it shows; afterwards all is as before."""
    model, ids = build(num_hidden_layers=1), tokens(1, 8 * BLOCK)
    other = ids.clone()
    other[0, :BLOCK] = 5  # of level 2 for the last block
    with torch.no_grad():
        before = model(ids, use_cache=False).logits

        def difference(**what):
            with ablations.silenced(model, **what):
                a, b = (model(x, use_cache=False).logits[0, -1] for x in (ids, other))
            return (a - b).abs().max().item()

        assert difference(level=1) > 1e-4
        assert difference(level=2) == difference(layer=0) == difference() == 0
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_weights():
    """They are what is left beside the weights of tokens."""
    model, ids = build(), tokens(1, 64)
    found = ablations.weights(model, [{"input_ids": ids[0].tolist()}])
    with torch.no_grad():
        attentions = model(ids, use_cache=False, output_attentions=True).attentions
    for i, shares in found.items():
        near = attentions[i][0, :, 32:, :64].sum(-1).mean().item()
        assert len(shares) == 2 and min(shares) > 0 and sum(shares) == pytest.approx(1 - near, abs=1e-6)


@pytest.mark.slow
def test_script(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("Words and numbers: 12, 3. " * 40)
    arguments = ["--models", checkpoint, "--file", "text.txt", "--context", 64, "--rows", 3, "--output", "out"]
    printed = run("scripts.studies.ablations", *arguments, cwd=tmp_path)
    (record,) = json.loads((tmp_path / "out" / "ablations.json").read_text())["models"]
    assert "| lost |" in printed and len(record["without_level"]) == 2 and len(record["weights"]) == 2
    assert (tmp_path / "out" / "ablations.md").read_text().strip() in printed
    assert "but 99 were asked for" in run("scripts.studies.ablations", *arguments[:-3], 99, "--output", "other", cwd=tmp_path, fails=True)
    for context in (16, 1024):  # no far level, and more of them than a model for 256 tokens has biases for
        short = [context if x == 64 else x for x in arguments]
        assert f"--context {context} has" in run("scripts.studies.ablations", *short[:-2], "--output", "other", cwd=tmp_path, fails=True)
    build(layer_types=["full_attention"]).save_pretrained(tmp_path / "full")
    assert "has no far bias" in run("scripts.studies.ablations", *["--models", "full", *arguments[2:]], cwd=tmp_path, fails=True)
    assert not (tmp_path / "other").exists()

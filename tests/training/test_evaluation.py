"""evaluate_lm.py and the probes: against sums by hand, and against models whose reach is known."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import ByT5Tokenizer

from hf_multipole import MultipoleForMaskedLM
from hf_multipole.training.data import pack
from hf_multipole.training.evaluation import by_position, probe, windows
from tests.helpers.tiny_models import build
from tests.helpers.training_runs import write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A causal and a masked checkpoint, and a text."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_texts(folder / "texts.jsonl")
    build(vocab_size=384).float().save_pretrained(folder / "causal")
    build(MultipoleForMaskedLM, vocab_size=384, is_causal=False).float().save_pretrained(folder / "masked")
    for name in ("causal", "masked"):
        ByT5Tokenizer(mask_token="<extra_id_0>").save_pretrained(folder / name)
    return folder


def evaluate_lm(monkeypatch, folder, output, *more, model="causal", source=None):
    import runpy
    from pathlib import Path

    script = Path(__file__).parents[2] / "scripts" / "evaluate_lm.py"
    fixed = ["--model", folder / model, *(source or ("--file", folder / "texts.jsonl")), "--output", output]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, [*fixed, *more])])
    runpy.run_path(str(script), run_name="__main__")
    return json.loads((output / "evaluation.json").read_text())["contexts"]


def test_files_that_training_holds_out(monkeypatch, folder, tmp_path):
    texts = [f"held_out = {i}\n" * (20 + i) for i in range(5)]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr("hf_multipole.training.data.standard_library", lambda root: {"code": (["training"], texts)}[root])
    sources = {"folder": ("--folder", "code"), "file": ("--file", tmp_path / "held-out.jsonl")}
    found = [evaluate_lm(monkeypatch, folder, tmp_path / name, "--context-lengths", 64, source=x)["64"] for name, x in sources.items()]
    assert found[0]["tokens"] > 0 and found[0] == found[1]
    with pytest.raises(SystemExit):
        evaluate_lm(monkeypatch, folder, tmp_path / "split", "--context-lengths", 64, "--split", "test", source=sources["folder"])


def by_hand(model, ids, start):
    """Cross-entropy of the tokens from ``start`` on, from those before them."""
    with torch.no_grad():
        scores = model(ids[None]).logits[0].log_softmax(-1)
    return [-scores[token - 1, ids[token]].item() for token in range(max(1, start), len(ids))]


@pytest.mark.parametrize("stride", [None, 24], ids=["chunks", "sliding"])
def test_figures(monkeypatch, folder, tmp_path, stride):
    model = build(vocab_size=384).float()
    rows = pack(ByT5Tokenizer(), [json.loads(line)["text"] for line in (folder / "texts.jsonl").open()], 64)
    ids = torch.tensor(np.concatenate(rows["input_ids"]))
    if stride is None:
        losses = [loss for row in ids.view(-1, 64) for loss in by_hand(model, row, 0)]
    else:
        starts = range(0, len(ids) - 64 + 1, stride)
        losses = [loss for start in starts for loss in by_hand(model, ids[start : start + 64], 40 if start else 0)]
    more = ["--stride", stride] if stride else []
    result = evaluate_lm(monkeypatch, folder, tmp_path / "out", "--context-lengths", 64, *more, "--batch-size", 3)["64"]
    assert result["tokens"] == len(losses)
    # float32 on both sides, in another order of summation.
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    # Bytes, but for the ends of texts, are tokens.
    assert result["bits_per_byte"] == pytest.approx(np.mean(losses) / math.log(2), rel=0.05)
    assert result["by_position"][0]["from"] == 0 and result["by_position"][-1]["to"] == 64
    assert (tmp_path / "out" / "loss_by_position.png").is_file()


def test_masked_and_documents(monkeypatch, folder, tmp_path):
    result = evaluate_lm(monkeypatch, folder, tmp_path / "out", "--context-lengths", 32, "--document-boundaries", model="masked")["32"]
    assert set(result) == {"perplexity", "masked_accuracy", "loss", "tokens", "by_position"}
    assert 0.05 < result["tokens"] / (32 * 30) < 0.5


@pytest.mark.parametrize(
    ("more", "model", "message"),
    [
        (["--context-lengths", 99999], "causal", "fewer than one block of 99999"),
        (["--context-lengths", 16, "--stride", 32], "causal", "at least the --stride"),
        (["--context-lengths", 16, "--stride", 8], "masked", "are for causal models"),
        (["--context-lengths", 16, "--text-column", "txt"], "causal", "no column 'txt'"),
        (["--context-lengths", 16], "nothing", "nothing"),
    ],
)
def test_refused(monkeypatch, folder, tmp_path, more, model, message):
    with pytest.raises(SystemExit) as caught:
        evaluate_lm(monkeypatch, folder, tmp_path / "out", *more, model=model)
    assert message in str(caught.value.code) and "\n" not in str(caught.value.code)
    assert not (tmp_path / "out").exists()


def test_positions():
    sums, counts = np.array([0.0, 2.0, 4.0, 6.0]), np.array([0, 1, 2, 2])
    assert sum(part["to"] - part["from"] for part in by_position(sums, counts)) == 4
    assert by_position(sums, counts)[-1] == {"from": 3, "to": 4, "loss": 3.0}


class Copier(torch.nn.Module):
    """Finds the last place within its reach at which the last two tokens stood, and says what came then."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, input_ids, **options):
        logits = torch.zeros(*input_ids.shape, 384)
        for row, ids in enumerate(input_ids.tolist()):
            for token in range(1, len(ids)):
                for back in range(1, min(self.reach, token - 1) + 1):
                    if ids[token - 1 - back : token + 1 - back] == ids[token - 1 : token + 1]:
                        logits[row, token, ids[token - back + 1]] = 20.0
                        break
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("kind", ["needle", "copy"])
def test_probes_show_the_reach(kind):
    """All is found within the reach, next to nothing beyond; in text without repetitions of its own."""
    drawn = np.random.default_rng(0)
    text = "".join(map(chr, drawn.integers(1, 128, 800)))
    rows = pack(ByT5Tokenizer(), [text], 100)
    points = probe(Copier(reach=30), rows, Accelerator(cpu=True), kind, cases=6, batch_size=8, span=12)
    near = [point for point in points if point["distance"] <= 30]
    far = [point for point in points if point["distance"] > 30]
    assert len(near) >= 2 and len(far) >= 2 and points[-1]["distance"] > 60
    # Of a copy, the first of the tokens is asked for after one token, which is not enough to know the place.
    least = 1 if kind == "needle" else 10 / 11 - 1e-6
    assert all(point["recall"] >= least and point["gain"] > 4 for point in near)
    assert all(point["recall"] < 0.3 and abs(point["gain"]) < 1 for point in far)


def test_the_heat_map(monkeypatch, folder, tmp_path):
    more = ["--context-lengths", 40, 80, "--probes", "needle", "copy", "--cases", 2, "--batch-size", 16]
    with pytest.raises(SystemExit, match="too short"):
        evaluate_lm(monkeypatch, folder, tmp_path / "short", *more)
    more[1:3] = [80, 96]
    evaluate_lm(monkeypatch, folder, tmp_path / "out", *more)
    probes = json.loads((tmp_path / "out" / "evaluation.json").read_text())["probes"]
    assert probes["needle"]["96"][-1]["distance"] == 64 and probes["copy"]["80"][0]["distance"] == 32
    assert (tmp_path / "out" / "reach.png").is_file()


def test_windows_count_every_token_once():
    rows = pack(ByT5Tokenizer(), ["a text of some length"] * 9, 16)
    for stride in (3, 8, 16):
        out = windows(rows, 32, stride)
        assert all(len(window["input_ids"]) == 32 for window in out)
        counted = sum(32 - window["score_from"] for window in out)
        assert counted == 32 + stride * (len(out) - 1) and len(rows) * 16 - counted < stride
    with pytest.raises(ValueError, match="fewer than a context"):
        windows(rows, 999, 8)

"""Rows that ask for what stood before: what is asked is there, once, at the distance given. And a miniature of the study."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.studies.recall_tasks import KEYS, NEEDLES, NOISE, TASKS, VALUES, VOCABULARY, distances, draw, item_counts


@settings(max_examples=15, deadline=None)
@given(st.integers(102, 700), st.integers(0, 2**31), st.booleans())
def test_answers_stand_before(n, seed, measured):
    n = max(n, 288) if measured else n
    ids, asked, task = draw(3, n, torch.Generator().manual_seed(seed), measured=measured)
    assert ids.shape == asked.shape == task.shape == (3, n) and 0 <= ids.min() and ids.max() < VOCABULARY
    assert torch.equal(asked > 0, task >= 0)
    for number, name in enumerate(TASKS):
        found = 0
        for row in range(3):
            answers = (task[row] == number).nonzero().flatten().tolist()
            found += len(answers)
            for at in answers:
                distance, answer, before = (x.item() for x in (asked[row, at], ids[row, at], ids[row, at - 1]))
                assert TASKS[name].nearest <= distance and (not measured or distance in distances(name, n))
                earlier = ids[row, : at - 1].tolist()
                if name == "needle":
                    # The needle of this key stands once, and the key was not asked for before.
                    key = before - NOISE - NEEDLES
                    needles = [i for i, token in enumerate(earlier) if 0 <= token - NOISE < NEEDLES and (token - NOISE) // VALUES == key]
                    assert 0 <= key < KEYS and needles == [at - 1 - distance] and before not in earlier
                    assert answer == NOISE + NEEDLES + KEYS + (earlier[needles[0]] - NOISE) % VALUES
                else:
                    # The token before stands once more, with the same answer after it.
                    assert [i for i, token in enumerate(earlier) if token == before] == [at - 1 - distance]
                    assert earlier[at - distance] == answer
        assert found <= 3 * item_counts(n)[name] * (TASKS[name].asked - 1) and found > 0


def test_rows_refused():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="at most 16 items of needle, not 17"):
        draw(1, 1024, generator, {"needle": 17})
    with pytest.raises(ValueError, match="row of 128 tokens is too short for copy at a distance of 120"):
        draw(1, 128, generator, measured=True)


# The study


@pytest.fixture
def reach(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("scripts.studies.recall")


class Finder(torch.nn.Module):
    """Knows every answer that stands within its reach."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.lm_head, self.unused = reach, torch.nn.Identity(), torch.nn.Parameter(torch.zeros(1))

    def model(self, ids, use_cache):
        hidden = torch.zeros(*ids.shape, VOCABULARY)
        hidden[..., -1] = 0.5  # a marker, which is no answer
        row, needle = ids[0].tolist(), range(NOISE, NOISE + NEEDLES)
        for at, token in enumerate(row):
            for back in range(1, min(at, self.reach) + 1):
                seen, following = row[at - back], row[at - back + 1]
                if seen in needle and (seen - NOISE) // VALUES == token - NOISE - NEEDLES:
                    hidden[0, at, NOISE + NEEDLES + KEYS + (seen - NOISE) % VALUES] = 1.0
                    break
                if seen == token:
                    hidden[0, at, following] = 1.0
                    break
        return type("Output", (), {"last_hidden_state": hidden})


def test_recall_shows_the_reach(reach):
    """All is found within the reach, nothing beyond, at every distance; the standard error is that of the items."""
    for name in TASKS:
        points = reach.recall(Finder(64), name, 320, 12)
        assert [point["distance"] for point in points] == distances(name, 320)
        assert [point["recall"] for point in points] == [float(point["distance"] <= 64) for point in points]
        assert all(0 < point["error"] < 0.5 for point in points)
    assert reach.pooled([{"distance": 64, "recall": 1.0, "error": 0.3, "items": 3}], 0, 64) == "100 ± 30"
    assert reach.pooled([{"distance": 64, "recall": 1.0, "error": 0.3, "items": 3}], 64, 128) == ""


SIZES = "--output out --train-lengths 112 --steps 3 --batch-tokens 224 --lengths 288 320 --rows 2 2 --hidden-size 8".split()


@pytest.mark.skipif(not find_spec("h_transformer_1d"), reason="h-transformer-1d is not installed")
def test_every_kind(reach, capsys):
    """A short run of every kind, first at one length: alike in size; what is there is kept; a report."""
    reach.main([*SIZES, "--tasks", "needle", "--only", "288"])
    reach.main([*SIZES, "--tasks", "copy", "induction", "--kinds", "multipole", "multipole, O(n)", "--only", "288"])
    files = sorted(Path("out").glob("*/*.json"))
    assert len(files) == 2 * (len(reach.KINDS) + 4)
    before = [path.stat().st_mtime_ns for path in files]
    reach.main([*SIZES, "--kinds", "multipole", "--report", "cards/recall.md"])
    assert [path.stat().st_mtime_ns for path in files] == before and len(list(Path("out").glob("*/*.json"))) == len(files) + 3
    training = [json.loads(path.read_text()) for path in files if path.name == "training.json"]
    parameters = [run["parameters"] for run in training if run["task"] == "needle"]
    assert max(parameters) <= 1.02 * min(parameters)
    text = " ".join(Path("cards/recall.md").read_text().split())
    assert text.count("| multipole, O(n) | 288 |") == 3 and text.count("| multipole | 320 |") == 3 and "**Partial:**" in text
    assert "; multipole (needle)" not in text and "multipole, O(n) (needle)" in text and "linear attention (copy)" in text
    assert sorted(path.name for path in Path("cards/images").iterdir()) == [f"recall-{x}.png" for x in sorted(["masses", *TASKS])]
    with pytest.raises(SystemExit, match="was made with other settings; name another --output"):
        reach.main([*SIZES, "--steps", "4", "--kinds", "multipole"])


@pytest.mark.skipif(not find_spec("h_transformer_1d"), reason="h-transformer-1d is not installed")
def test_kinds_see_what_they_should(reach):
    """Near field only: what is further away than two blocks cannot matter. In all others the first token can."""
    study = {"hidden_size": 8, "heads": 2, "train_lengths": [256]}
    reach.peers.register()
    for kind in reach.KINDS:
        torch.manual_seed(0)
        model, ids = reach.new_model(kind, study), torch.randint(VOCABULARY, (1, 256))
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, use_cache=False).logits[0, -1].square().sum().backward()
        # Layers add their reach: two near fields of at most two blocks each.
        far = embedded.grad[0, : 256 - 4 * reach.BLOCK_SIZE].abs().max().item()
        assert (far == 0) == (kind == "near field only"), kind


def test_refused(reach):
    with pytest.raises(SystemExit, match="--steps .3. must be as many.*\n--lengths .100. must be at least 272"):
        reach.main("--output out --train-lengths 112 224 --steps 3 --lengths 100 --rows 1".split())
    with pytest.raises(SystemExit, match="holds nothing that was measured"):
        reach.main(["--output", "out", "--kinds", "--report", "recall.md"])
    assert not Path("recall.md").exists()

"""Match3 and Match2: rows and labels, the constructed solution through the polynomial path, and the study's script."""

import importlib
import itertools
import json

import pytest
import torch

from hf_multipole import tensor_attention
from hf_multipole.modeling.polynomial_attention import feature_count
from scripts.studies.match3_task import best_setting, detect, draw, labels, setting, solution


def all_rows(n, modulus):
    return torch.tensor(list(itertools.product(range(modulus), repeat=n)))


# Rows and labels


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("modulus", [5, 6])
def test_labels(order, modulus):
    rows = all_rows(3, modulus)
    expected = [[any((x + sum(y)) % modulus == 0 for y in itertools.product(row, repeat=order - 1)) for x in row] for row in rows.tolist()]
    assert labels(rows, modulus, order).tolist() == expected


@pytest.mark.parametrize("order, modulus, n", [(3, 37, 32), (3, 13, 9), (2, 37, 31), (2, 7, 8)])
def test_rows(order, modulus, n):
    rows, ones = draw(200, n, modulus, order, torch.Generator().manual_seed(0))
    assert rows.shape == ones.shape == (200, n) and torch.equal(ones.bool(), labels(rows, modulus, order))
    quarters = (ones.float().mean(1) * 4).long().clamp(max=3)
    assert quarters.bincount().tolist() == [50] * 4 and quarters[:100].bincount(minlength=4).min() > 0
    if order == 3:
        # No match repeats a residue: single tokens say nothing about pairs.
        assert not ((2 * rows[:, :, None] + rows[:, None]) % modulus == 0).any()
    again, other = (draw(200, n, modulus, order, torch.Generator().manual_seed(seed))[0] for seed in (0, 1))
    assert torch.equal(rows, again) and not torch.equal(rows, other)


def test_rows_that_do_not_exist():
    with pytest.raises(ValueError, match="rows of 8 residues modulo 5 do not have labels in all 4 quarters"):
        draw(8, 8, 5, 3, torch.Generator().manual_seed(0))


# The constructed solution


@pytest.mark.parametrize("modulus", [5, 9, 37])
def test_scores_of_the_solution(modulus):
    """modulus // 2 for a match, -1/2 for any other triple, 0 with a null token."""
    row = torch.randint(modulus, (1, 7), generator=torch.Generator().manual_seed(0))
    entries, values = solution(row, modulus, nulls=2)
    scores = 4 / 3 * torch.einsum("ic,jc,kc->ijk", *[entries[0, 0]] * 3)
    expected = torch.zeros(9, 9, 9).double()
    total = row[0][:, None, None] + row[0][:, None] + row[0]
    expected[:7, :7, :7] = torch.where(total % modulus == 0, modulus // 2, -0.5)
    # Sums of 3 * modulus // 2 products of three cosines, each rounded a few times.
    assert (scores - expected).abs().max() < 3 * modulus * 10 * torch.finfo(torch.float64).eps
    assert values[0, 0, :, 0].tolist() == [1.0] * 7 + [0.0] * 2 and entries.abs().max() <= 1


PAIRS = torch.tensor([[1, 2], [1, 3], [1, 4], [2, 3]])
ROWS = {
    (5, 3): all_rows(3, 5),
    (7, 3): all_rows(3, 7),
    (5, 24): PAIRS.repeat(1, 12),
    (37, 32): draw(8, 32, 37, 3, torch.Generator().manual_seed(0))[0],
}
SETTINGS = [(torch.float64, 0.0, sizes) for sizes in ROWS] + [(torch.float32, 0.0, (5, 3)), (torch.float64, 0.1, (5, 3))]


@pytest.mark.parametrize("dtype, margin, sizes", SETTINGS)
def test_bounded_entries_detect_every_triple(dtype, margin, sizes):
    """Where the certified error is less than the margin, no label is wrong; that error is the certificate's, and the outputs hold it."""
    (modulus, n), rows = sizes, ROWS[sizes]
    chosen = best_setting(n, modulus, dtype, margin)
    assert chosen.error < chosen.margin and chosen.margin >= margin and chosen.delta < 1
    expected = labels(rows, modulus)
    assert expected.any() and not expected.all()
    options = {"method": "polynomial", "degree": chosen.degree, "entry_bound": 1.0}
    assert torch.equal(detect(rows, modulus, chosen, dtype, **options), expected)
    entries, values = (x.to(dtype) for x in solution(rows, modulus, chosen.nulls))
    arguments = entries, [entries] * 2, [values] * 2
    out, certificate = tensor_attention(*arguments, scale=4 / 3 * chosen.sharpness, causal=False, return_certificate=True, **options)
    assert certificate.error.max() <= chosen.error and certificate.delta == chosen.delta
    assert entries.shape[-1] == 3 * (modulus // 2) and feature_count(entries.shape[-1], certificate.degree) == chosen.features
    out = out[:, 0, :n, 0].double()
    assert (out[~expected] - chosen.none).abs().max() <= chosen.error and out[expected].min() >= chosen.one - chosen.error


def test_detection_and_bounded_entries_part_ways():
    """A margin of 0.1 asks for scores that grow with the row, and soon for more features than there can be."""
    bounds = [best_setting(n, 5, margin=0.1) for n in (2, 3, 4, 8)]
    assert bounds[-1] is None and bounds[0].score_bound < bounds[1].score_bound < bounds[2].score_bound
    assert bounds[0].features < bounds[1].features < bounds[2].features
    # At the same scores, the margin falls as 1 / n ** 2...
    margins = [setting(n, 5, 2, 0.01).margin for n in (16, 32)]
    assert 3.9 < margins[0] / margins[1] < 4.1
    # ...until float32 does not see it; the exact path with sharp scores finds every label of the row.
    assert best_setting(16, 5, torch.float32) is None
    rows = draw(4, 32, 37, 3, torch.Generator().manual_seed(0))[0]
    # A match weighs exp(18), and all others together 32 ** 2 * exp(-1 / 2), less than the pairs with a null token.
    sharp = best_setting(32, 37)._replace(sharpness=1.0, nulls=40, none=0.0, one=1.0)
    assert torch.equal(detect(rows, 37, sharp, torch.float32), labels(rows, 37))


# The study


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module("scripts.studies.match3")
    for name, less in {"HELD_OUT": 64, "LENGTHS": (4, 8), "TIMED": 1}.items():
        monkeypatch.setattr(script, name, less)
    return lambda *arguments: script.main(["--output", "out", *map(str, arguments)])


def test_study(study, tmp_path, capsys):
    """A short run of every kind, a report, and runs that are kept."""
    sizes = "--modulus 13 --lengths 9 10 --steps 4 --short-steps 2 --short-length 8 --batch-size 4 --hidden-size 16 --seeds 0".split()
    study(*sizes)
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 10 and capsys.readouterr().out.count("%") == 10
    before = [path.stat().st_mtime_ns for path in files]
    study(*sizes, "--report", "report.md")
    assert [path.stat().st_mtime_ns for path in files] == before
    figures = [json.loads(path.read_text())["figures"] for path in files]
    parameters = [found["parameters"] for found in figures]
    assert max(parameters) <= 1.01 * min(parameters) and {len(found["curve"]) for found in figures} == {4, 2}
    text = (tmp_path / "report.md").read_text()
    assert "--output out --modulus 13 --lengths 9 10 --steps 4" in text and "| match3 | tensor | " in text
    assert (tmp_path / "images" / "report.png").is_file()
    with pytest.raises(SystemExit, match="was made with other settings"):
        study(*sizes, "--steps", 5)


def test_study_refuses(study, tmp_path):
    with pytest.raises(SystemExit, match="--modulus 8 must be odd.*\n--lengths .9, 8. must ascend.*\n--steps 0"):
        study("--modulus", 8, "--lengths", 9, 8, "--steps", 0)
    with pytest.raises(SystemExit, match="holds no runs"):
        study("--kinds", "--report", "report.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

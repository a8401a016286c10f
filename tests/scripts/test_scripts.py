"""The scripts, as someone runs them: a short run of each that no other test covers, and what they refuse."""

import json

import pytest
import torch

from tests.helpers.commands import run


@pytest.mark.slow
def test_benchmark_of_generation(tmp_path):
    sizes = ["--heads", 2, "--head-dim", 8, "--block-size", 8, "--rank", 2, "--layers", 1, "--repeats", 1, "--threads", 1]
    lengths = ["--contexts", 100, "--batch-context", 60, "--batch", 3, "--prompts", 100, "--tokens", 2000]
    run("scripts.benchmarks.generation", *sizes, *lengths, "--clock", "processor", "--output", "out", cwd=tmp_path)
    record = json.loads((tmp_path / "out" / "benchmark-generation.json").read_text())
    assert [(r["context"], r["batch"]) for r in record["steps"]] == [(60, 3), (100, 1)]
    assert record["steps"][0]["full"]["bytes"] == 3 * 2 * 2 * 60 * 8 * 4
    assert all(0 < r[kind]["floor"] < r[kind]["seconds"] for r in record["steps"] for kind in ("multipole", "multipole_linear", "linear"))
    assert len(record["writing"]["multipole"]["seconds_per_1000"]) == 2
    assert "must be at least 2000" in run("scripts.benchmarks.generation", "--tokens", 10, cwd=tmp_path, fails=True)


@pytest.mark.slow
def test_benchmark_of_tensor_attention(tmp_path):
    lengths = ["--lengths", 20, "--window-lengths", 40, "--polynomial-lengths", 40, "--window", 3, 9, "--repeats", 1, "--threads", 1]
    run("scripts.benchmarks.tensor", *lengths, "--output", "out", cwd=tmp_path)
    record = json.loads((tmp_path / "out" / "benchmark-tensor.json").read_text())
    assert {result["part"] for result in record["results"]} == {"exact", "window", "polynomial"}
    if not torch.cuda.is_available():
        assert "--device cuda: PyTorch finds no CUDA device" in run(
            "scripts.benchmarks.tensor", "--device", "cuda", cwd=tmp_path, fails=True
        )
    assert "--repeats 0 must be positive" in run("scripts.benchmarks.tensor", "--repeats", 0, cwd=tmp_path, fails=True)


@pytest.mark.slow
def test_tensor_tradeoff(tmp_path):
    """A bound that has a polynomial, and ones that have none; a second report takes the times of the first."""
    sizes = ["--orders", 3, "--score-dim", 2, "--value-dim", 2, "--tuples", 512, "--numbers", 512, "--repeats", 1, "--output", "out"]
    printed = run("scripts.benchmarks.tensor_tradeoff", *sizes, "--bounds", 1, 3, 9, cwd=tmp_path)
    record = json.loads((tmp_path / "out" / "tensor-tradeoff.json").read_text())
    assert {job["degree"] for job in record["times"]} >= {None, 4} and all(job["seconds"] > 0 for job in record["times"])
    assert "| 3 | 1 | 1 | 4 | 15 | float32 | 5.0e-04 |" in printed
    assert "| 3 | 3 | 27 | none: delta is 1 even at degree 24 |" in printed and "none: scores beyond 80 are refused" in printed
    run("scripts.benchmarks.tensor_tradeoff", *sizes, "--bounds", 0.5, "--report", "again.md", cwd=tmp_path)
    assert "| 3 | 0.5 | 0.125 | 2 | 6 | float32 |" in (tmp_path / "again.md").read_text()
    assert json.loads((tmp_path / "out" / "tensor-tradeoff.json").read_text()) == record


@pytest.mark.slow
def test_support_table(tmp_path):
    """One architecture of each kind; what was tried is kept."""
    names = ["llama", "mistral", "bert", "bloom", "gpt_oss", "llava", "sew"]
    run("scripts.studies.support", "--output", "support.md", "--only", *names, cwd=tmp_path)
    found = json.loads((tmp_path / "support.json").read_text())["results"]
    statuses = {name: result["status"] for name, result in found.items()}
    expected = {
        "llama": "runs",
        "mistral": "runs",
        "bert": "runs",
        "bloom": "refused",
        "gpt_oss": "refused",
        "llava": "not tried",
        "sew": "not tried",
    }
    assert statuses == expected
    assert found["llama"] | {"convert": "yes", "state": "yes", "multipole layers": 2, "window layers": 0} == found["llama"]
    assert "s_aux" in found["gpt_oss"]["reason"]
    table = (tmp_path / "support.md").read_text()
    assert "| llama | causal | 2 + 0 | yes | yes |" in table
    # All of its layers have a window by default.
    assert "| mistral (sliding_window=None) | causal | 2 + 0 | yes | yes |" in table


@pytest.mark.parametrize("causal", [True, False])
def test_drawn_pattern_covers_every_token_once(causal):
    pytest.importorskip("matplotlib")
    from scripts.studies.drawings import cells

    seen = torch.zeros(96, 96)
    for query, queries, key, keys in (cell for found in cells(96, 8, 2, causal).values() for cell in found):
        seen[query : query + queries, key : key + keys] += 1
    torch.testing.assert_close(seen, torch.ones(96, 96).tril() if causal else torch.ones(96, 96))


def test_pattern_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run("scripts.studies.drawings", "--tokens", 32, "--output", "images/pattern.png", cwd=tmp_path)
    assert (tmp_path / "images" / "pattern.png").stat().st_size > 1000
    assert "multiple of --block-size" in run("scripts.studies.drawings", "--tokens", 33, "--output", "x.png", cwd=tmp_path, fails=True)

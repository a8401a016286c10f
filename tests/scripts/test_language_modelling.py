"""The study of language modelling: a miniature, interrupted and continued; what it refuses; its statistics; its peers."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from hf_multipole.training import checkpoints
from scripts.common import peers
from scripts.common.measuring import machine
from scripts.studies import language_modelling as study
from scripts.studies import language_modelling_report as report
from tests.helpers.processes import ROOT, environment
from tests.helpers.training_runs import write_texts

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "block_size": 8, "rank": 2}


def write_study(folder, **changed):
    base = {
        "train_file": write_texts(folder / "texts.jsonl"),
        "validation_split_percentage": 20,
        "context_length": 64,
        "eval_rows": 2,
        "test_rows": 2,
        "config_overrides": SIZES,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "save_steps": 10,
        "use_cpu": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    rows = {"multipole": {}, "linear": {"attn_implementation": "peer_linear", "config_overrides": {"layer_types": ["full_attention"]}}}
    content = {"base": base, "rows": rows, "budgets": {"short": 6}, "contexts": [32], "seeds": [0]} | changed
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def begin(folder):
    command = [sys.executable, "-m", "scripts.studies.language_modelling", "mini.yaml", "--report", "mini.md", "--jobs", "2"]
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_study_interrupted_and_continued(tmp_path):
    """Ended where one run has a checkpoint: that run goes on from it, and the results are those of two whole runs."""
    path = write_study(tmp_path, budgets={"short": 40})
    folders = [tmp_path / "runs" / "mini" / row / "short-32-0" for row in ("multipole", "linear")]
    process = begin(tmp_path)
    limit = time.monotonic() + 100
    while not any(checkpoints.complete(folder) for folder in folders):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "interrupted; the same command goes on" in process.communicate(timeout=60)[1]
    assert process.returncode == 1 and not all((folder / "figures.json").is_file() for folder in folders)
    before = {path / checkpoints.MARKER for folder in folders for path in checkpoints.complete(folder)}
    written = {marker: marker.stat().st_mtime_ns for marker in before}

    out, errors = begin(tmp_path).communicate(timeout=200)
    assert "wrote mini.md" in out, errors
    # What was there was gone on from, not made again.
    assert written and all(marker.stat().st_mtime_ns == time_ns for marker, time_ns in written.items())
    record = json.loads((tmp_path / "runs" / "mini" / "results.json").read_text())
    assert [run["row"] for run in record["runs"]] == ["multipole", "linear"]
    for run, folder in zip(record["runs"], folders):
        figures = json.loads((folder / "figures.json").read_text())
        assert run["metrics"] == figures["metrics"] and 0 < run["metrics"]["bits_per_byte"] < 8
        assert [point["step"] for point in run["curve"]] == [10, 20, 30, 40]
        assert (
            run["seconds_per_step"] > 0
            and run["cpu_seconds_per_step"] > 0
            and run["peak_memory"] > 1e7
            and run["by_position"][-1]["to"] == 32
        )
    text = (tmp_path / "mini.md").read_text()
    assert f"| linear | {record['runs'][1]['metrics']['bits_per_byte']:.4f} | 1 |" in text and "2 of 2 runs are done" in text
    assert all(run.done for run in study.plan(path, tmp_path / "runs" / "mini")[0])


def test_the_plan(tmp_path):
    """Every context has as many tokens a step; rows may keep to some of the grid; the short and the first come first."""
    grids = [{"seeds": [1], "contexts": [64]}, {"budgets": ["long"], "seeds": [1]}]
    rows = {"multipole": {}, "rank 4": {"config_overrides": {"rank": 4}, "grids": grids}}
    path = write_study(tmp_path, rows=rows, budgets={"short": 6, "long": 12}, contexts=[32, 64], seeds=[0, 1])
    runs, _ = study.plan(path, tmp_path / "out")
    assert [(run.row, run.budget, run.context, run.seed) for run in runs[:5]] == [
        ("multipole", "short", 32, 0),
        ("multipole", "short", 64, 0),
        ("multipole", "short", 32, 1),
        ("multipole", "short", 64, 1),
        ("rank 4", "short", 64, 1),
    ]
    assert len(runs) == 11 and len({run.folder for run in runs}) == 11
    for run in runs:
        assert run.values["per_device_train_batch_size"] * run.values["context_length"] == 128
        assert run.values["max_steps"] == {"short": 6, "long": 12}[run.budget] and run.values["seed"] == run.seed
    assert runs[4].values["config_overrides"] == SIZES | {"rank": 4}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"row": {}}, "unknown key 'row'; did you mean 'rows'"),
        ({"seeds": []}, "needs seeds: a list"),
        ({"rows": {"a": {"learning_rat": 1}}}, "row 'a' of .* unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"rows": {"a": {"config_overrides": {"blocksize": 8}}}}, "row 'a' of .* unknown key 'blocksize'; did you mean 'block_size'"),
        ({"rows": {"a": {"config_overrides": {"rank": 3}}}}, "row 'a' of .*rank"),
        ({"rows": {"a": {"attn_implementation": "peer_liner"}}}, "unknown key 'peer_liner'; did you mean 'peer_linear'"),
        ({"rows": {"a": {"seed": 1}}}, "has seed, which the study decides"),
        ({"rows": {"a": {"grids": [{"seeds": [5]}]}}}, "has seeds 5, but the study's are 0"),
        ({"rows": {"a": {"grids": {"seeds": [0]}}}}, "grids of row 'a' of .* must be a list"),
        ({"rows": {"a": {"grids": [{"seed": [0]}]}}}, "grids of row 'a' of .* unknown key 'seed'; did you mean 'seeds'"),
        ({"rows": {"a": {"grids": [{"seeds": []}]}}}, "seeds in grids of row 'a' of .* not empty"),
        ({"rows": {"a b": {}, "A-b": {}}}, "'A-b, short, .*' and 'a b, short, .*' have one folder"),
        ({"budgets": {"short": 0}}, "budgets of .* has 0, but they are whole numbers"),
        ({"seeds": [1, 1]}, "seeds of .* has 1 twice"),
        ({"contexts": [48]}, "no multiple of the context 48"),
    ],
)
def test_refused_before_anything_runs(tmp_path, changed, message):
    path = write_study(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        study.plan(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_of_this_repository(path, tmp_path, monkeypatch):
    """They can be listed without the packages that some rows need; to run one, the package that is missing is named."""
    monkeypatch.setattr(peers.Peer, "installed", lambda peer: peer.package is None)
    runs, _ = study.plan(path, tmp_path)
    controls = {"near field only"} if "saliency" in path.stem else {"multipole", "near field only", "full attention"}
    assert controls <= {run.row for run in runs}
    assert len({run.folder for run in runs}) == len(runs)
    needing = [run for run in runs if run.values.get("attn_implementation") == "peer_local"]
    if needing:
        with pytest.raises(ValueError, match="row 'local attention' needs local-attention: pip install"):
            study.refuse_what_is_missing(needing)
    study.refuse_what_is_missing([run for run in runs if run.values.get("attn_implementation", "peer_linear") == "peer_linear"])


def test_a_row_that_changed_is_refused(tmp_path):
    (run,), _ = study.plan(write_study(tmp_path, rows={"a": {}}), tmp_path / "out")
    run.folder.mkdir(parents=True)
    (run.folder / "configuration.yaml").write_text(yaml.safe_dump(run.values))
    path = write_study(tmp_path, rows={"a": {"learning_rate": 0.02}})
    with pytest.raises(ValueError, match="was begun with learning_rate 0.01, not 0.02"):
        study.plan(path, tmp_path / "out")


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (10, 2.2281), (100, 1.9840)])
def test_student_t(freedom, value):
    assert report.t_of(freedom) == pytest.approx(value, rel=1e-4)


def test_what_can_be_told_apart(tmp_path):
    """Differences at equal seeds; s pooled over rows with several of them, and bold where a mean is beyond t s / sqrt(seeds)."""
    values = {"first": [1.0, 1.1, 1.2], "near": [1.01, 1.13, 1.22], "far": [1.05], "apart": [2.0, 2.12, 2.2], "same": [1.001, 1.101, 1.201]}
    common = {"parameters": 10, "seconds_per_step": 0.5, "cpu_seconds_per_step": 0.4, "peak_memory": 2e6}
    common |= {"curve": [{"step": step, "bits": 3 - 0.1 * step} for step in (4, 8, 16)]}
    common |= {"by_position": [{"from": 0, "to": 8, "loss": 9.0}, {"from": 8, "to": 14, "loss": 2.0}, {"from": 14, "to": 16, "loss": 4.0}]}
    rows = {
        row: [{"seed": i, "metrics": {"bits_per_byte": x, "perplexity": 2 * x}} | common for i, x in enumerate(several)]
        for row, several in values.items()
    }
    apart = report.differences(rows, "first", "bits_per_byte")
    expected = {"near": [0.01, 0.03, 0.02], "far": [0.05], "apart": [1.0, 1.02, 1.0], "same": [0.001] * 3}
    assert apart == {row: pytest.approx(several) for row, several in expected.items()}
    # Variances of near and apart; "same" does not vary at all, and is left out.
    s = math.sqrt((2 * 0.01**2 + 2 * 0.02**2 / 3) / 4)
    assert report.pooled(apart) == (pytest.approx(s), 4)
    text = report.comparison(rows, "first", "bits_per_byte")
    one, three = 2.77645 * s, 2.77645 * s / math.sqrt(3)
    assert f"over one seed counts from {one:.4f} on, over 3 seeds from {three:.4f} on" in text and "4 degrees of freedom" in text
    assert "| near | 1.1200 ± 0.1054 | 3 | **+0.0200** |" in text
    assert (
        f"| far | 1.0500 | 1 | **+0.0500** | 2.100 | {2.5 / math.log(2):.3f} | {100 * (1 - 1.4 / 1.8):.1f} | 10 | 0.5 | 0.4 | 2 |" in text
    )
    rows |= {"near": rows["near"][1:2], "apart": rows["apart"][:1], "same": rows["same"][:1]}
    assert "counts from" not in report.comparison(rows, "first", "bits_per_byte")
    rows["first"] = rows["first"][2:]
    assert "| near | 1.1300 | 1 |  |" in report.comparison(rows, "first", "bits_per_byte")  # no seed in common


def test_the_report_of_a_masked_study(tmp_path):
    """Two seeds of one row, one of the other, at two contexts; a budget that nobody has begun is left out."""
    path = write_study(tmp_path, budgets={"short": 6, "long": 9}, contexts=[32, 64], seeds=[0, 1])
    content = yaml.safe_load(path.read_text())
    content["base"]["mlm_probability"] = 0.2
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    runs, rows = study.plan(path, tmp_path / "out")
    for run in (run for run in runs if run.budget == "short" and (run.row, run.seed) != ("linear", 1)):
        run.folder.mkdir(parents=True)
        accuracy = 0.5 + 0.1 * run.seed + (run.row == "linear")
        figures = {
            "parameters": 10,
            "metrics": {"masked_accuracy": accuracy, "perplexity": 4 * accuracy},
            "seconds_per_step": None,
            "cpu_seconds_per_step": None,
            "peak_memory": None,
        }
        figures |= {"curve": [{"step": 3, "bits": 2.0}], "by_position": [{"from": 0, "to": run.context, "loss": 1.0}]}
        (run.folder / "figures.json").write_text(json.dumps(figures))
    record = {"command": "python -m scripts.studies.language_modelling mini.yaml", "machine": machine(), "runs": report.results(runs)}
    report.write_report("mini", runs, rows, record, tmp_path / "mini.md")
    assert json.loads((tmp_path / "mini.json").read_text())["runs"][0]["metrics"] == record["runs"][0]["metrics"]
    text = (tmp_path / "mini.md").read_text()
    assert text.count("| multipole | 0.5500 ± 0.0707 | 2 |  | 2.200 | 1.443 |  | 10 |  |  |  |") == 2
    assert "6 of 16 runs are done" in text and "## long" not in text
    assert text.count("| linear | 1.5000 | 1 | +1.0000 | 6.000 | 1.443 |  | 10 |  |  |  |") == 2
    assert {image.name for image in (tmp_path / "images").iterdir()} == {"mini.png", "mini-curves.png", "mini-positions.png"}


# Peers


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", list(peers.PEERS))
def test_peers(name, causal):
    """Finite, and without a gradient from the future; the exact one among them is that, and linear attention its definition."""
    peer = peers.PEERS[name]
    if not peer.installed() or (name == "peer_nystrom" and causal):
        pytest.skip(f"{peer.package} is not installed" if not peer.installed() else "bidirectional")
    torch.manual_seed(0)
    n, at = 256, 90
    q, k, v = (torch.randn(2, 2, n, 8, dtype=torch.float64).float().requires_grad_() for _ in range(3))
    out = peer.attention(q, k, v, causal, 0.3)
    assert out.shape == v.shape and out.isfinite().all()
    grads = torch.autograd.grad(out[:, :, at].sum(), (k, v))
    assert all(not grad[:, :, at + 1 :].any() for grad in grads) == causal and all(grad[:, :, at - 3 : at].any() for grad in grads)
    token = torch.arange(n)
    seen = token <= token[:, None] if causal else torch.ones(n, n, dtype=torch.bool)
    if name == "peer_alibi":
        logits = q @ k.mT * 0.3 - torch.tensor([2.0**-4, 2.0**-8])[:, None, None] * (token[:, None] - token).abs()
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    elif name == "peer_linear":
        weights = ((torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT) * seen
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        return
    torch.testing.assert_close(out, weights @ v, rtol=1e-4, atol=1e-5)
    if name == "peer_linear" and causal:
        with torch.no_grad():
            sums = torch.zeros(2, 2, 8, 9)
            steps = [peers.linear_step(*(x[:, :, t : t + 1] for x in (q, k, v)), sums) for t in range(n)]
            torch.testing.assert_close(torch.cat(steps, 2), weights @ v, rtol=1e-4, atol=1e-5)


def test_peers_refuse():
    with pytest.raises(ValueError, match="future included"):
        peers.nystrom(*(torch.randn(1, 1, 8, 4) for _ in range(3)), True, 1.0)
    with pytest.raises(ValueError, match="no padding"):
        peers.mask_function(attention_mask=torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match="no packed documents"):
        peers.mask_function(mask_function=lambda *a: True)


@pytest.mark.parametrize("peer", ["nystrom", "h_transformer_1d"])
def test_peers_refuse_rows_that_they_would_pad(peer):
    with pytest.raises(ValueError, match="attend to its own padding"):
        getattr(peers, peer)(*(torch.randn(1, 1, 65, 4) for _ in range(3)), False, 1.0)

"""The study of approximation: a miniature run; the baselines against their definitions; the costs against what is counted in weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from hf_multipole import MultipoleForCausalLM, MultipoleForMaskedLM
from hf_multipole.integration.measurement import replaced_attention
from hf_multipole.modeling.calls import Call
from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.multipole_attention import aligned_attention
from hf_multipole.modeling.options import MultipoleOptions
from scripts.studies import approximation, approximation_report
from scripts.studies import approximation_baselines as baselines
from tests.helpers.stock_models import GROUPED
from tests.helpers.tiny_models import build
from tests.helpers.training_runs import write_texts

SCALE = 0.4
DIRECTIONS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def tokens(n=75, heads=2, dim=8):
    torch.manual_seed(n)
    return [torch.randn(2, heads, n, dim, dtype=torch.float64) for _ in range(3)]


def dense(q, k, causal):
    logits = q @ k.mT * SCALE
    seen = torch.ones_like(logits, dtype=torch.bool)
    return logits.masked_fill(~(seen.tril() if causal else seen), -torch.inf).softmax(-1)


def identity(n):
    """Values whose output is the attention matrix itself."""
    return torch.eye(n, dtype=torch.float64).expand(2, 2, n, n)


@DIRECTIONS
@pytest.mark.parametrize("n", [16, 60, 75, 128])
def test_costs_of_multipole_attention(n, causal):
    """As many columns as have a weight, which none of random queries and keys is without, and what the summaries take."""
    for block_size, rank in ((8, 1), (8, 2), (8, 8), (16, 4)):
        q, k, v = tokens(n)
        _, weights = aligned_attention(
            q, k, v, None, Call(MultipoleOptions(block_size=block_size, rank=rank), causal=causal), return_weights=True
        )
        counted = (weights > 0).sum().item() / (4 * n)
        summaries, width = 0, block_size
        while n > 4 * width:
            # Those that are made into further ones.
            summaries += rank * -(-n // width)
            width *= 2
        for learned in (False, True):
            made = (rank if learned else 1) * (1 + summaries / n) if n > 2 * block_size else 0
            assert baselines.multipole_cost(n, causal, block_size, rank, False, learned) == pytest.approx(counted + made)


@DIRECTIONS
def test_costs_of_the_linear_form(causal):
    """Near tokens, one column for what arrives, and the summaries that the queries of the segments see: lists written out."""
    n, block_size, rank = 100, 8, 2
    columns, summaries, levels = n, 0, level_count(n, block_size)
    for token in range(n):
        columns += sum(abs(token // block_size - other // block_size) < 2 and (other <= token or not causal) for other in range(n))
    for level in range(levels):
        width = block_size << level
        groups = range(-(-n // width))
        pairs = [(i, j) for i in groups for j in groups if abs(i - j) > 1 and abs(i // 2 - j // 2) < 2 and (j < i or not causal)]
        segments = [sum(first < n for first in range(i * width, (i + 1) * width, width // rank)) for i in groups]
        columns += sum(segments[i] * segments[j] for i, j in pairs)
        summaries += rank * len(groups) if level < levels - 1 else 0
    for learned in (False, True):
        made = (rank if learned else 1) * (n + summaries) * (1 if causal else 1.5)
        assert baselines.multipole_cost(n, causal, block_size, rank, True, learned) == pytest.approx((columns + made) / n)


@DIRECTIONS
def test_window(causal):
    """The nearest tokens alone, as many in the mean as asked for, also across the pieces that it is computed in; all of them: exact."""
    q, k, _ = tokens(n := 600)
    v = identity(n)
    for cost in (1, 20.0, 100.5, n):
        out = baselines.window(q, k, v, causal, SCALE, [cost])[0]
        seen = out > 0
        assert seen.sum(-1).double().mean() == pytest.approx(min(cost, (n + 1) / 2 if causal else n), abs=1)
        exact = dense(q, k, causal) * seen
        torch.testing.assert_close(out, exact / exact.sum(-1, keepdim=True))
        distance = torch.arange(n)[:, None] - torch.arange(n)
        assert (distance[seen[0, 0]] >= 0).all() if causal else (seen.sum(-1) == min(n, round(cost))).all()
        # Without a gap: a query's own token, and those up to the farthest that it sees.
        assert (seen.diff(dim=-1).sum(-1) <= 2).all() and seen.diagonal(dim1=-2, dim2=-1).all()


@DIRECTIONS
def test_largest_weights(causal):
    q, k, _ = tokens()
    v, wanted = identity(75), dense(q, k, causal)
    for cost, out in zip((7.0, 2.0, 75.0), baselines.largest(q, k, v, causal, SCALE, [7.0, 2.0, 75.0])):
        count = baselines.tokens_at(75, causal, cost)
        kept = wanted * (wanted >= wanted.sort(-1, descending=True).values[..., count - 1, None])
        torch.testing.assert_close(out, kept / kept.sum(-1, keepdim=True))
        assert (out > 0).sum(-1).double().mean() == pytest.approx(min(cost, 38 if causal else 75), abs=1)


@DIRECTIONS
def test_low_rank(causal):
    """The error of a truncated singular value decomposition, which no matrix of that rank is under."""
    q, k, _ = tokens()
    wanted = dense(q, k, causal)
    sizes = torch.linalg.svdvals(wanted)
    for rank, out in zip((3, 20, 75), baselines.low_rank(q, k, identity(75), causal, SCALE, [3, 20, 75])):
        assert torch.linalg.matrix_rank(out, rtol=1e-9).max() <= rank
        error, least = (out - wanted).square().sum((-2, -1)), sizes[..., rank:].square().sum(-1)
        assert (error <= least * 1.02 + 1e-20).all() and (error >= least * (1 - 1e-9) - 1e-20).all()


def test_nystrom():
    """Its formula; with one landmark, the same for all queries; and the iteration, which goes to the inverse."""
    q, k, v = tokens()
    some, one = baselines.nystrom(q, k, v, False, SCALE, [11, 3])
    few_q, few_k = (torch.stack([part.mean(2) for part in x.split(15, 2)], 2) for x in (q, k))
    left, middle, right = dense(q, few_k, False), dense(few_q, few_k, False), dense(few_q, k, False)
    inverse = torch.stack([torch.stack([baselines.pseudo_inverse(matrix) for matrix in row]) for row in middle])
    torch.testing.assert_close(some.double(), left @ inverse @ right @ v, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.double(), (dense(q.mean(2, keepdim=True), k, False) @ v).expand_as(v), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(baselines.pseudo_inverse(middle[0, 0], 40), torch.linalg.inv(middle[0, 0]))
    with pytest.raises(ValueError, match="the future included"):
        baselines.nystrom(q, k, v, True, SCALE, [11])


@DIRECTIONS
@pytest.mark.parametrize("n", [64, 75])
def test_exact_weights_of_segments(n, causal):
    """Near, the attention matrix itself; far, its sums over each segment, evenly over the segment."""
    q, k, _ = tokens(n)
    out, wanted = baselines.weighed_segments(q, k, identity(n), causal, SCALE, 8, 2), dense(q, k, causal)
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]))
    token = torch.arange(n)
    near = (token[:, None] // 8 - token // 8).abs() < 2
    torch.testing.assert_close(out * near, wanted * near)
    for query, first, width in ((50, 32, 4), (50, 24, 8), (50, 0, 8), (20, 0, 4)):
        segment = slice(first, first + width)
        torch.testing.assert_close(out[..., query, segment], wanted[..., query, segment].mean(-1, keepdim=True).expand(-1, -1, width))


@DIRECTIONS
def test_replaced_attention(causal):
    """Exact attention in its place changes nothing; grouped keys are repeated; and the errors are those of layer_errors."""
    cls = MultipoleForCausalLM if causal else MultipoleForMaskedLM
    model = build(cls, layer_types=["full_attention"] * 2, is_causal=causal)
    ids = torch.randint(3, 50, (2, 75), generator=torch.Generator().manual_seed(0))
    seen = []

    def attend(name, q, k, v, is_causal, scale):
        seen.append((name, tuple(k.shape), is_causal, scale))
        return baselines.exact(q, k, v, is_causal, scale)

    with torch.no_grad():
        wanted = model(ids).logits
        with replaced_attention(model, attend):
            got = model(ids, **({"use_cache": False} if causal else {})).logits
        torch.testing.assert_close(got, wanted)
        assert seen == [(f"model.layers.{i}.self_attn", (2, 4, 75, 8), causal, 8**-0.5) for i in range(2)]
        assert torch.equal(model(ids).logits, wanted) and not hasattr(model.config, "multipole")
        with replaced_attention(model, attend), pytest.raises(ValueError, match="in whole rows"):
            model(ids, attention_mask=(torch.arange(75) > 3).expand(2, -1).long(), **({"use_cache": False} if causal else {}))


@DIRECTIONS
@pytest.mark.parametrize("linear", [False, True], ids=["n log n", "linear"])
@pytest.mark.parametrize("summary", ["mean", "hierarchical"])
def test_fit(summary, linear, causal):
    """From the error of means to a smaller one; a bias alone serves all rows alike, so that these are the rows that it was fitted to."""
    q, k, v = (2 * x for x in tokens(64))
    exact = baselines.exact(q, k, v, causal, SCALE)
    options = MultipoleOptions(8, 2, summary, far_bias_init=0.0)
    with torch.random.fork_rng():
        far_field = approximation.fit(SimpleNamespace(fit_steps=30), (q, k, v, causal, SCALE), exact, options, linear)
    sizes = (q, k, v, causal, SCALE, 8, 2, linear)
    means, fitted = ((out - exact).norm() for out in (baselines.multipole(*sizes), baselines.multipole(*sizes, far_field)))
    assert fitted < 0.98 * means and not any(x.requires_grad for x in far_field.parameters())


def test_a_miniature(tmp_path, monkeypatch):
    """Both directions; what was measured is taken again; what someone wrote above the figures stays."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    models = {"causal": LlamaForCausalLM(LlamaConfig(**GROUPED | {"vocab_size": 384}))}
    models["masked"] = build(MultipoleForMaskedLM, vocab_size=384, layer_types=["full_attention"] * 2, is_causal=False).float()
    for name, model in models.items():
        model.save_pretrained(name)
        ByT5Tokenizer(mask_token="<extra_id_0>").save_pretrained(name)
    sizes = ["--context", 64, "--tokens", 128, "--fit-tokens", 128, "--fit-steps", 8, "--block-sizes", 8, "--ranks", 1, 4, "--learned"]
    text = write_texts(tmp_path / "texts.jsonl", 40)
    command = ["--models", "causal", "masked", "--file", text, *sizes, "8/4", "--output", "out", "--report", "report.md"]
    command = [str(part) for part in command]
    approximation.main(command)
    for name in models:
        record = json.loads(Path("out", f"{name}.json").read_text())
        own = {x["family"]: x for x in record["errors"] if x.get("rank") == 4}
        assert set(own) == set(approximation_report.MULTIPOLE)
        assert all(len(x["layers"]) == 2 and len(x["positions"][0]) == 16 and 0 < min(x["layers"]) for x in own.values())
        # In causal rows two blocks are seen without an error, up to rounding.
        assert name == "masked" or all(x < 1e-5 for layer in own["means"]["positions"] for x in layer[:4])
        assert record["whole"][0]["family"] == "exact" and all(x["bits"] > 0 for x in record["whole"])
        assert any(x["family"] == "Nystroem" for x in record["whole"]) == (name == "masked")

    kept, report = Path("out/causal.json"), Path("report.md")
    before, written = kept.stat().st_mtime_ns, report.read_text()
    report.write_text(written.replace("## Figures", "What it means.\n\n## Figures"))
    approximation.main(command)
    assert report.read_text() == written.replace("## Figures", "What it means.\n\n## Figures") and kept.stat().st_mtime_ns == before
    assert {image.name for image in Path("images").iterdir()} == {"report.png", "report-where.png"}
    with pytest.raises(SystemExit, match="causal.json was measured with other options"):
        approximation.main([*command, "--fit-steps", "9"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--models": "nothing"}, "there is no checkpoint nothing"),
        ({"--learned": "8/2"}, "--learned 8/2 is not among"),
        ({"--tokens": "0"}, "--tokens must be positive"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_refused_before_anything_is_computed(tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    options = {"--models": "model", "--folder": "stdlib", "--output": "out", "--learned": "16/4"} | changed
    with pytest.raises(SystemExit, match=message):
        approximation.main([x for pair in options.items() for x in pair])
    assert not Path("out").exists()

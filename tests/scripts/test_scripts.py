"""The scripts, as someone runs them: a short run of each that no other test covers, and what they refuse."""

import json
import math

import pytest
import torch

from tests.helpers.commands import run
from tests.helpers.tiny_models import build


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


def test_generate_with_a_state(checkpoint, tmp_path):
    """A text read at once, and the same text read in two runs, go on in the same way."""
    greedy = ["--model", checkpoint, "--temperature", 0, "--max-new-tokens", 12]
    whole = run("scripts.generate", *greedy, "--prompt", "a long text, and a question", cwd=tmp_path)
    first = ["--model", checkpoint, "--prompt", "a long text, and", "--save-state", "text.state", "--max-new-tokens", 0, "--chunk", 5]
    run("scripts.generate", *first, cwd=tmp_path)
    second = run("scripts.generate", *greedy, "--load-state", "text.state", "--prompt", " a question", cwd=tmp_path)
    assert whole.removeprefix("a long text, and") == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--load-state", "nothing"], "no state file nothing"),
        (["--prompt", "a", "--save-state", "nowhere/a.state"], "must be a file in a folder that exists"),
        (["--prompt-file", "nothing"], "No such file"),
        (["--prompt", "a", "--model", "nothing"], "there is no checkpoint nothing: no folder has that name, and the Hub did not answer"),
        (["--prompt", "a", "--max-new-tokens", -1], "must be at least 0"),
    ],
)
def test_generate_refuses(checkpoint, tmp_path, arguments, message):
    errors = run("scripts.generate", "--model", checkpoint, *arguments, cwd=tmp_path, fails=True)
    assert message in errors.strip().splitlines()[-1] and "Traceback" not in errors


@pytest.mark.parametrize("kind", ["polynomial", "converted", "windowed"])
def test_generate_with_caches_that_take_nothing_back(kind, tmp_path):
    from transformers import ByT5Tokenizer

    from hf_multipole import convert
    from tests.helpers import stock_models as stock

    if kind == "polynomial":
        model = build(vocab_size=384, layer_types=["multipole_attention", "tensor_attention"], tensor_method="polynomial")
    else:
        config = stock.DECODERS["llama" if kind == "converted" else "gemma2"]
        model = convert(stock.build(type(config)(**config.to_dict() | {"vocab_size": 384})))
    model.float().save_pretrained(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    greedy = ["--model", "model", "--temperature", 0, "--max-new-tokens", 5]
    whole = run("scripts.generate", *greedy, "--prompt", "a long text of many words, and a question", cwd=tmp_path)
    assert len(whole) > 40
    if kind != "polynomial":
        run("scripts.generate", *greedy, "--prompt", "a long text of many words, and", "--save-state", "text.state", cwd=tmp_path)
        assert whole.endswith(run("scripts.generate", *greedy, "--load-state", "text.state", "--prompt", " a question", cwd=tmp_path)[-5:])


@pytest.fixture(scope="module")
def stock_checkpoint(tmp_path_factory):
    import torch
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    from tests.helpers.stock_models import GROUPED

    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**GROUPED | {"vocab_size": 384})).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text("a text that is long enough to have a far field, " * 5)
    return folder


def test_convert(stock_checkpoint, tmp_path):
    """A checkpoint that loads, and a report on each layer."""
    options = ["--block-size", 8, "--rank", 2, "--layers", 1, "--tolerance", 0]
    printed = run(
        "scripts.convert", "--model", stock_checkpoint, "--text", stock_checkpoint / "text.txt", "--output", "out", *options, cwd=tmp_path
    )
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    rows = record["layers"]
    assert [row["layer"] for row in rows] == ["all exact", 0, 1, "all multipole"] and record["tokens"] == 240
    assert all(0 < row["error"] < 1 for row in rows[1:3]) and len({row["bits"] for row in rows}) == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "leave exact, until they are trained, the layers with an error over 0.0: 0, 1, which are all" in printed
        and printed.split("wrote")[0] in card
    )
    assert "It needs hf_multipole" in card and sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_multipole.integration.measurement import layer_errors, loss

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [hasattr(layer.self_attn, "far_field") for layer in model.model.layers] == [False, True]
    stock = AutoModelForCausalLM.from_pretrained(stock_checkpoint).eval()
    ids = AutoTokenizer.from_pretrained(stock_checkpoint)((stock_checkpoint / "text.txt").read_text(), return_tensors="pt").input_ids[
        :, :240
    ]
    assert rows[2]["bits"] == pytest.approx(model.eval()(ids, labels=ids).loss.item() / math.log(2), rel=1e-5)
    # The errors are those of the layers that the definition computes; in one block there are none.
    with torch.no_grad():
        before = stock(ids).logits
    small, whole = layer_errors(stock, ids, [{"block_size": 8, "rank": 2}, {"block_size": 120}])
    assert list(small.values()) == pytest.approx([row["error"] for row in rows[1:3]], rel=1e-5)
    assert max(whole.values()) < 1e-5
    assert loss(stock, ids, "sdpa") == pytest.approx(rows[0]["bits"] * math.log(2), rel=1e-5)
    assert stock.config._attn_implementation == "sdpa" and not hasattr(stock.config, "multipole") and torch.equal(stock(ids).logits, before)


def test_convert_to_tensor(stock_checkpoint, tmp_path):
    """A checkpoint that loads; nothing to measure."""
    options = ["--kind", "tensor", "--tensor-window", 3, "all", "--layers", 1]
    printed = run("scripts.convert", "--model", stock_checkpoint, "--output", "out", *options, cwd=tmp_path)
    assert "Its gates are 0" in printed and "wrote out" in printed
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["options"]["tensor_window"] == [3, None] and list(record) == ["options"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with tensor attention ([arXiv 2310.04064]" in card and "its tensor branches are not used" in card

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [hasattr(layer.self_attn, "tensor_branch") for layer in model.model.layers] == [False, True]
    errors = run("scripts.convert", "--model", stock_checkpoint, "--output", "other", *options, "--rank", 3, cwd=tmp_path, fails=True)
    assert "rank is no option of convert(model, 'tensor')" in errors.strip().splitlines()[-1] and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--text": "nothing"}, "No such file"),
        ({"--model": "nothing"}, "there is no checkpoint nothing: no folder has that name"),
        ({"--output": "."}, "is there already"),
        ({"--block-size": 200}, "gives 240 tokens, but up to 400 multipole attention is exact"),
        ({"--rank": 3}, "rank 3 does not divide block_size 8"),
        ({"--layers": 5}, "layers is [5]"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_convert_refuses(stock_checkpoint, tmp_path, changed, message):
    (tmp_path / "here").touch()
    options = {"--model": stock_checkpoint, "--text": stock_checkpoint / "text.txt", "--output": "out", "--block-size": 8, "--rank": 2}
    arguments = [x for pair in (options | changed).items() for x in pair]
    errors = run("scripts.convert", *arguments, cwd=tmp_path, fails=True)
    assert message in errors and "Traceback" not in errors and not (tmp_path / "out").exists()


def test_convert_refuses_broken_checkpoints(stock_checkpoint, tmp_path):
    import shutil

    import torch
    from transformers import LlamaForCausalLM

    options = ["--text", stock_checkpoint / "text.txt", "--output", "out", "--block-size", 8, "--rank", 2]
    model = LlamaForCausalLM.from_pretrained(stock_checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    shutil.copytree(stock_checkpoint, tmp_path / "nan")
    model.save_pretrained(tmp_path / "nan")
    errors = run("scripts.convert", "--model", "nan", *options, cwd=tmp_path, fails=True)
    assert "not finite: model.layers.0.mlp.up_proj.weight" in errors and "Traceback" not in errors
    weights = tmp_path / "nan" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    errors = run("scripts.convert", "--model", "nan", *options, cwd=tmp_path, fails=True)
    assert "convert.py: " in errors.strip().splitlines()[-1] and "Traceback" not in errors


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

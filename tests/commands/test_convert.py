"""The command "convert": what it writes and says, and what it refuses."""

import json
import math

import pytest
import torch

from tests.helpers.commands import run


@pytest.fixture(scope="module")
def stock_checkpoint(tmp_path_factory):
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
    options = ["--block-size", 8, "--rank", 2, "--sink-tokens", 2, "--layers", 1, "--tolerance", 0]
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
    small, whole = layer_errors(stock, ids, [{"block_size": 8, "rank": 2, "sink_tokens": 2}, {"block_size": 120}])
    assert list(small.values()) == pytest.approx([row["error"] for row in rows[1:3]], rel=1e-5)
    assert max(whole.values()) < 1e-5
    assert loss(stock, ids, "sdpa") == pytest.approx(rows[0]["bits"] * math.log(2), rel=1e-5)
    assert stock.config._attn_implementation == "sdpa" and not hasattr(stock.config, "multipole") and torch.equal(stock(ids).logits, before)


def test_convert_to_tensor(stock_checkpoint, tmp_path):
    """A checkpoint that loads; nothing to measure."""
    options = ["--kind", "tensor", "--tensor-window", 3, "all", "--layers", 1]
    printed = run("hf_multipole.commands", "convert", "--model", stock_checkpoint, "--output", "out", *options, cwd=tmp_path)
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

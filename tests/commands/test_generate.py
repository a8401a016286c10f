"""The command "generate": states that are saved and gone on from, other caches, and what it refuses."""

import pytest

from tests.helpers.commands import run
from tests.helpers.tiny_models import build


@pytest.mark.slow
def test_generate_with_a_state(checkpoint, tmp_path):
    """A text read at once, and the same text read in two runs, go on in the same way."""
    greedy = ["--model", checkpoint, "--temperature", 0, "--max-new-tokens", 12]
    whole = run("hf_multipole.commands", "generate", *greedy, "--prompt", "a long text, and a question", cwd=tmp_path)
    first = ["--model", checkpoint, "--prompt", "a long text, and", "--save-state", "text.state", "--max-new-tokens", 0, "--chunk", 5]
    run("hf_multipole.commands", "generate", *first, cwd=tmp_path)
    second = run("hf_multipole.commands", "generate", *greedy, "--load-state", "text.state", "--prompt", " a question", cwd=tmp_path)
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
    whole = run("hf_multipole.commands", "generate", *greedy, "--prompt", "a long text of many words, and a question", cwd=tmp_path)
    assert len(whole) > 40
    if kind != "polynomial":
        run(
            "hf_multipole.commands",
            "generate",
            *greedy,
            "--prompt",
            "a long text of many words, and",
            "--save-state",
            "text.state",
            cwd=tmp_path,
        )
        assert whole.endswith(
            run("hf_multipole.commands", "generate", *greedy, "--load-state", "text.state", "--prompt", " a question", cwd=tmp_path)[-5:]
        )

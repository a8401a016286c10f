"""The tokenizer and the model that a run starts from."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.training_runs import arguments, train, write_texts


def test_a_tokenizer_learned_from_the_training_text(tmp_path):
    """It makes fewer tokens than bytes, is the same again, comes with the model, and its bits per byte are those of its tokens' bytes."""
    texts = write_texts(tmp_path / "texts.jsonl", 40)
    line = arguments(texts, tmp_path / "run", "--new_tokenizer_size", "300")
    train(line)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    text = json.loads(Path(texts).read_text().splitlines()[0])["text"] + " ü"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokenizer) == 300 and len(ids) < 0.9 * len(text.encode()) and tokenizer.decode(ids) == text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 300
    train(arguments(texts, tmp_path / "again", "--new_tokenizer_size", "300"))
    same = [json.loads((tmp_path / run / "tokenizer.json").read_text())["model"]["merges"] for run in ("run", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--new_tokenizer_size", "258"], "new_tokenizer_size is 258, but"),
        (["--new_tokenizer_size", "300", "--tokenizer_name", "elsewhere"], "new_tokenizer_size makes a tokenizer, but tokenizer_name"),
    ],
)
def test_a_new_tokenizer_that_cannot_be(tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        train(arguments(write_texts(tmp_path / "texts.jsonl"), tmp_path / "run", *more))

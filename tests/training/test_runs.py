"""run_clm.py and run_mlm.py from the command line to the model card, and what they refuse before they begin."""

import json
import math
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_multipole import MultipoleForCausalLM, MultipoleForMaskedLM
from hf_multipole.training.trainer import LanguageModelTrainer, _first
from tests.helpers.tiny_models import build
from tests.helpers.training_runs import arguments, train, write_texts

STEPS = ["--max_steps", "4", "--save_strategy", "no"]
EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "2"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("stock")
    sizes = dict(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, bos_token_id=None, eos_token_id=1)).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def seen(monkeypatch):
    """The shapes of the rows that training took its steps on, and the trainers."""
    shapes, step = [], LanguageModelTrainer.training_step

    def training_step(self, model, inputs, *more):
        shapes.append((tuple(inputs["input_ids"].shape), self))
        return step(self, model, inputs, *more)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", training_step)
    return shapes


def test_a_causal_run(texts, tmp_path, seen):
    folder = tmp_path / "run"
    warm = ["--length_warmup_steps", "2", "--length_warmup_start", "16", "--eval_context_lengths", "32", "128"]
    train(arguments(texts, folder, *STEPS, *EVALUATED, *warm, "--bf16", "true", "--document_boundaries", "true"), plots=True)
    assert [shape for shape, _ in seen] == [(4, 16)] * 2 + [(2, 32)] * 2 + [(1, 64)] * 4
    log = seen[0][1].state.log_history
    for length in (32, 128):
        values = [entry[f"eval_{length}_perplexity"] for entry in log if f"eval_{length}_perplexity" in entry]
        assert len(values) == 2 and all(1 < value < 500 for value in values)
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["bits_per_byte"]["this model"] == figures["metrics"]["bits_per_byte"]
    assert [point["step"] for point in figures["curve"]] == [2, 4]
    card = ModelCard.load(folder / "README.md")
    (bits,) = [result for result in card.data.eval_results if result.metric_type == "bits_per_byte"]
    assert bits.metric_value == pytest.approx(figures["metrics"]["bits_per_byte"], abs=1e-4)
    assert "--length_warmup_steps 2" in card.text and "arXiv" in card.text and card.data.pipeline_tag == "text-generation"
    assert {"loss_curve.png", "attention.png", "scaling.png", "modeling_multipole.py"} <= {path.name for path in folder.iterdir()}
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    assert [point["tokens"] for point in figures["scaling"]] == [16, 32, 64]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is MultipoleForCausalLM and model.dtype == torch.float32 and model.config.use_cache
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == 100


def test_a_run_of_a_hybrid_with_tensor_layers(texts, tmp_path):
    """There is no picture of the weights of tuples of tokens."""
    config = "{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, block_size: 8, rank: 2, tensor_window: [4, 16], "
    config += "layer_types: [multipole_attention, tensor_attention]}"
    train(arguments(texts, tmp_path / "run", "--max_steps", "2", "--save_strategy", "no", config=config), plots=True)
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"scaling.png", "tensor_layer.py", "tensor_cache.py"} <= written and "attention.png" not in written


def test_the_exact_loss_of_a_run(texts, tmp_path, seen):
    """Perplexity and loss are those of all predicted tokens together, worked out here one row at a time."""
    train(arguments(texts, tmp_path / "run", *STEPS, "--document_boundaries", "true", "--per_device_eval_batch_size", "2"))
    trainer = seen[0][1]
    metrics, model, nats, count = trainer.evaluate(), trainer.model.eval(), 0.0, 0
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        targets = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            nats += model(**batch).loss.item() * targets
        count += targets
    assert metrics["eval_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_a_masked_run(texts, tmp_path):
    folder = tmp_path / "run"
    train(arguments(texts, folder, *STEPS, *EVALUATED, "--mlm_probability", "0.3", "--document_boundaries", "true"), masked=True)
    figures = json.loads((folder / "figures.json").read_text())
    assert set(figures["metrics"]) == {"loss", "perplexity", "masked_accuracy"}
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "fill-mask"
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(model) is MultipoleForMaskedLM and not model.config.is_causal
    assert AutoTokenizer.from_pretrained(folder).mask_token_id is not None


def test_a_stock_checkpoint(texts, stock, tmp_path):
    folder = tmp_path / "run"
    options = ["--model_name_or_path", stock, "--attn_implementation", "multipole", "--gradient_checkpointing", "true", "--bf16", "true"]
    train(arguments(texts, folder, *STEPS, *options, config=None))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM and not list(folder.glob("*.py"))
    before = AutoModelForCausalLM.from_pretrained(stock)
    assert not torch.equal(before.lm_head.weight, model.lm_head.weight)


def test_a_new_model_of_another_kind(texts, tmp_path):
    sizes = "{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}"
    folder = tmp_path / "run"
    train(arguments(texts, folder, *STEPS, "--model_type", "llama", "--document_boundaries", "true", config=sizes))
    assert AutoModelForCausalLM.from_pretrained(folder).config.max_position_embeddings == 64
    assert "fast multipole attention" not in (folder / "README.md").read_text()


def test_early_stop(texts, tmp_path, seen):
    """A model that does not learn is stopped at the first evaluation without a gain."""
    options = ["--eval_strategy", "steps", "--eval_steps", "1", "--learning_rate", "0", "--early_stopping_patience", "1"]
    train(arguments(texts, tmp_path / "run", "--save_strategy", "no", *options))
    assert seen[0][1].state.global_step == 2


def test_source_text_and_lines(tmp_path, monkeypatch):
    """A folder of Python source, with what compressors reach on it; and a text file of which the end is held out."""
    (tmp_path / "source").mkdir()
    for number in range(60):
        (tmp_path / "source" / f"file{number}.py").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 9)
    command = arguments("unused", tmp_path / "run", *STEPS)
    command[:2] = ["--train_folder", str(tmp_path / "source")]
    train(command)
    assert set(json.loads((tmp_path / "run" / "figures.json").read_text())["bits_per_byte"]) >= {"this model", "gzip -9", "xz -9"}
    (tmp_path / "lines.txt").write_text("a line of text\n" * 90)
    train(arguments(tmp_path / "lines.txt", tmp_path / "lines", *STEPS))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fp16", "true"], "fp16"),
        (["--report_to", "trakio"], "trakio"),
        (["--prediction_loss_only", "true"], "prediction_loss_only must be false"),
        (["--context_length", "1"], "context_length is 1"),
        (["--config_overrides", "{hidden_act: foo}"], "hidden_act is 'foo'"),
        (["--config_overrides", "{rope_parameters: {rope_type: foo}}"], "rope_type is 'foo'"),
        (["--config_overrides", "{rope_parameters: {rope_type: yarn, rope_theta: 10000.0}}"], "need 'factor'"),
        (
            ["--config_overrides", "{rope_parameters: {rope_type: default, rope_theta: 10000.0, partial_rotary_factor: 0.5}}"],
            "partial_rotary",
        ),
        (["--config_overrides", "{is_causal: false}"], "MultipoleForCausalLM"),
        (["--config_overrides", "{summary: direct}", "--eval_context_lengths", "256"], "at most 64 tokens"),
        (["--context_length", "4096"], "fewer than one block of 4096"),
        (["--length_warmup_steps", "3", "--length_warmup_start", "24"], "length_warmup_start is 24, but must be context_length 64 halved"),
        (["--streaming", "true", "--max_steps", "-1"], "give max_steps"),
        (["--streaming", "true"], "streaming needs held-out text of its own"),
        (["--early_stopping_patience", "2"], "early_stopping_patience needs evaluations"),
        (["--eval_context_lengths", "100000"], "fewer than a context of 100000"),
        (["--document_boundaries", "true", "--use_cache", "true"], "document_boundaries need use_cache: false"),
        (["--tokenizer_name", "nowhere/nothing"], "nowhere/nothing"),
        (["--attn_implementation", "multipol"], "multipol"),
        (["--config_overrides", "{rank: 5}"], "rank"),
        (["--push_to_hub", "true", "--hub_strategy", "checkpoint"], "hub_strategy checkpoint"),
    ],
)
def test_refused_before_anything_is_written(texts, tmp_path, monkeypatch, more, message):
    # Without a network, a name that is looked up on the Hub takes most of a minute to fail.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as caught:
        train(arguments(texts, tmp_path / "run", *more))
    line = str(caught.value.code)
    assert line.startswith("run_clm.py: ") and message in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(SystemExit, match="run_clm.py: .*wandb"):
        train(arguments(texts, tmp_path / "run", "--report_to", "wandb"))


def test_refused_checkpoints(texts, stock, tmp_path):
    def refuse(folder, masked=False, *more):
        with pytest.raises(SystemExit) as caught:
            train(arguments(texts, tmp_path / "run", "--model_name_or_path", folder, *more, config=None), masked)
        return str(caught.value.code)

    assert "has no mask token" in refuse(stock, True)
    sizes = dict(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    ByT5Tokenizer(mask_token="<extra_id_0>").save_pretrained(tmp_path / "bert")
    assert "BertForMaskedLM does not keep the documents of a row apart" in refuse(tmp_path / "bert", True, "--document_boundaries", "true")
    build(vocab_size=100).save_pretrained(tmp_path / "small")
    assert "the tokenizer has 384 tokens" in refuse(tmp_path / "small", False, "--tokenizer_name", stock)
    assert "nowhere" in refuse(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [("bert", "", "BertLMHeadModel sees later tokens"), ("qwen2", ", num_key_value_heads: 2", "a tokenizer of bytes")],
)
def test_kinds_that_would_mislead(kind, more, message, texts, tmp_path):
    sizes = f"{{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16{more}}}"
    with pytest.raises(SystemExit, match=message):
        train(arguments(texts, tmp_path / "run", *STEPS, "--model_type", kind, config=sizes))
    assert not (tmp_path / "run").exists()


def test_models_with_experts():
    """They return the loss of their routers before the logits."""
    logits = torch.zeros(2, 3, 4)
    assert _first((torch.tensor(1.0), logits)) is _first(logits) is logits


def test_a_run_without_a_checkpoint_leaves_its_folder(texts, tmp_path):
    """What was written before the first checkpoint is no run to protect; a damaged record of one is told."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"seed": 7}')
    train(arguments(texts, tmp_path / "run", *STEPS))
    for damaged in ('{"seed"', "[1]"):
        (tmp_path / "run" / "run.json").write_text(damaged)
        with pytest.raises(SystemExit, match="run.json cannot be read"):
            train(arguments(texts, tmp_path / "run", *STEPS, "--resume_from_checkpoint", "true"))


def test_what_a_run_says(texts, tmp_path, capsys):
    """What runs, for how long, and where its results are; memory is not pinned where there is no GPU, which torch would warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pin_memory.*")
        train(arguments(texts, tmp_path / "run", "--max_steps", "60", "--save_strategy", "no", "--dataloader_pin_memory", "true"))
    first, *rest = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("{")]
    assert first.startswith(f"{tmp_path / 'run'}: MultipoleForCausalLM of ") and first.endswith(f"of 64 tokens, from {texts}")
    assert " parameters on 1 thread of the CPU; 60 steps of 2 rows of " in first
    assert "minutes for the 55 that are left" in rest[0]
    assert f"the card is {tmp_path / 'run' / 'README.md'}, the figures are {tmp_path / 'run' / 'figures.json'}" in rest[-1]


def test_another_run_is_not_written_over(texts, tmp_path):
    train(arguments(texts, tmp_path / "run", *STEPS))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(SystemExit, match="holds another run"):
        train(arguments(texts, tmp_path / "run", *STEPS))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(SystemExit, match="is a file"):
        train(arguments(texts, tmp_path / "run" / "config.json", *STEPS))


def test_conversion(texts, stock, tmp_path, monkeypatch):
    """The convert section of a configuration goes to convert(), its names checked."""
    calls = []

    def convert(model, kind="multipole", *, block_size=None, rank=None):
        calls.append((kind, block_size, rank))
        return model

    monkeypatch.setattr("hf_multipole.training.models.convert", convert)
    options = ["--model_name_or_path", stock, "--convert", "{block_size: 8, rank: 2}"]
    train(arguments(texts, tmp_path / "run", *STEPS, *options, config=None))
    assert calls == [("multipole", 8, 2)]
    options[-1] = "{blok_size: 8}"
    with pytest.raises(SystemExit, match="convert has an unknown key 'blok_size'; did you mean 'block_size'"):
        train(arguments(texts, tmp_path / "other", *STEPS, *options, config=None))


def test_a_converted_checkpoint(texts, stock, tmp_path):
    options = ["--model_name_or_path", stock, "--convert", "{block_size: 8, rank: 2}"]
    train(arguments(texts, tmp_path / "run", *STEPS, *options, config=None))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.multipole["rank"] == 2


def test_help_names_every_kind_of_argument(capsys):
    with pytest.raises(SystemExit):
        train(["--help"])
    text = capsys.readouterr().out
    for name in ("--model_name_or_path", "--dataset_name", "--length_warmup_steps", "--learning_rate"):
        assert name in text

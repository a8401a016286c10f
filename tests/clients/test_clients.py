"""Libraries that work with models of Transformers: each with an own model, a hybrid, a stock and a converted one, against the right value.

Skipped where a library is not installed: ``pip install -e .[test,clients]``.
"""

import copy
import json

import accelerate
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_multipole
from tests.helpers.tiny_models import BLOCK, HYBRID, RANK, VOCABULARY, build, tokens

# float32, in another order of summation.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def stock(implementation="multipole"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(max_position_embeddings=256, multipole={"block_size": BLOCK, "rank": RANK}, **sizes, **ids)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


MODELS = {
    "own": lambda: build(dtype=torch.float32),
    "hybrid": lambda: build(dtype=torch.float32, layer_types=HYBRID),
    "stock": stock,
    "converted": lambda: hf_multipole.convert(stock("sdpa"), "multipole", block_size=BLOCK, rank=RANK),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def tokenizer():
    """One word a token: t3, t4, ..."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "t3"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}", **named
    )


def texts(count=6, most=60):
    """Texts of several lengths, some beyond the near field."""
    drawn = torch.Generator().manual_seed(1)
    lengths = [5 + (most - 5) * i // (count - 1) for i in range(count)]
    return [" ".join(f"t{i}" for i in torch.randint(3, VOCABULARY, (n,), generator=drawn).tolist()) for n in lengths]


def mean_loss(model, rows):
    """Nats a predicted token, of rows by themselves."""
    sums, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row]), use_cache=False).logits[0, :-1]
        sums += torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum").item()
        count += len(row) - 1
    return sums / count


QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "max_steps": 2}


@pytest.mark.parametrize("how", ["padded", "padding free", "packed"])
def test_trl_sft(model, tokenizer, tmp_path, how):
    """The loss of rows in one batch, or in one row, is that of each text by itself."""
    trl = pytest.importorskip("trl")
    rows = [[1, *tokenizer(text)["input_ids"], 2] for text in texts()]
    options = {"padded": {}, "padding free": {"padding_free": True, "max_length": None}, "packed": {"packing": True, "max_length": 256}}[
        how
    ]
    args = trl.SFTConfig(
        str(tmp_path), per_device_train_batch_size=3, per_device_eval_batch_size=3, gradient_checkpointing=False, **options, **QUIET
    )
    expected = mean_loss(model, rows)
    data = Dataset.from_dict({"input_ids": rows})
    trainer = trl.SFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    got = trainer.evaluate()["eval_loss"]
    if how == "packed":
        assert got == pytest.approx(expected, rel=1e-4)
    else:
        # Trainer's is the mean over two batches.
        halves = [mean_loss(model, part) for part in (rows[:3], rows[3:])]
        assert got == pytest.approx(sum(halves) / 2, rel=1e-4)
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))


@pytest.mark.parametrize("reference", [True, False])
def test_trl_dpo(model, tokenizer, tmp_path, reference):
    trl = pytest.importorskip("trl")
    some = texts(4, 30)
    data = Dataset.from_dict({"prompt": some, "chosen": [" t5 t6 t7"] * 4, "rejected": [" t8 t9"] * 4})
    args = trl.DPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_length=128,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        logging_steps=1,
        **QUIET,
    )
    other = None
    if reference:
        other = copy.deepcopy(model)
    else:
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=model.config._attn_implementation)
    trainer = trl.DPOTrainer(model, other, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # Before the first step, the model is its own reference.
    assert losses[0] == pytest.approx(0.6931472, abs=1e-3) and losses[1] < losses[0]


def test_lm_eval(model, tokenizer, tmp_path):
    """Log-likelihoods of a local task are the model's own, in batches of four as one by one."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"question": text, "choices": [" t5 t6", " t7"], "answer": i % 2} for i, text in enumerate(texts(8))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "local.yaml").write_text(
        "task: local\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {tmp_path / 'rows.jsonl'}}}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]\n'
    )
    found = []
    for size in (1, 4):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu", max_length=128)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        result = lm_eval.simple_evaluate(lm, tasks=["local"], task_manager=manager, bootstrap_iters=0, log_samples=True)
        samples = sorted(result["samples"]["local"], key=lambda x: x["doc_id"])
        found.append([float(choice[0][0]) for sample in samples for choice in sample["resps"]])
    expected = []
    for row in rows:
        for choice in row["choices"]:
            before, after = (tokenizer(text)["input_ids"] for text in (row["question"], choice))
            with torch.no_grad():
                scores = model(torch.tensor([before + after]), use_cache=False).logits[0, -len(after) - 1 : -1].log_softmax(-1)
            expected.append(scores[torch.arange(len(after)), torch.tensor(after)].sum().item())
    assert found[0] == pytest.approx(expected, abs=1e-3) and found[1] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["own", "hybrid"])
def test_sentence_transformers(tokenizer, tmp_path, name):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    model = MODELS[name]()
    model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    body = Transformer(str(tmp_path), max_seq_length=128)
    encoder = sentence_transformers.SentenceTransformer(modules=[body, Pooling(32, "mean")], device="cpu")
    together = encoder.encode(texts(), batch_size=4, convert_to_tensor=True)
    for text, got in zip(texts(), together):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            torch.testing.assert_close(got, model.model(ids, use_cache=False).last_hidden_state.mean(1)[0], **CLOSE)


def adapted(model, kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    projections = ["q_proj", "v_proj", "down_proj"]
    config = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=projections, task_type="CAUSAL_LM", init_lora_weights=False),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=12, task_type="CAUSAL_LM"),
        "ia3": lambda: peft.IA3Config(
            target_modules=projections, feedforward_modules=["down_proj"], task_type="CAUSAL_LM", init_ia3_weights=False
        ),
    }[kind]()
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("kind", ["lora", "prefix", "ia3"])
def test_peft(model, kind):
    """Padded rows as by themselves, gradients for the adapter alone, and generation as without a cache."""
    model = adapted(model, kind)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    together = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    for row, length in ((0, ids.shape[1]), (1, 40)):
        alone = model(input_ids=ids[row : row + 1, :length], attention_mask=mask[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together.logits[row, :length], alone, **CLOSE)
    together.loss.backward()
    with_gradient = {name for name, x in model.named_parameters() if x.grad is not None and x.grad.abs().max() > 0}
    assert with_gradient and all("lora" in name or "ia3" in name or "prompt" in name for name in with_gradient)
    short = ids[:1, :30]
    out = model.generate(input_ids=short, attention_mask=torch.ones_like(short), max_new_tokens=8, do_sample=False, eos_token_id=None)
    logits = model(input_ids=out, attention_mask=torch.ones_like(out)).logits[0, 29:-1]
    # The chosen tokens are the likeliest of a whole forward, up to rounding.
    chosen = logits.gather(1, out[0, 30:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.max(1).values, **CLOSE)


def near(model, expected, ids):
    """Logits of int8 weights are near those of float32, and it generates."""
    got = model(ids, use_cache=False).logits.float()
    assert 0 < (got - expected).abs().max() < 0.2 * expected.abs().max()
    out = model.generate(ids[:1, :30], max_new_tokens=8, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids[:1, :30]))
    logits = model(out, use_cache=False).logits[0, 29:-1].float()
    chosen = logits.gather(1, out[0, 30:, None])[:, 0]
    # Activations are quantised a row at a time by some: what one token costs depends on its neighbours.
    torch.testing.assert_close(chosen, logits.max(1).values, atol=0.1 * expected.abs().max().item(), rtol=0)


def test_torchao(model):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    ids = tokens()
    expected = model(ids, use_cache=False).logits.detach()
    quantize_(model, Int8WeightOnlyConfig())
    with torch.no_grad():
        near(model, expected, ids)


def test_bitsandbytes(model, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    ids = tokens()
    expected = model(ids, use_cache=False).logits.detach()
    model.save_pretrained(tmp_path)
    options = {"attn_implementation": model.config._attn_implementation, "device_map": "cpu"}
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), **options)
    with torch.no_grad():
        near(packed, expected, ids)


def test_lightning(model, tmp_path):
    """Three steps of Lightning's trainer are three steps of a loop."""
    lightning = pytest.importorskip("lightning")
    plain = copy.deepcopy(model).train()
    batches = [tokens(seed=i) for i in range(3)]

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, ids, _):
            return self.model(ids, labels=ids).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    model.train()
    trainer.fit(Module(), torch.utils.data.DataLoader(batches, batch_size=None))
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)
    for ids in batches:
        optimiser.zero_grad()
        plain(ids, labels=ids).loss.backward()
        optimiser.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), **CLOSE)


@pytest.mark.parametrize("how", ["cpu", "disk", "device map"])
def test_offloading(model, tmp_path, how):
    """Weights that come when they are needed give the same logits and the same tokens."""
    ids = tokens()[:1, :40]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    expected, generated = model(ids, use_cache=False).logits.detach(), model.generate(ids, **options)
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(model, tmp_path / "weights", execution_device="cpu")
    else:
        model.save_pretrained(tmp_path / "model")
        devices = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
        if model.config.tie_word_embeddings:
            devices["lm_head"] = "disk"
        implementation = model.config._attn_implementation
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=devices, offload_folder=tmp_path / "weights", attn_implementation=implementation
        )
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, **CLOSE)
    assert model.generate(ids, **options).tolist() == generated.tolist()

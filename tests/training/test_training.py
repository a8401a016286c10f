"""Arguments, data and batches of the training scripts, and what they refuse."""

import inspect
import itertools
import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_multipole import MultipoleForMaskedLM
from hf_multipole.training import private
from hf_multipole.training.arguments import DataArguments, MaskingArguments, ModelArguments, RunArguments
from hf_multipole.training.batches import MaskingCollator, collate, shorten, warm_length
from hf_multipole.training.data import blocks, hold_out, load_texts, pack, recut, stream
from hf_multipole.training.models import keeps_documents_apart
from hf_multipole.training.parsing import check_launch, parse
from tests.helpers.processes import ROOT
from tests.helpers.tiny_models import build

KINDS = (ModelArguments, DataArguments, RunArguments, TrainingArguments, MaskingArguments)
TOKENIZER = ByT5Tokenizer()


# Arguments


def test_the_command_line_overrides_the_file(tmp_path):
    """Single fields win, mappings are merged, and numbers that YAML takes for text are numbers."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "train_file: a.txt\nlearning_rate: 2e-3\nmax_steps: 7\nconfig_overrides: {hidden_size: 64, rank: 2}\nlr_scheduler_type: cosine\n"
    )
    command = ["--config", str(path), "--max_steps", "9", "--config_overrides", "{rank: 8}", "--eval_context_lengths", "64", "128"]
    model, data, run, training, masking = parse(command + ["--output_dir", str(tmp_path), "--mlm_probability", "0.3"], KINDS)
    assert model.config_overrides == {"hidden_size": 64, "rank": 8}
    assert data.train_file == ["a.txt"] and data.eval_context_lengths == [64, 128]
    assert training.learning_rate == 2e-3 and training.max_steps == 9 and training.lr_scheduler_type == "cosine"
    assert masking.mlm_probability == 0.3 and run.length_warmup_steps == 0


@pytest.mark.parametrize(
    ("file", "command", "message"),
    [
        ({"learning_rat": 1}, [], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"block_size": 64}, [], "unknown key 'block_size'; did you mean 'context_length'?"),
        ({}, ["--dataset_nam", "x"], "unknown key 'dataset_nam'; did you mean 'dataset_name'?"),
        ({}, ["--max_stps=3"], "unknown key 'max_stps'; did you mean 'max_steps'?"),
        ({}, ["stray"], "'stray', which belongs to no option"),
        ({}, ["--max_steps", "many"], "max_steps"),
        ({"learning_rate": "fast"}, [], "learning_rate: invalid float value: 'fast'"),
        ({"config_overrides": {"hiden_size": 3}}, [], "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ({"config_overrides": [3]}, [], "config_overrides must be a YAML mapping"),
        ({"model_type": "lama", "train_file": "a"}, [], "model_type 'lama' is unknown; did you mean 'llama'?"),
        ({"model_name_or_path": "x", "config_overrides": {"rank": 3}}, [], "give one of the two"),
        ({"dataset_name": "x", "train_file": "y"}, [], "dataset_name and train_file are given"),
        ({"train_file": "x", "context_length": 0}, [], "context_length is 0, but must be at least 2"),
        ({"train_file": "x", "context_length": "long"}, [], "context_length: invalid int value: 'long'"),
        ({"train_file": "x", "sample_by": "word"}, [], "sample_by is 'word'"),
        ({"train_file": "x", "rows_are_documents": False, "document_boundaries": True}, [], "rows_are_documents is false"),
        ({"train_file": "x", "mlm_probability": 1.5}, [], "mlm_probability is 1.5"),
        ({}, [], "there is no training text"),
    ],
)
def test_refused_arguments(tmp_path, file, command, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(file))
    with pytest.raises(ValueError) as caught:
        parse(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out"), *command], KINDS)
    assert message in str(caught.value)


def test_values_of_the_file_are_read_as_those_of_the_command_line(tmp_path):
    """Text where a number is meant, one value where several may be, and what YAML has of its own; defaults stay."""
    values = {"train_file": "a", "eval_context_lengths": "64", "max_grad_norm": "1e-2", "bf16": "no", "save_total_limit": "3"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    _, data, _, training = parse(["--config", str(tmp_path / "run.yaml"), "--use_cpu"])
    assert data.eval_context_lengths == [64] and data.context_length == 4096
    assert training.max_grad_norm == 0.01 and not training.bf16 and training.save_total_limit == 3 and training.use_cpu


def test_results_go_to_a_folder_that_git_ignores(tmp_path):
    """Where nothing else was said: runs/, and the name of the configuration or of the command."""
    (tmp_path / "small.yaml").write_text("train_file: a\n")
    assert parse(["--config", str(tmp_path / "small.yaml"), "--use_cpu"])[3].output_dir == "runs/small"
    assert parse(["--train_file", "a", "--use_cpu"], name="causal")[3].output_dir == "runs/causal"
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("launch", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true"}])
def test_a_launch_for_gpus_without_one(launch, monkeypatch):
    """The reason, before anything else; the CPU may be asked for."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="launched on GPUs, but torch .* finds none"):
        check_launch()
    with pytest.raises(ValueError, match="launched on GPUs"):
        parse(["--train_file", "a"])
    check_launch(use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_launch()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    check_launch()


def test_what_is_used_of_the_inside_of_trainer():
    """It has the arguments that it had when it was checked."""
    for name, parameters in private.CHECKED.items():
        found = list(inspect.signature(getattr(Trainer, name)).parameters)
        assert parameters is None or found == parameters, (name, found)
    overridden = {name for name, x in vars(private.HookedTrainer).items() if inspect.isfunction(x) and hasattr(Trainer, name)}
    assert overridden <= set(private.CHECKED)


def test_a_token_is_not_among_the_arguments_that_trainer_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "before")
    *_, training = parse(["--train_file", "a", "--hub_token", "hf_secret", "--output_dir", str(tmp_path)])
    torch.save(training, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()


# Texts

ROWS = ["first text", "the second, with an umlaut: ü", "third"]


def write(folder, kind, rows=ROWS):
    path = folder / f"texts.{kind}"
    data = Dataset.from_dict({"text": rows, "number": list(range(len(rows)))})
    if kind == "txt":
        path.write_text("\n".join(rows))
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "csv":
        data.to_csv(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_local_files(tmp_path, kind, streaming):
    file = write(tmp_path, kind)
    train, held_out = load_texts(DataArguments(train_file=file, validation_file=file, streaming=streaming, sample_by="line"))
    assert list(train) == list(train) == list(held_out) == ROWS


def test_a_whole_file_is_a_document_and_may_be_compressed(tmp_path):
    import gzip

    (tmp_path / "text.txt.gz").write_bytes(gzip.compress("\n".join(ROWS).encode()))
    train, held_out = load_texts(DataArguments(train_file=str(tmp_path / "text.txt.gz")))
    assert list(train) == ["\n".join(ROWS)] and held_out is None


def test_splits_of_a_dataset(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "validation"):
        write(folder, "jsonl", [f"{split} {i}" for i in range(4)])
        (folder / "texts.jsonl").rename(folder / f"{split}.jsonl")
    name = {"dataset_name": str(folder)}
    train, held_out = load_texts(DataArguments(**name))
    assert list(train)[0] == "train 0" and list(held_out)[-1] == "validation 3"
    train, held_out = load_texts(DataArguments(**name, train_split_name="train[:50%]"))
    assert len(list(train)) == 2 and held_out is None
    train, held_out = load_texts(DataArguments(**name, train_split_name="train[:75%]", validation_split_name="train[75%:]"))
    assert list(held_out) == ["train 3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_file": "nothing.txt"}, "there is no file nothing.txt"),
        ({"train_file": "data.xml"}, "unknown kind '.xml'"),
        ({"train_file": ["rows.jsonl", "empty.txt"]}, "several kinds: json, text"),
        ({"train_file": "rows.jsonl", "text_column": "content"}, "no column 'content'; it has text, number"),
        ({"train_file": "rows.jsonl", "text_column": "number"}, "holds int, not text"),
        ({"train_file": "rows.jsonl", "validation_split_name": "tset"}, "tset"),
        ({"train_file": "empty.jsonl"}, "it is empty"),
        ({"train_file": "broken.jsonl"}, "broken.jsonl could not be read"),
        ({"train_file": "broken.parquet"}, "broken.parquet could not be read"),
        ({"train_file": "latin.txt"}, "latin.txt could not be read"),
        ({"train_folder": "."}, "no Python source files"),
        ({"dataset_name": "nobody/nothing"}, "Couldn't reach 'nobody/nothing' on the Hub"),
        ({"dataset_name": "folder", "train_split_name": "training"}, "has no split 'training'; it has train"),
    ],
)
def test_refused_data(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, content in (("empty.txt", ""), ("data.xml", "<a/>"), ("empty.jsonl", ""), ("broken.jsonl", "{'a"), ("broken.parquet", "PAR")):
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.txt").write_bytes("ü".encode("latin-1"))
    write(tmp_path, "jsonl")
    (tmp_path / "texts.jsonl").rename(tmp_path / "rows.jsonl")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", "jsonl")
    with pytest.raises((ValueError, OSError)) as caught:
        load_texts(DataArguments(**options))
    assert message in str(caught.value)


# Blocks


@given(st.lists(st.text(max_size=30), max_size=12), st.integers(1, 20), st.booleans())
def test_blocks_hold_the_texts(texts, length, end_of_text):
    """Every token in its order, its position in its text, and every byte counted once; but for what is left at the end."""
    wanted, positions, weights = [], [], []
    for text in filter(None, texts):
        ids = [byte + 3 for byte in text.encode()] + ([1] if end_of_text else [])
        wanted += ids
        positions += range(len(ids))
        weights += [1] * len(text.encode()) + [0] * end_of_text
    found = list(blocks(TOKENIZER, texts, length, boundaries=True, end_of_text=end_of_text))
    count = len(wanted) // length
    assert len(found) == count
    if count:
        assert np.concatenate([row["input_ids"] for row in found]).tolist() == wanted[: count * length]
        assert np.concatenate([row["position_ids"] for row in found]).tolist() == positions[: count * length]
        assert np.concatenate([row["token_bytes"] for row in found]).tolist() == weights[: count * length]
        assert sum(row["bytes"] for row in found) == sum(weights[: count * length])


def test_other_tokenizers_go_through_their_own_call():
    class Words:
        eos_token_id = unk_token_id = None

        def __call__(self, texts, **options):
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

        def convert_ids_to_tokens(self, ids):
            return [chr(96 + length) * length for length in ids]

    (row,) = blocks(Words(), ["a bb ccc", "bb a"], 5)
    assert row["input_ids"].tolist() == [1, 2, 3, 2, 1] and row["token_bytes"].tolist() == [2, 3, 3, 3, 1] and row["bytes"] == 12


@given(st.integers(1, 40), st.integers(1, 12))
def test_rows_of_another_length(length, other):
    rows = pack(TOKENIZER, ["some text", "and some more of it"] * 5, 20, boundaries=True)
    flat = np.concatenate(rows["input_ids"])
    if other * length > len(flat):
        length = other
    out = recut(rows, length)
    assert np.concatenate(out["input_ids"]).tolist() == flat[: len(out) * length].tolist()
    sizes = np.concatenate(rows["token_bytes"])[: len(out) * length].reshape(-1, length)
    assert out["token_bytes"] == sizes.tolist() and out["bytes"] == sizes.sum(1).tolist()


def test_short_texts_and_few_blocks():
    with pytest.raises(ValueError, match="has 6 tokens, fewer than one block of 10"):
        pack(TOKENIZER, ["short"], 10)
    with pytest.raises(ValueError, match="does not fill one block of 10"):
        stream(TOKENIZER, ["short"], 10, False, True)
    with pytest.raises(ValueError, match="fewer than a context of 100"):
        recut(pack(TOKENIZER, ["short"], 3), 100)
    with pytest.raises(ValueError, match="too few blocks to hold one out"):
        hold_out(pack(TOKENIZER, ["short"], 6), 5)
    assert len(pack(TOKENIZER, ["a text"] * 9, 7, max_blocks=4)) == 4
    train, held_out = hold_out(pack(TOKENIZER, ["a text"] * 40, 7), 10)
    assert (len(train), len(held_out)) == (36, 4)


def test_a_stream_gives_the_same_blocks_again_and_again():
    texts = ["some text", "and more"] * 9
    packed, streamed = pack(TOKENIZER, texts, 16, boundaries=True), stream(TOKENIZER, texts, 16, True, True)
    read = [list(row["input_ids"]) for row in itertools.islice(streamed, 2 * len(packed) + 1)]
    assert read == [list(row) for row in packed["input_ids"]] * 2 + [packed[0]["input_ids"]]


# Batches


def packed_batch(length=16):
    return collate(list(pack(TOKENIZER, ["one", "a second text, longer than a block", "three"] * 3, length, boundaries=True)))


def test_documents_of_a_batch():
    """Positions start anew at each text and at each row; the first token of a text is not predicted from the text before."""
    batch = packed_batch()
    ids, places, labels = batch["input_ids"].flatten(), batch["position_ids"], batch["labels"].flatten()
    starts = torch.cat([torch.tensor([True]), ids[:-1] == 1])
    assert torch.equal(labels, torch.where(starts, -100, ids))
    assert (places[:, 0] == 0).all() and (places.flatten()[starts] == 0).all()
    step = places[:, 1:] - places[:, :-1]
    assert ((step == 1) | (places[:, 1:] == 0)).all()
    assert "position_ids" not in collate(list(pack(TOKENIZER, ["a text"] * 3, 5)))


def test_shorter_contexts():
    batch = packed_batch()
    short = shorten(batch, 4)
    assert torch.equal(short["input_ids"].flatten(), batch["input_ids"].flatten())
    assert torch.equal(short["labels"].flatten(), batch["labels"].flatten())
    assert (short["position_ids"][:, 0] == 0).all() and short["position_ids"].max() <= 3
    assert shorten(batch, 16) is batch
    lengths = [warm_length(step, 9, 4, 32) for step in range(12)]
    assert lengths == [4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32]
    assert warm_length(0, 1, 32, 32) == 32 and warm_length(0, 0, 8, 32) == 32


def test_masks():
    """Reproducible row by row, other ones in each epoch, of about the wanted share, and never of special tokens."""
    tokenizer = ByT5Tokenizer(mask_token="<extra_id_0>")
    rows = list(pack(tokenizer, ["some text with many letters"] * 80, 100, boundaries=True))
    collator = MaskingCollator(tokenizer, 0.15, seed=0)
    batch = collator(rows)
    masked = batch["labels"] != -100
    # Six standard deviations of a binomial.
    assert abs(masked.float().mean() - 0.15) < 6 * (0.15 * 0.85 / masked.numel()) ** 0.5
    original = torch.tensor([row["input_ids"] for row in rows])
    assert torch.equal(batch["labels"][masked], original[masked])
    assert torch.equal(batch["input_ids"][~masked], original[~masked])
    assert not (masked & (original == tokenizer.eos_token_id)).any()
    share = (batch["input_ids"][masked] == tokenizer.mask_token_id).float().mean()
    assert abs(share - 0.8) < 6 * (0.16 / masked.sum()) ** 0.5
    again = torch.cat([collator([row])["input_ids"] for row in rows])
    assert torch.equal(again, batch["input_ids"])
    # Set in this process, it reaches the workers of a data loader, which may live for all epochs.
    loader = DataLoader(rows, len(rows), collate_fn=collator, num_workers=1, persistent_workers=True)
    assert torch.equal(next(iter(loader))["input_ids"], batch["input_ids"])
    collator.epoch = 1
    other = collator(rows)["input_ids"]
    assert not torch.equal(other, batch["input_ids"])
    assert torch.equal(next(iter(loader))["input_ids"], other)


def test_label_smoothing_of_causal_models(tmp_path):
    """Trainer shifts the labels of our models, too."""
    model, ids = build().float(), torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
        torch.testing.assert_close(trainer.compute_loss(model, {"input_ids": ids, "labels": ids}), expected)


def test_which_models_keep_documents_apart():
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    assert keeps_documents_apart(build().float())
    assert keeps_documents_apart(build(MultipoleForMaskedLM, is_causal=False).float())
    assert keeps_documents_apart(LlamaForCausalLM(LlamaConfig(**sizes)))
    model = BertForMaskedLM(BertConfig(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    assert not keeps_documents_apart(model) and model.training

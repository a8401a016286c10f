"""Heads that classify: losses under gradient accumulation, the token a row is read at, and positions in half precision."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_multipole import MultipoleConfig, MultipoleForSequenceClassification, MultipoleForTokenClassification, MultipoleModel
from tests.helpers.tiny_models import CLOSE, build, gradients, tokens

SEQUENCE, TOKEN = MultipoleForSequenceClassification, MultipoleForTokenClassification


@pytest.fixture
def ids():
    return torch.cat([tokens(), tokens().flip(1)])


def targets(kind, ids):
    """Labels ``(4, ...)`` of a head; of tokens, an unlike number in each row."""
    numbers = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    if kind == "tokens":
        return torch.where(torch.arange(ids.shape[1]) < torch.tensor([[5], [60], [1], [30]]), ids % 3, -100)
    return {"classes": torch.tensor([0, 2, 1, 1]), "several classes": (numbers > 0).double(), "number": numbers[:, 0], "numbers": numbers}[
        kind
    ]


KINDS = {
    "classes": (SEQUENCE, {"num_labels": 3}),
    "several classes": (SEQUENCE, {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "number": (SEQUENCE, {"num_labels": 1}),
    "numbers": (SEQUENCE, {"num_labels": 3, "problem_type": "regression"}),
    "tokens": (TOKEN, {"num_labels": 3}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_add_up(ids, kind):
    """Loss and gradients of four rows, one at a time, are those of all of them at once."""
    head, options = KINDS[kind]
    labels = targets(kind, ids)
    model = build(head, **options)
    whole = model(ids, labels=labels).loss
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    count = (labels != -100).sum()
    losses = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(4)]
    sum(losses).backward()
    # The losses of tokens are in float32.
    close = {"atol": 1e-7, "rtol": 1e-5} if kind == "tokens" else CLOSE
    torch.testing.assert_close(sum(losses), whole, **close)
    torch.testing.assert_close(gradients(model), expected, **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_accumulated_steps_of_trainer(ids, tmp_path, kind):
    """A step of Trainer over four batches of one row is the step over one batch of four."""
    head, options = KINDS[kind]
    labels = targets(kind, ids)
    data, found = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}), []
    for size in (4, 1):
        model = build(head, dtype=torch.float32, **options)
        steps = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        # Plain steps without clipping: what they change is the gradient.
        args = TrainingArguments(str(tmp_path), optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **steps, **quiet)
        before = {name: x.detach().clone() for name, x in model.named_parameters()}
        Trainer(model, args, train_dataset=data).train()
        found.append({name: before[name] - x.detach() for name, x in model.named_parameters()})
    assert max(x.abs().max() for x in found[0].values()) > 1e-3
    # float32 parameters of a size of one, from which the steps were taken away.
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_read_at_its_last_real_token(side, embedded, causal):
    """Each row of a padded batch has the label that it has by itself, also where real tokens have the id of padding."""
    model = build(SEQUENCE, num_labels=3, is_causal=causal)
    pad = model.config.pad_token_id
    rows = [tokens()[0, :n].clone() for n in (31, 20, 9)]
    rows[0][-1] = rows[1][-3:] = rows[2][4] = pad
    most = max(map(len, rows))
    batch, mask = torch.full((3, most), pad), torch.zeros(3, most, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(most - len(row), most)
        batch[i, where], mask[i, where] = row, 1

    def label(ids, mask):
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if embedded else {"input_ids": ids}
        return model(**inputs, attention_mask=mask).logits

    got = label(batch, mask)
    for i, row in enumerate(rows):
        hidden = model.model(row[None]).last_hidden_state[:, -1]
        torch.testing.assert_close(got[i : i + 1], model.score(hidden), **CLOSE)


def test_rows_without_a_mask():
    """Padding is told by its id; without one, several rows do not tell where they end."""
    model = build(SEQUENCE, num_labels=3)
    ids = tokens()
    ids[0, -5:] = model.config.pad_token_id
    short = model(ids[:1, :-5]).logits
    torch.testing.assert_close(model(ids).logits[:1], short, **CLOSE)
    embeddings = model.get_input_embeddings()(ids)
    last = model.score(model.model(ids).last_hidden_state[:, -1])
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, last, **CLOSE)
    model.config.pad_token_id = None
    torch.testing.assert_close(model(ids[:1]).logits, last[:1], **CLOSE)
    torch.testing.assert_close(model(ids, attention_mask=torch.ones_like(ids)).logits, last, **CLOSE)
    with pytest.raises(ValueError, match="2 rows without attention_mask or config.pad_token_id"):
        model(ids)


SCALED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 10000.0}, SCALED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_far_positions_in_half_precision(tmp_path, dtype, rope):
    """Cosines at position 10,000 are those of exact frequencies, rounded once, however the model came into its dtype."""
    config = MultipoleConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8, rope_parameters=rope)
    model = MultipoleModel(config)
    model.save_pretrained(tmp_path)
    # Trained in float32; there and back again; and loaded in its dtype.
    models = [model.to(dtype), MultipoleModel(config).to(dtype).float().to(dtype), MultipoleModel.from_pretrained(tmp_path, dtype=dtype)]
    size = config.head_dim
    angles = 10000 / rope.get("factor", 1.0) * 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    wanted = torch.cat([angles, angles])
    # An angle of 10,000 has an error of 2^-11 in float32, of a frequency and of a product, and the value another of the dtype.
    close = {"atol": 2 * 2**-11 + torch.finfo(dtype).eps, "rtol": 0}
    for model in models:
        assert model.norm.weight.dtype == dtype
        cos, sin = model.rotary_emb(torch.zeros(1, dtype=dtype), torch.tensor([[10000]]))
        assert cos.dtype == dtype
        torch.testing.assert_close(cos[0, 0].double(), wanted.cos(), **close)
        torch.testing.assert_close(sin[0, 0].double(), wanted.sin(), **close)

"""What the tests of conversions do with converted models: save them, train them, and train them on two processes."""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_multipole  # noqa: F401, its names are registered
from tests.helpers.processes import on_ranks


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def rows_of(ids):
    return [{"input_ids": row.tolist()} for row in ids]


def trainer(model, folder, ids, **options):
    arguments = TrainingArguments(
        output_dir=folder, max_steps=3, learning_rate=1e-2, report_to="none", save_steps=2, use_cpu=True, disable_tqdm=True, **options
    )

    class Tokenizer:
        pad_token_id = 0

    def collate(rows):
        batch = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": batch, "labels": batch}

    return Trainer(model=model, args=arguments, train_dataset=rows_of(ids), data_collator=collate)


def check_sharded(model, ids, tmp_path):
    """FSDP2 over two processes gives the losses and the gradients of one."""
    folder = saved(model, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        loss = torch.stack([model(row[None], labels=row[None], use_cache=False).loss for row in ids]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.save({"ids": ids, "losses": losses, "weights": model.state_dict()}, tmp_path / "expected")
    assert on_ranks(2, _sharded, str(tmp_path)) == [0, 0]


def _sharded(environment, folder):
    os.environ |= environment
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2,))
    expected = torch.load(f"{folder}/expected")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float64)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    row = expected["ids"][dist.get_rank()][None]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for reference in expected["losses"]:
        loss = model(row, labels=row, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        assert abs(total.item() / 2 - reference) < 1e-9, (total, reference)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.full_tensor().detach(), expected["weights"][name], atol=1e-10, rtol=1e-8)
    # A rank that leaves while the other one still speaks to it makes that one abort.
    dist.barrier()
    dist.destroy_process_group()

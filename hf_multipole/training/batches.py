"""Blocks in, batches out: labels, positions of documents, masks, shorter contexts."""

import zlib

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase


def restart(positions: torch.Tensor) -> torch.Tensor:
    """Positions ``(batch, n)`` of tokens in their texts, counted from the start of the row where a text began before it."""
    tokens = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    return tokens - torch.where(positions == 0, tokens, 0).cummax(1).values


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels`` ``(batch, n)`` for next-token prediction, and ``position_ids`` where the rows have them: texts
    then start at 0, and their first tokens are not predicted from the text before (label -100).
    """
    batch = {
        name: torch.from_numpy(np.stack([row[name] for row in rows])).long() for name in ("input_ids", "position_ids") if name in rows[0]
    }
    batch["labels"] = batch["input_ids"].clone()
    if "position_ids" in batch:
        batch["labels"][batch["position_ids"] == 0] = -100
        batch["position_ids"] = restart(batch["position_ids"])
    return batch


class MaskingCollator(DataCollatorForLanguageModeling):
    """Batches for masked language modelling. What is masked in a row depends on its tokens, the seed and the epoch alone: it is the
    same after an interruption, and on any number of processes. A stream is one epoch, in which a row that comes again is masked as
    before.

    tokenizer: with a mask token. probability: share of the tokens that are to be predicted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int):
        super().__init__(tokenizer, mlm_probability=probability)
        self.seed = seed
        # Shared with the workers of a data loader, which may live for several epochs.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self.special = torch.tensor(tokenizer.all_special_ids)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def __call__(self, rows: list[dict], return_tensors=None) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        masked = []
        for ids in batch["input_ids"]:
            key = f"{self.seed} {self.epoch}".encode() + ids.numpy().tobytes()
            self.generator = torch.Generator().manual_seed(zlib.crc32(key))
            masked.append(self.torch_mask_tokens(ids[None].clone(), torch.isin(ids, self.special)[None]))
        batch["input_ids"], batch["labels"] = (torch.cat(parts) for parts in zip(*masked))
        return batch


def shorten(batch: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The same tokens in rows of ``length``, which divides the rows' own: ``(rows * n / length, length)``."""
    if batch["input_ids"].shape[1] == length:
        return batch
    batch = {name: tensor.reshape(-1, length) for name, tensor in batch.items()}
    if "position_ids" in batch:
        batch["position_ids"] = restart(batch["position_ids"])
    return batch


def warm_length(step: int, steps: int, start: int, full: int) -> int:
    """The context length of a step: ``start``, doubled at even intervals during the first ``steps`` steps, then ``full``."""
    stages = (full // start).bit_length() - 1
    return start << min(stages, step * stages // steps) if step < steps else full

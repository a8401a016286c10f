"""What a run leaves beside its weights, but for the pictures: the curve, and times of a forward pass."""

import math

import torch
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel


def curve(log_history: list[dict], causal: bool) -> list[dict[str, float]]:
    """The held-out figure over the steps, from Trainer's own log, which a run that goes on takes up again: bits per byte of a causal
    model, bits per masked token of a masked one.
    """
    points = {}
    for entry in log_history:
        if "eval_loss" in entry:
            bits = entry["eval_bits_per_byte"] if causal else entry["eval_loss"] / math.log(2)
            points[entry["step"]] = {"step": entry["step"], "bits": bits}
    return list(points.values())


@torch.no_grad()
def measure_scaling(model: PreTrainedModel, longest: int) -> list[dict[str, float]]:
    """Seconds of a forward pass over one row, with the model's own attention and with exact attention on the same weights, for
    contexts up to ``longest`` tokens: medians, after a first call.
    """
    own, device, out = model.config._attn_implementation, next(model.parameters()).device, []
    lengths = [longest >> halved for halved in range(4, -1, -1) if longest >> halved >= 16] or [longest]
    for length in lengths:
        ids, times = torch.randint(model.config.vocab_size, (1, length), device=device), {}
        for name, implementation in (("seconds", own), ("seconds_exact", "sdpa")):
            model.set_attn_implementation(implementation)
            known = {"model": model, "ids": ids}
            timer = Timer("model(ids, use_cache=False).logits.sum().item()", globals=known, num_threads=torch.get_num_threads())
            times[name] = timer.blocked_autorange(min_run_time=0.1).median
        out.append({"tokens": length} | times)
    model.set_attn_implementation(own)
    return out

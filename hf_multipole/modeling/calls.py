"""What the two attention functions are given beside options: a call, and the checks of both."""

import math
from typing import NamedTuple

import torch
from torch import nn

from .options import MultipoleOptions


class Call(NamedTuple):
    """What a call depends on beside its tokens; the arguments of :func:`multipole_attention`, which explains them."""

    options: MultipoleOptions
    key_summary: nn.Module | None = None
    value_summary: nn.Module | None = None
    query_summary: nn.Module | None = None
    log_masses: torch.Tensor | None = None
    far_bias: torch.Tensor | None = None
    max_levels: int | None = None
    causal: bool = True
    softcap: float | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    backend: str = "auto"


def refuse_shards() -> None:
    """Raises ValueError within torch's ``context_parallel``: each process has a part of the rows there, and only what calls
    scaled_dot_product_attention, in whose place it puts a function of its own, sees the other parts.
    """
    if str(getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", "")).startswith("torch.distributed.tensor.experimental"):
        raise ValueError(
            "multipole and tensor attention need whole rows, but torch's context_parallel (cp_size of Accelerate) gives each process part "
            "of them: leave it out, or use attn_implementation='sdpa'"
        )


def check_tensors(q, k, v, far_keys, attention_mask, segment_ids, log_masses=None) -> None:
    """Raises ValueError or TypeError for tensors of a wrong kind, shape, dtype or device, and for parts of rows."""
    refuse_shards()
    tensors = {"q": q, "k": k, "v": v} | ({} if far_keys is None else {"far_keys": far_keys})
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor (batch, heads, tokens, head_dim), but is {got}")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, but attention needs a floating-point dtype")
        if x.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise TypeError(f"{name} has dtype {x.dtype}, but q has {q.dtype}: convert them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: move them to one device")
        if 0 in x.shape:
            raise ValueError(f"{name} is empty: shape {tuple(x.shape)}")
    batch, heads, queries, dim = q.shape
    kv_heads, n = k.shape[1:3]
    for name, x, shape in (
        ("k", k, (batch, kv_heads, n, dim)),
        ("v", v, (batch, kv_heads, n, v.shape[-1])),
        ("far_keys", far_keys, k.shape),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but with q {tuple(q.shape)} and k {tuple(k.shape)} it must be {tuple(shape)}"
            )
    if log_masses is not None:
        _check_masses(log_masses, (batch, kv_heads, n), q.device)
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which the {kv_heads} heads of k and v do not divide")
    if queries > n:
        raise ValueError(f"q has {queries} tokens, but k has only {n}: queries are the last of the key tokens")
    for name, x in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is {type(x).__name__}, but must be a tensor (batch, n)")
        if x.dim() != 2 or x.shape != (batch, n):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but must be (batch, n) = {(batch, n)}: "
                "masks over pairs of tokens are not supported, use causal and segment_ids"
            )
        if x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, but must be bool or integers: additive masks are not supported")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: move it there")


def _check_masses(log_masses, shape: tuple[int, int, int], device: torch.device) -> None:
    if not isinstance(log_masses, torch.Tensor) or not log_masses.is_floating_point():
        got = f"dtype {log_masses.dtype}" if isinstance(log_masses, torch.Tensor) else type(log_masses).__name__
        raise TypeError(f"log_masses must be a floating-point tensor (batch, kv_heads, n), but is {got}")
    if log_masses.shape != shape:
        raise ValueError(f"log_masses has shape {tuple(log_masses.shape)}, but must be (batch, kv_heads, n) = {shape}")
    if log_masses.device != device:
        raise ValueError(f"log_masses is on {log_masses.device}, but q is on {device}: move it there")


def check_logits(scale: float | None, softcap: float | None, dropout_p: float) -> None:
    """Raises ValueError for numbers that are out of range."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}, but must be a finite number, or None for head_dim ** -0.5")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, but must be positive and finite, or None for none")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}, but must be at least 0 and less than 1")

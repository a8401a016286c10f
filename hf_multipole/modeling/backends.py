"""Which code computes an attention: the GPU kernels, or PyTorch."""

import os
from collections.abc import Mapping

import torch

_WIDEST = 256  # channels of a head that a program of the kernels can hold
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes_kernels(backend: str, q: torch.Tensor, widths: Mapping[str, int], dropout_p: float = 0.0, order: int = 3) -> bool:
    """Whether the GPU kernels run on q and tensors like it.

    backend: "torch": never; "auto": on CUDA devices, where the kernels can; "triton": always. widths: channels that a program must
    hold, by the names of the tensors; order: of tensor attention. Raises ValueError or TypeError where the kernels must run but
    cannot.
    """
    if backend == "torch" or (backend == "auto" and q.device.type != "cuda"):
        return False
    obstacle = _obstacle(q, widths, dropout_p, order)
    if obstacle is None or backend == "auto":
        return obstacle is None
    raise obstacle


def _obstacle(q, widths, dropout_p, order) -> Exception | None:
    remedy = "pass backend='auto' or 'torch'"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return ValueError(f"the GPU kernels need tensors on a CUDA device, but q is on {q.device}; move them, or {remedy}")
    if q.dtype not in _DTYPES:
        return TypeError(f"the GPU kernels take float32, bfloat16 and float16, but q has {q.dtype}; {remedy}")
    if order != 3:
        return ValueError(f"the GPU kernels of tensor attention are of order 3, with two keys, but there are {order - 1}; {remedy}")
    if dropout_p:
        return ValueError(f"the GPU kernels have no dropout, but dropout_p is {dropout_p}; {remedy}")
    for name, width in widths.items():
        if width > _WIDEST:
            return ValueError(f"the GPU kernels take a head_dim of at most {_WIDEST}, but that of {name} is {width}; {remedy}")
    return None

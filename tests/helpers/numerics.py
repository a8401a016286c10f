"""Comparing tensors: bounds, what rounds, and how much memory a computation takes."""

import gc
import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LOW = (torch.float32, torch.bfloat16, torch.float16)
EVERY = (torch.float64, *LOW)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums must be computed in; not the package's own, whose faults would widen the bounds."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: float, what: str, case) -> None:
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}: {case}"
    # Not-a-number compares false, so that it fails as well.
    error = (actual.double().cpu() - expected.double().cpu()).abs()
    assert (error <= bound).all(), f"{what} is off by {error.max().item():.3g}, more than {bound:.3g}: {case}"


class RoundedProducts(TorchDispatchMode):
    """Rounds products, weights and their derivatives to a dtype, as tensor cores take them; sums are left as they are."""

    NAMES = ("mul", "div", "mm", "mv", "dot", "bmm", "tanh", "tanh_backward", "_softmax", "_softmax_backward_data")

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out.to(self.dtype).double() if function.overloadpacket.__name__ in self.NAMES else out


def peak_bytes(function) -> int:
    """Most bytes of tensors allocated at one time while the function runs; what only the garbage collector frees stays."""
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
    finally:
        gc.enable()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    # They are listed thread by thread, and the backward pass has its own.
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))

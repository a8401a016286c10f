"""What a figure was measured on, and how: the machine, times of one call, the rates of a matrix product and a copy."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, TaskSpec


def machine() -> dict:
    """The processor, the load on it, the GPU where there is one, and versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")] or [platform.processor()]
    versions = {"system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        versions |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": version("triton")}
    return {"processor": names[0], "cores": os.cpu_count(), "load": os.getloadavg()} | versions


def timed(device: str, work: Callable, *arguments) -> tuple[float, float]:
    """Wall and processor seconds of one call; on CUDA the device's time, by events.

    torch.utils.benchmark.Timer warms up before each of its runs: methods that take turns, one call each a round, need a single call.
    """
    cuda = torch.device(device).type == "cuda"
    if cuda:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
    wall, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    if cuda:
        stop.record()
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return start.elapsed_time(stop) / 1e3 if cuda else wall, cpu


def spread_of(samples: Sequence[tuple[float, float]], clock: str = "wall") -> dict[str, float]:
    """Of what :func:`timed` gave, by the ``clock`` "wall" or "processor": the median, half the interquartile range as ``spread``, and
    processor over wall time as ``cpu``.
    """
    wall, cpu = zip(*samples)
    found = Measurement(1, list(cpu if clock == "processor" else wall), TaskSpec("", ""))
    return {"median": found.median, "spread": found.iqr / 2, "cpu": sum(cpu) / sum(wall)}


def yardsticks(device: str, dtype: torch.dtype) -> tuple[Callable, Callable, int, int]:
    """A large matrix product and a copy, as functions; the operations of the one, the bytes of the other."""
    size = 1024 if torch.device(device).type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    source, target = torch.zeros(2, 2**26, device=device, dtype=torch.uint8)  # more than caches hold
    return lambda: torch.mm(matrix, matrix), lambda: target.copy_(source), 2 * size**3, 2 * source.nbytes

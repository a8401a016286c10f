"""Processes that come from one server, which has imported the libraries once: each starts in a moment, and is alone.

Where the interpreter's start itself is what is tested, tests run ``sys.executable``.
"""

import multiprocessing.forkserver
import os
import socket
import unittest.mock
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOIN = 300  # seconds after which a process hangs, on however busy a machine


def environment() -> dict[str, str]:
    """That of this process; a clone is found from any folder, the Hub is not asked, and one thread serves each process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def start(target, *arguments):
    """``target(*arguments)``, a function of a module of tests, in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preloaded"])
    # The server takes its path from the environment; a module that it does not find it leaves out in silence.
    with unittest.mock.patch.dict(os.environ, environment()):
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def ranks(count: int) -> list[dict[str, str]]:
    """What a launcher tells each of ``count`` processes of a run on the CPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} for rank in range(count)]


def on_ranks(count: int, target, *arguments) -> list[int]:
    """``target(environment, *arguments)`` on ``count`` gloo ranks; their exit codes."""
    processes = [start(target, rank, *arguments) for rank in ranks(count)]
    for process in processes:
        process.join(JOIN)
    return [process.exitcode for process in processes]

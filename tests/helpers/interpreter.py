"""Where GPU kernels run in tests: on a GPU where there is one, else under Triton's interpreter."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"))


def gpu(test):
    """A test that needs a CUDA device."""
    for mark in GPU:
        test = mark(test)
    return test

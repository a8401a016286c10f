from functools import partial

import pytest

from tests.helpers.interpreter import DEVICE


@pytest.fixture(scope="session")
def quick_interpreter():
    """Triton's interpreter prepares the language anew for every function that a kernel calls; once a kernel is enough."""
    if DEVICE == "cuda":
        yield
        return
    pytest.importorskip("triton")
    from hf_multipole.modeling import triton_common

    function = type(triton_common.dot)
    call = function.__call__

    def quick(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("hf_multipole.")
        return (self.rewrite() if ours else partial(call, self))(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "__call__", quick)
        yield


@pytest.fixture
def small_tiles(quick_interpreter, monkeypatch):
    """Several tiles in a short row of tensor attention, and one row for each query."""
    from hf_multipole.modeling import tensor_triton as kernels

    monkeypatch.setattr(kernels, "_PROGRAMS", 1)
    monkeypatch.setattr(kernels, "_TILES", dict.fromkeys(kernels._TILES, [kernels._Tiles(16, 16, 4)] * 2))

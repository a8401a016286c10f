"""The GPU kernels of tensor attention beyond their properties: the near-linear path, the operator, what is refused; and compiled."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import hf_multipole
from hf_multipole.modeling.polynomial_attention import features
from hf_multipole.reference import tensor_attention_reference
from tests.helpers.interpreter import DEVICE, gpu
from tests.helpers.numerics import assert_within
from tests.helpers.operators import check_operator
from tests.helpers.tensor_cases import TensorCase, by_kernels, make, plain_tensors
from tests.helpers.tensor_properties import (
    matches_reference,
)

triton = pytest.importorskip("triton")

from hf_multipole.modeling import polynomial_triton as near_kernels  # noqa: E402
from hf_multipole.modeling import tensor_triton as kernels  # noqa: E402
from hf_multipole.modeling.polynomial_triton import feature_map  # noqa: E402

ROOT = Path(hf_multipole.__file__).parents[1]


# The interpreter computes what is not finite as the kernels do, and says so.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("quick_interpreter")]


FULL = TensorCase(n=18, batch=1, kv_heads=1, dtype=torch.float32)
WINDOWS = replace(FULL, n=20, window=(3, 6))
PACKED = {"cuts": (3, 8), "padding": ((2, 1),)}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, (3, 6)])
def test_several_rows_of_each_query(monkeypatch, window, causal):
    """As for few queries."""
    monkeypatch.setattr(kernels, "_TILES", dict.fromkeys(kernels._TILES, [kernels._Tiles(16, 16, 4)] * 2))
    case = replace(FULL, n=11, queries=3, repeats=2, window=window, causal=causal, padding=((1, 3),))
    assert kernels._splits(kernels._Tiles(16, 16, 4), 6, min(window or (11,))) == (8 if window is None else 2)
    matches_reference(by_kernels, case)


# The near-linear path

NEAR = {"method": "polynomial", "degree": 3, "entry_bound": 1.0}
SHORT = TensorCase(n=19, batch=1, kv_heads=1, entries=1.0, dtype=torch.float32)  # more than one chunk
NEAR_CASES = {
    "causal": SHORT,
    "bidirectional": replace(SHORT, causal=False),
    "grouped heads, packed": replace(SHORT, repeats=2, layout="fused", **PACKED),
    "the last queries": replace(SHORT, queries=4, value_dim=33),  # more than one tile of channels
    "bfloat16": replace(SHORT, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("dim, degree", [(3, 4), (2, 1), (1, 5)])
def test_features(dim, degree):
    """The same monomials in the same order, products in the same order, and their gradients."""
    x = torch.randn(17, dim, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, expected = feature_map(x.to(DEVICE), degree).cpu(), features(x, degree)
    assert torch.equal(found, expected)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (actual,), (wanted,) = (torch.autograd.grad(y, x, upstream, allow_unused=True, materialize_grads=True) for y in (found, expected))
    assert_within(actual, wanted, 1e-5 * max(1.0, wanted.abs().max().item()), "gradient", (dim, degree))


@pytest.mark.parametrize("case", NEAR_CASES.values(), ids=NEAR_CASES)
@pytest.mark.slow
def test_the_near_linear_path_equals_its_definition(case):
    """The same polynomial in float64, within what the certificate allows for rounding."""
    exact = make(case, torch.float64, rounded=case.dtype)
    expected = exact.with_gradients(hf_multipole.tensor_attention, **NEAR)
    _, certificate = make(case)(hf_multipole.tensor_attention, return_certificate=True, **NEAR)
    bound = certificate.rounding.max().item()
    for name, x in make(case).with_gradients(by_kernels, **NEAR).items():
        assert_within(x, expected[name], bound * max(1.0, expected[name].abs().max().item()), name, case)


@pytest.mark.parametrize("name", ["feature_map", "causal_sums"])
def test_opcheck_of_the_near_linear_path(name):
    shapes = {"feature_map": [(3, 2)], "causal_sums": [(1, 2, 17, 5), (2, 1, 17, 5), (2, 1, 17, 3), (2, 1, 2, 5, 3)]}[name]
    arguments = [torch.rand(shape, device=DEVICE, requires_grad=True) for shape in shapes] + [2] * (name == "feature_map")
    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(getattr(near_kernels, name), tuple(arguments), test_utils=tests)


# Ways it is called


def test_opcheck(small_tiles):
    check_operator(kernels, "tensor_kernels", partial(make(replace(WINDOWS, n=6, cuts=(2,), padding=((1, 1),))), by_kernels))


def test_autocast(small_tiles):
    """float32 in, bfloat16 out; gradients are float32."""
    call = make(replace(WINDOWS, n=6))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = call(by_kernels)
    expected = make(replace(WINDOWS, n=6), torch.bfloat16)(by_kernels)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.sum(), list(call.leaves.values())))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen_where_it_is_and_nowhere_else(small_tiles, value):
    """As a marked output of every query that sees it."""
    for name, width in (("q", 1), ("k0", 3), ("v0", 3), ("k1", 6), ("v1", 6)):
        call = make(replace(WINDOWS, n=12))
        before = call(by_kernels)
        with torch.no_grad():
            call.leaves[name][:, :, 5, 1] = value
        after, seen = call(by_kernels), slice(5, 5 + width)
        assert after[:, :, seen].isnan().all(), name
        assert torch.equal(after[:, :, :5], before[:, :, :5]) and torch.equal(after[:, :, 5 + width :], before[:, :, 5 + width :]), name


def test_large_products_of_float16(small_tiles):
    """Entries of some 300: products of two of them leave the range of float16, scores do not."""
    case = replace(WINDOWS, n=6, dtype=torch.float16, dim=16, scale=1e-8)
    call, exact = make(case), make(case, torch.float64, rounded=torch.float16)
    with torch.no_grad():
        for some in (call, exact):
            for name in ("q", "k0", "k1"):
                some.leaves[name].mul_(300)
    expected = exact.with_gradients(tensor_attention_reference)
    for name, x in call.with_gradients(by_kernels).items():
        assert_within(x, expected[name], 0.02 * expected[name].abs().max().item(), name, case)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, (32, 100)])
@pytest.mark.parametrize("widths", [{"dim": 64, "value_dim": 64}, {"dim": 128, "value_dim": 256}, {"dim": 40, "value_dim": 24}])
def test_real_sizes(widths, window, causal, dtype):
    """Many tiles of the size that is used, against the PyTorch path in float64."""
    case = TensorCase(
        n=300, kv_heads=2, repeats=3, causal=causal, window=window, padding=((7, 0), (0, 150)), cuts=(170,), dtype=dtype, **widths
    )
    exact, rounded = (make(case, torch.float64, **options) for options in ({}, {"rounded": dtype}))
    expected, rounded = (call.with_gradients(hf_multipole.tensor_attention) for call in (exact, rounded))
    for name, x in make(case).with_gradients(by_kernels).items():
        size = expected[name].abs().max().item()
        bound = 4 * (rounded[name].to(dtype).double() - expected[name]).abs().max().item() + torch.finfo(dtype).eps * size
        assert_within(x, expected[name], bound + 2 * case.n * torch.finfo(torch.float32).eps * size, name, case)


# In an interpreter of its own, where kernels are not interpreted. What the operators launch is compiled in place of being run.
COMPILE = """
import json, sys
import torch
from tests.helpers.compiled_kernels import compile_launch
from hf_multipole.modeling import polynomial_triton, tensor_triton

class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps, num_stages=3, **constants):
        arguments = dict(zip(self.kernel.arg_names, arguments)) | constants
        found = compile_launch(self.kernel, arguments, capability, num_warps=num_warps, num_stages=num_stages)
        results[f"{self.kernel.__name__} {name}"] = found[-2:]

for module in (tensor_triton, polynomial_triton):
    for name, x in list(vars(module).items()):
        if name.endswith("_kernel"):
            setattr(module, name, Compiled(x))

results = {}
wide = (4, 2, 48, [8, 32])
for capability, dtype, dim, (heads, kv_heads, n, windows) in (
    (90, "bfloat16", 128, wide),
    (80, "bfloat16", 128, wide),
    (80, "bfloat16", 64, wide),
    (80, "float16", 64, wide),
    (90, "float16", 128, wide),
    (80, "float32", 16, wide),
    (80, "float32", 16, (1, 1, 1, [1, 1])),  # numbers of 1 are constants of a kernel
):
    name = f"{capability} {dtype} {dim} {n}"
    shapes = [(1, h, n, dim) for h in (heads, *[kv_heads] * 4)]
    q, *others = (torch.zeros(shape, dtype=getattr(torch, dtype), requires_grad=True) for shape in shapes)
    out, _ = tensor_triton.tensor_kernels(q, *others, None, n > 1, windows, 0.1)
    out.sum().backward()

capability, name = 80, "80"
x = torch.zeros(2, 4, 33, 4, requires_grad=True)
polynomial_triton.feature_map(x, 3).sum().backward()
shapes = (2, 3, 33, 35), (2, 2, 33, 35), (2, 2, 33, 5), (2, 2, 3, 35, 5)
polynomial_triton.causal_sums(*(torch.zeros(shape, requires_grad=True) for shape in shapes)).sum().backward()
print(json.dumps(results))
"""


@pytest.mark.slow
def test_compiled_for_gpus_that_are_not_there(tmp_path):
    """Types, of which the interpreter knows nothing; the shared memory of any GPU since the A100; few registers that are spilled."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 7 * 4 + 4
    for name, (spilled, shared) in results.items():
        assert shared <= 99 * 1024 and spilled <= 1024, (name, spilled, shared)


@gpu
@pytest.mark.parametrize("causal", [True, False])
def test_the_near_linear_path_at_real_sizes(causal):
    """Rows of several parts; the output within its certificate."""
    case = TensorCase(n=3000, kv_heads=2, repeats=2, dim=8, value_dim=64, entries=1.0, scale=1 / 8, causal=causal, dtype=torch.float32)
    near = {"method": "polynomial", "degree": 4, "entry_bound": 1.0}
    expected = make(case, torch.float64).with_gradients(hf_multipole.tensor_attention, **near)
    _, certificate = make(case)(hf_multipole.tensor_attention, return_certificate=True, **near)
    for name, x in make(case).with_gradients(by_kernels, **near).items():
        bound = certificate.rounding.max().item() * max(1.0, expected[name].abs().max().item())
        assert_within(x, expected[name], bound, name, case)


# What is refused

REFUSED = {
    "order 4": ({"keys": [torch.zeros(2, 2, 20, 4)] * 3, "values": [torch.zeros(2, 2, 20, 4)] * 3}, ValueError, "order 3"),
    "order 2 of the near-linear path": (
        NEAR | {"keys": [torch.zeros(2, 2, 20, 4)], "values": [torch.zeros(2, 2, 20, 4)]},
        ValueError,
        "order 3",
    ),
    "dropout": ({"dropout_p": 0.1}, ValueError, "dropout_p is 0.1"),
    "wide heads": ({"q": torch.zeros(2, 2, 20, 260), "keys": [torch.zeros(2, 2, 20, 260)] * 2}, ValueError, "that of q is 260"),
    "wide values": ({"values": [torch.zeros(2, 2, 20, 260)] * 2}, ValueError, "that of values is 260"),
}


@pytest.mark.parametrize("options, error, words", REFUSED.values(), ids=REFUSED)
def test_refused_with_the_remedy(options, error, words):
    with pytest.raises(error, match=words) as caught:
        hf_multipole.tensor_attention(**plain_tensors(**options), backend="triton")
    assert "pass backend='auto' or 'torch'" in str(caught.value) and "\n" not in str(caught.value)


def test_float64_is_refused():
    call = make(replace(FULL, dtype=torch.float64))
    with pytest.raises(TypeError, match="q has torch.float64; pass backend='auto' or 'torch'"):
        call(hf_multipole.tensor_attention, backend="triton")


def test_a_device_that_is_no_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="need tensors on a CUDA device, but q is on cpu; move them, or pass backend='auto' or 'torch'"):
        hf_multipole.tensor_attention(**plain_tensors(), backend="triton")


def test_auto_leaves_other_devices_to_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, kernels.__name__, None)  # an import of it fails
    hf_multipole.tensor_attention(**plain_tensors())


@pytest.mark.parametrize("version, words", [(None, "need Triton: pip install"), ("3.2.0", "need Triton 3.3 or later, but this is 3.2.0")])
@pytest.mark.parametrize("file", ["tensor_triton", "polynomial_triton"])
def test_a_triton_that_is_missing_or_too_old(monkeypatch, file, version, words):
    name = f"hf_multipole.modeling.{file}"
    for loaded in (name, "hf_multipole.modeling.triton_common"):
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    if version is None:
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(ImportError, match=words) as caught:
        importlib.import_module(name)
    assert "backend='torch'" in str(caught.value)

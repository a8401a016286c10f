"""The GPU kernels of summaries against the PyTorch path: on a GPU where there is one, else under Triton's interpreter."""

import pytest
import torch

from hf_multipole.modeling import summaries

pytest.importorskip("triton")

from hf_multipole.modeling import summaries_triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # batch, heads, groups, width, dim, rank
    "tiles that are full": (2, 2, 3, 16, 16, 4),
    "nothing a power of two": (1, 3, 2, 9, 5, 3),
    "merge": (1, 2, 3, 4, 8, 2),
    "one of each": (1, 1, 1, 1, 1, 1),
    "ranks in two tiles": (1, 1, 2, 24, 5, 12),
    "tokens in several tiles": (1, 1, 2, 150, 20, 6),
}


def tensors(shape, dtype, weight_dtype):
    batch, heads, groups, width, dim, rank = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator)

    # Heads between tokens, as projections leave them.
    x, before = (normal(batch, groups * width, heads, dim).transpose(1, 2).unflatten(2, (groups, width)) for _ in "xg")
    weight, grad = normal(heads, rank, width, dim), normal(batch, heads, groups, rank, dim)
    return [y.to(DEVICE, kind) for y, kind in ((x, dtype), (weight, weight_dtype), (grad, torch.float32), (before, dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.slow
def test_map_and_its_gradients(shape, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_GROUPS", 2)
    x, weight, grad, before = tensors(shape, dtype, dtype)
    width, rank = shape[3], shape[5]
    exact = torch.einsum("bhgtc,hrtc->bhgrc", x.double(), weight.double())
    # Sums of float32 with one rounding a term, of terms that a hundred standard deviations would not reach.
    eps = torch.finfo(torch.float32).eps
    out = kernels.depthwise_map(x, weight)
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() <= width * eps * 10

    after = before.clone(memory_format=torch.preserve_format)
    grad_weight = kernels.depthwise_map_backward_(after, grad, x, weight)
    expected = before.double() + torch.einsum("bhgrc,hrtc->bhgtc", grad.double(), weight.double())
    unit = torch.finfo(dtype).eps
    assert ((after - expected).abs() <= unit / 2 * expected.abs() * 1.01 + rank * eps * 10).all()
    expected = torch.einsum("bhgtc,bhgrc->hrtc", x.double(), grad.double())
    assert ((grad_weight - expected).abs() <= unit / 2 * expected.abs() * 1.01 + shape[0] * shape[2] * eps * 10).all()
    assert grad_weight.dtype == dtype


@pytest.mark.parametrize("kind", ["direct", "hierarchical"])
@pytest.mark.slow
def test_summaries_are_those_of_the_pytorch_path(kind):
    """All levels, ragged groups and their counts, and every gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 2, 2, 3)
    summary = (summaries.DirectSummary(*sizes, 37) if kind == "direct" else summaries.HierarchicalSummary(*sizes)).to(DEVICE)
    with torch.no_grad():
        for weight in summary.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator).to(DEVICE) * 0.3)
    tokens = torch.randn(1, 2, 40, 3, generator=generator).to(DEVICE)
    validity = (torch.arange(40) < 37)[None].to(DEVICE)
    results = []
    for use in (False, True):
        x = tokens.clone().requires_grad_()
        kept, levels, counts = summary(x, validity, 3, everything=True, kernels=use)
        total = sum((level**2).sum() for level in levels) + sum(level.sum() for level in counts) + (kept**2).sum()
        leaves = [x, *summary.parameters()]
        results.append([*levels, *counts, *torch.autograd.grad(total, leaves)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_opcheck():
    x, weight, grad, before = tensors(SHAPES["merge"], torch.float32, torch.float32)
    torch.library.opcheck(kernels.depthwise_map, (x, weight), test_utils=("test_schema", "test_faketensor"))
    arguments = (before.contiguous(), grad, x, weight)
    torch.library.opcheck(kernels.depthwise_map_backward_, arguments, test_utils=("test_schema", "test_faketensor"))

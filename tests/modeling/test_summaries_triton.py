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
    "one channel": (2, 2, 3, 150, 1, 4),
}


def tensors(shape, dtype, weight_dtype):
    batch, heads, groups, width, dim, rank = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator)

    # Heads between tokens, as projections leave them.
    x, before = (normal(batch, groups * width, heads, dim).transpose(1, 2).unflatten(2, (groups, width)) for _ in "xg")
    weight, grad = normal(heads, rank, width, dim), normal(batch, heads, groups, rank, dim)
    # With gaps, as a slice of them has.
    masses = normal(batch, heads, groups, width + 1).abs()[..., 1:]
    kinds = (x, dtype), (weight, weight_dtype), (grad, torch.float32), (before, dtype), (masses, torch.float32)
    return [y.to(DEVICE, kind) for y, kind in kinds]


@pytest.mark.parametrize("weighed", ["", "masses", "masses of all heads", "constant masses"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.slow
def test_map_and_its_gradients(shape, dtype, weighed, monkeypatch):
    monkeypatch.setattr(kernels, "_GROUPS", 2)
    x, weight, grad, before, masses = tensors(shape, dtype, dtype)
    masses = masses[:, :1].expand(-1, shape[1], -1, -1) if weighed == "masses of all heads" else masses if weighed else None
    heavy = x.double() if masses is None else x.double() * masses.double()[..., None]
    width, dim, rank = shape[3:]
    exact = torch.einsum("bhgtc,hrtc->bhgrc", heavy, weight.double())
    # Sums of float32 with one rounding a term (two with masses), of terms that a hundred standard deviations would not reach.
    eps = torch.finfo(torch.float32).eps * (1 if masses is None else 4)
    out = kernels.depthwise_map(x, weight, masses)
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() <= width * eps * 10

    after = before.clone(memory_format=torch.preserve_format)
    of_masses = weighed.startswith("masses")
    grad_weight, grad_masses = kernels.depthwise_map_backward_(after, grad, x, weight, masses, of_masses)
    of_heavy = torch.einsum("bhgrc,hrtc->bhgtc", grad.double(), weight.double())
    expected = before.double() + (of_heavy if masses is None else of_heavy * masses.double()[..., None])
    unit = torch.finfo(dtype).eps
    assert ((after - expected).abs() <= unit / 2 * expected.abs() * 1.01 + rank * eps * 10).all()
    expected = torch.einsum("bhgtc,bhgrc->hrtc", heavy, grad.double())
    assert ((grad_weight - expected).abs() <= unit / 2 * expected.abs() * 1.01 + shape[0] * shape[2] * eps * 10).all()
    assert grad_weight.dtype == dtype
    assert grad_masses.shape == (masses.shape if of_masses else (0,))
    if of_masses:
        assert (grad_masses - (of_heavy * x.double()).sum(-1)).abs().max() <= rank * dim * eps * 10


@pytest.mark.parametrize("masses", [None, 1, 2], ids=["", "masses of all heads", "masses"])
@pytest.mark.parametrize("kind", ["mean", "direct", "hierarchical"])
@pytest.mark.slow
def test_summaries_are_those_of_the_pytorch_path(kind, masses):
    """All levels, ragged groups and their counts, and every gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 2, 2, 3)
    summary = {
        "mean": lambda: summaries.MeanSummary(*sizes[:2]),
        "direct": lambda: summaries.DirectSummary(*sizes, 37),
        "hierarchical": lambda: summaries.HierarchicalSummary(*sizes),
    }[kind]().to(DEVICE)
    with torch.no_grad():
        for weight in summary.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator).to(DEVICE) * 0.3)
    tokens = torch.randn(1, 2, 40, 3, generator=generator).to(DEVICE)
    validity = (torch.arange(40) < 37)[None].to(DEVICE)
    if masses is not None:
        masses = torch.randn(1, masses, 40, generator=generator).to(DEVICE).exp() * validity
    results = []
    for use in (False, True):
        x = tokens.clone().requires_grad_()
        leaves = [x, *summary.parameters()]
        if masses is not None:
            leaves.append(masses.clone().requires_grad_())
        kept, levels, counts = summary(x, validity, 3, everything=True, kernels=use, token_masses=None if masses is None else leaves[-1])
        total = sum((level**2).sum() for level in levels) + sum(level.sum() for level in counts) + (kept**2).sum()
        results.append([*levels, *counts, *torch.autograd.grad(total, leaves)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighed, of_masses", [(False, False), (True, False), (True, True)])
def test_opcheck(weighed, of_masses):
    x, weight, grad, before, masses = tensors(SHAPES["merge"], torch.float32, torch.float32)
    masses = masses if weighed else None
    torch.library.opcheck(kernels.depthwise_map, (x, weight, masses), test_utils=("test_schema", "test_faketensor"))
    arguments = (before.contiguous(), grad, x, weight, masses, of_masses)
    torch.library.opcheck(kernels.depthwise_map_backward_, arguments, test_utils=("test_schema", "test_faketensor"))

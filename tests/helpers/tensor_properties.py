"""What every implementation of tensor attention must fulfil, as plain functions over an attention callable, which takes the arguments
of :func:`hf_multipole.tensor_attention`.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch.nn import functional as F

from hf_multipole.reference import tensor_attention_reference
from tests.helpers.numerics import RoundedProducts, assert_within, compute_dtype
from tests.helpers.tensor_cases import TensorCall, TensorCase, make


def matches_reference(attention, case: TensorCase, rounded_products: bool = False, **options) -> None:
    """Output and all gradients.

    In lower precision: twice the error that rounding the arguments and the result of the reference makes, which is unavoidable,
    once more for what an implementation rounds on its way; and its sums' rounding, one unit of the compute dtype a term. With
    ``rounded_products`` that reference takes them in the case's dtype.
    """
    call = make(case)
    actual = call.with_gradients(attention, **options)
    exact = make(case, torch.float64).with_gradients(tensor_attention_reference)
    assert actual["out"].dtype == case.dtype
    with RoundedProducts(case.dtype) if rounded_products else nullcontext():
        rounded = make(case, torch.float64, rounded=case.dtype).with_gradients(tensor_attention_reference)
    terms = (case.n * (case.order - 1) + case.dim + case.value_dim) * torch.finfo(compute_dtype(case.dtype)).eps
    for name, value in exact.items():
        size = value.abs().max().item()
        unavoidable = (rounded[name].to(case.dtype).double() - value).abs().max().item()
        bound = 2 * unavoidable + torch.finfo(case.dtype).eps * size + terms * max(1.0, size)
        assert_within(actual[name], value, 1e-10 * max(1.0, size) if case.dtype == torch.float64 else bound, name, case)
    padded = ~call.visible(1).any(-1)[:, None, :, None].expand(exact["out"].shape)
    assert (actual["out"][padded] == 0).all(), f"padded queries are not zero: {case}"


def sees_exactly_what_is_visible(attention, case: TensorCase) -> None:
    """The gradient of each query's output is zero at hidden tokens and nonzero at visible ones, for every index."""
    call = make(replace(case, value_dim=1))
    out = call(attention)
    for t in range(out.shape[2]):
        gradients = torch.autograd.grad(out[:, :, t].sum(), list(call.leaves.values()), retain_graph=True)
        for name, gradient in zip(call.leaves, gradients):
            if name == "q":
                continue
            touched = (gradient != 0).any(-1)
            seen = call.visible(case.window and case.window[int(name[1])])[:, None, t].expand(touched.shape)
            assert not (touched & ~seen).any(), f"query {t} depends on hidden tokens of {name}: {case}"
            if name[0] == "v":
                assert not (seen & ~touched).any(), f"query {t} does not depend on visible tokens of {name}: {case}"


def future_does_not_matter(attention, case: TensorCase, values=(17.0, torch.nan, torch.inf)) -> None:
    """Causal: outputs up to a token are the same, whatever comes after it."""
    case = replace(case, causal=True, queries=None)
    before = make(case)(attention).detach()
    bound = 4 * torch.finfo(case.dtype).eps * max(1.0, before.abs().max().item())
    for t in sorted({0, case.n // 3, case.n - 2} & set(range(case.n - 1))):
        for value in values:
            for names in (["q"], ["k0"], [f"v{case.order - 2}"], None):
                changed = make(case)
                with torch.no_grad():
                    for name in names or changed.leaves:
                        changed.leaves[name][:, :, t + 1 :] = value
                what = f"the past of token {t}, with {value} in the future of {names},"
                assert_within(changed(attention).detach()[:, :, : t + 1], before[:, :, : t + 1], bound, what, case)


def padding_does_not_matter(attention, case: TensorCase, garbage=(1e4, torch.nan, torch.inf, -torch.inf)) -> None:
    """A row gives the same outputs and gradients alone and with padding on either side, whatever the padding holds."""
    case = replace(case, padding=None, cuts=None, queries=None, batch=1)
    alone = make(case)
    expected = alone.with_gradients(attention)
    for (left, right), value in zip(((5, 0), (0, 5), (5, 10), (1, 0)), garbage):

        def fill(x, value):
            return F.pad(x.detach(), (0, 0, left, right), value=value).requires_grad_()

        mask = fill(torch.ones(case.n, 1), 0)[:, 0].detach().long()[None]
        leaves = {name: fill(x, value) for name, x in alone.leaves.items()}
        padded = TensorCall(leaves, alone.options | {"attention_mask": mask}, fill(alone.upstream, 1.0).detach(), case.layout)
        for name, x in padded.with_gradients(attention).items():
            size = max(1.0, expected[name].abs().max().item())
            bound = 1e-10 * size if case.dtype == torch.float64 else 2 * torch.finfo(case.dtype).eps * size + case.n * 1e-6 * size
            assert_within(x[:, :, left : left + case.n], expected[name], bound, f"{name}, padded ({left}, {right})", case)
            assert (x[:, :, :left] == 0).all() and (x[:, :, left + case.n :] == 0).all(), f"{name} at padding: {case}"


def documents_do_not_meet(attention, case: TensorCase) -> None:
    """Every document of a packed row gives what it gives alone, in outputs and gradients."""
    case = replace(case, padding=None, queries=None, batch=1)
    packed = make(case)
    actual = packed.with_gradients(attention)
    edges = [0, *(case.cuts or ()), case.n]
    for start, stop in zip(edges, edges[1:]):
        part = slice(start, stop)
        leaves = {name: x[:, :, part].detach().requires_grad_() for name, x in packed.leaves.items()}
        alone = TensorCall(leaves, packed.options | {"segment_ids": None}, packed.upstream[:, :, part], case.layout)
        for name, value in alone.with_gradients(attention).items():
            size = max(1.0, value.abs().max().item())
            bound = 1e-10 if case.dtype == torch.float64 else case.n * torch.finfo(case.dtype).eps * size
            assert_within(actual[name][:, :, part], value, bound, f"{name} of tokens {start} to {stop}", case)


def weights_sum_to_one(attention, case: TensorCase) -> None:
    """Values of 2 in every index: their product, and zeros at padded queries."""
    call = make(case)
    with torch.no_grad():
        for name in call.leaves:
            if name[0] == "v":
                call.leaves[name].fill_(2.0)
    real = call.visible(1).any(-1)[:, None, :, None]
    assert_within(call(attention), (2.0 ** (case.order - 1) * real).expand(call.upstream.shape), 1e-13, "constant values", case)


def half_precision_is_rounded_once(attention, case: TensorCase) -> None:
    """What is computed from the arguments is float32 to the end."""
    actual = make(case).with_gradients(attention)
    exact = make(case, torch.float64, rounded=case.dtype).with_gradients(tensor_attention_reference)
    for name, value in exact.items():
        error = (actual[name].double() - value).abs()
        assert (error <= 0.51 * torch.finfo(case.dtype).eps * value.abs() + 1e-5).all(), (name, error.max(), case)


def layout_does_not_matter(attention, case: TensorCase) -> None:
    assert torch.equal(make(case)(attention), make(replace(case, layout="contiguous"))(attention)), case


def compiles_without_a_graph_break(attention, case: TensorCase, bound: float) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    actual, expected = (make(case).with_gradients(function) for function in (compiled, attention))
    for name, value in expected.items():
        assert_within(actual[name], value, bound, name, case)

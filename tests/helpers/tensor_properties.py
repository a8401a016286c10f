"""What every implementation of tensor attention must fulfil, as plain functions over an attention callable.

``attention`` takes the arguments of :func:`hf_multipole.tensor_attention`. A ``TensorCase`` describes one call; its tensors follow
from its seed, so that a failing case can be run again from its printed form.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_multipole.reference import tensor_attention_reference
from tests.helpers.multipole_properties import LAYOUTS, RoundedProducts, _lay_out, assert_within, compute_dtype, mask_of, segments_of


@dataclass(frozen=True)
class TensorCase:
    n: int = 9
    queries: int | None = None  # the last tokens; None for all
    order: int = 3
    batch: int = 2
    kv_heads: int = 2
    repeats: int = 1  # query heads a key head
    dim: int = 3
    value_dim: int = 2
    causal: bool = True
    window: tuple[int | None, ...] | None = None
    scale: float | None = None
    padding: tuple[tuple[int, int], ...] | None = None  # left and right of each row
    cuts: tuple[int, ...] | None = None  # first tokens of the documents of packed rows, beside 0
    entries: float | None = None  # entries of q and keys uniform within this bound; None for normal ones
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    seed: int = 0


@dataclass
class TensorCall:
    """Tensors of a case: ``leaves`` q, k0, k1, ..., v0, v1, ... and the remaining keyword arguments."""

    leaves: dict[str, torch.Tensor]
    options: dict
    upstream: torch.Tensor  # gradient of the output
    layout: str = "contiguous"

    def __call__(self, attention, **options) -> torch.Tensor:
        q, *others = (_lay_out(x, self.layout) for x in self.leaves.values())
        half = len(others) // 2
        return attention(q, others[:half], others[half:], **self.options | options)

    def with_gradients(self, attention, **options) -> dict[str, torch.Tensor]:
        out = self(attention, **options)
        if not out.requires_grad:  # the reference, where every token is padding
            return {"out": out} | {name: torch.zeros_like(x) for name, x in self.leaves.items()}
        gradients = torch.autograd.grad(out, list(self.leaves.values()), self.upstream, allow_unused=True, materialize_grads=True)
        return {"out": out.detach()} | dict(zip(self.leaves, gradients))

    def visible(self, window: int | None) -> torch.Tensor:
        """``(batch, queries, n)`` bool, from the definition: one document, both real, within the window, not later."""
        batch, n, queries = self.leaves["k0"].shape[0], self.leaves["k0"].shape[2], self.leaves["q"].shape[2]
        real = self.options.get("attention_mask")
        real = torch.ones(batch, n, dtype=torch.bool) if real is None else real.bool()
        visible = real[:, :, None] & real[:, None]
        if self.options.get("segment_ids") is not None:
            visible &= self.options["segment_ids"][:, :, None] == self.options["segment_ids"][:, None]
        distance = torch.arange(n)[:, None] - torch.arange(n)
        visible &= distance.abs() < (window or n)
        if self.options["causal"]:
            visible &= distance >= 0
        return visible[:, n - queries :]


def make(case: TensorCase, dtype: torch.dtype | None = None, rounded: torch.dtype | None = None) -> TensorCall:
    """The case's tensors in ``dtype`` (its own by default), optionally rounded to ``rounded`` before that."""
    dtype = dtype or case.dtype
    generator = torch.Generator().manual_seed(case.seed)

    def tensor(*shape, entries=None):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if entries is not None:
            x = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * entries
        return (x if rounded is None else x.to(rounded)).to(dtype).requires_grad_()

    indices, heads, queries = case.order - 1, case.kv_heads * case.repeats, case.queries or case.n
    leaves = {"q": tensor(case.batch, heads, queries, case.dim, entries=case.entries)}
    leaves |= {f"k{i}": tensor(case.batch, case.kv_heads, case.n, case.dim, entries=case.entries) for i in range(indices)}
    leaves |= {f"v{i}": tensor(case.batch, case.kv_heads, case.n, case.value_dim) for i in range(indices)}
    upstream = tensor(case.batch, heads, queries, case.value_dim).detach()
    options = dict(causal=case.causal, window=case.window, scale=case.scale)
    return TensorCall(leaves, options | dict(attention_mask=mask_of(case), segment_ids=segments_of(case)), upstream, case.layout)


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


@st.composite
def cases(draw, dtypes=(torch.float64,), n=st.integers(1, 12), windows=True, orders=(2, 3, 3, 3, 4), **fixed):
    """Random calls of order 2 to 4: grouped heads, windows, padding, packing, trailing queries, strides."""
    order = draw(st.sampled_from(orders))
    n = min(draw(n), 6) if order == 4 else draw(n)
    batch = draw(st.integers(1, 2))
    padding = cuts = window = None
    if draw(st.booleans()):
        sides = st.integers(0, max(0, n // 2))
        padding = tuple((left := draw(sides), draw(st.integers(0, min(n - left, n // 2)))) for _ in range(batch))
    if n > 1 and draw(st.sampled_from([False, False, True])):
        cuts = tuple(sorted(draw(st.sets(st.integers(1, n - 1), max_size=3))))
    if windows and draw(st.booleans()):
        window = tuple(draw(st.sampled_from([None, 1, 2, 3, 5, n + 3])) for _ in range(order - 1))
    drawn = dict(
        n=n,
        queries=draw(st.sampled_from([None, None, 1, -(-n // 3)])),
        order=order,
        batch=batch,
        kv_heads=draw(st.integers(1, 2)),
        repeats=draw(st.integers(1, 2)),
        dim=draw(st.sampled_from([1, 2, 4])),
        value_dim=draw(st.sampled_from([1, 2, 5])),
        causal=draw(st.booleans()),
        window=window,
        scale=draw(st.sampled_from([None, 0.4, -0.3])),
        padding=padding,
        cuts=cuts,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 1000)),
    )
    return TensorCase(**drawn | fixed)

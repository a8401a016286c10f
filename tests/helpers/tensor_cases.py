"""Calls of tensor attention. A ``TensorCase`` describes one call; its tensors follow from its seed, so that a failing case can be run
again from its printed form.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

import hf_multipole
from tests.helpers.interpreter import DEVICE
from tests.helpers.rows import LAYOUTS, lay_out, mask_of, segments_of


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
        q, *others = (lay_out(x, self.layout) for x in self.leaves.values())
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


# Implementations


def polynomial(q, keys, values, *, window=None, **options):
    return hf_multipole.tensor_attention(q, keys, values, method="polynomial", **options)


def fixed_polynomial(q, keys, values, **options):
    """A given polynomial, so that nothing is measured that could differ between two calls."""
    return polynomial(q, keys, values, degree=5, entry_bound=1.0, **options)


def by_kernels(q, keys, values, *, attention_mask=None, segment_ids=None, **options):
    """On the kernels' device; the result and gradients are on that of the arguments."""
    q, attention_mask, segment_ids, *others = (x if x is None else x.to(DEVICE) for x in (q, attention_mask, segment_ids, *keys, *values))
    masks = {"attention_mask": attention_mask, "segment_ids": segment_ids}
    half = len(others) // 2
    return hf_multipole.tensor_attention(q, others[:half], others[half:], **masks, backend="triton", **options).cpu()


# What is refused


def plain_tensors(n=20, heads=2, kv_heads=2, dim=4, count=2, **options):
    """Keyword arguments of tensor attention, to be changed into bad ones."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, n, dim, generator=generator)
    keys, values = ([torch.randn(2, kv_heads, n, dim, generator=generator) for _ in range(count)] for _ in range(2))
    return {"q": q, "keys": keys, "values": values} | options

"""Calls of fast multipole attention.

A ``Case`` describes one call; its tensors follow from its seed, so that a failing case can be run again from its printed form:

    matches_reference(multipole_attention, Case(n=37, causal=False), device="cuda")
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from hf_multipole.modeling.summaries import DirectSummary, HierarchicalSummary
from tests.helpers.numerics import compute_dtype
from tests.helpers.rows import LAYOUTS, lay_out, mask_of, segments_of

PADDED = ((5, 3), (0, 16))
SHAPES = {
    "plain": {},
    "padded": {"padding": PADDED},
    "packed": {"cuts": (3, 21, 30)},
    "packed and padded": {"cuts": (3, 21, 30), "padding": PADDED},
}


@dataclass(frozen=True)
class Case:
    n: int = 37
    queries: int | None = None  # the last tokens; None for all
    block_size: int = 4
    rank: int = 2
    batch: int = 2
    kv_heads: int = 2
    repeats: int = 1  # query heads a key head
    dim: int = 5
    value_dim: int = 3
    causal: bool = True
    summary: str = "mean"  # or "direct", "hierarchical", with random weights
    size_weighting: bool = True
    bias_levels: int = 0  # columns of far_bias; 0 for none
    max_levels: int | None = None
    softcap: float | None = None
    far_keys: bool = False
    sinks: int = 0
    saliency: bool = False  # tokens have masses of their own
    downsample: bool = False  # the O(n) form; with learned summaries of the queries where it is bidirectional and others are learned
    padding: tuple[tuple[int, int], ...] | None = None  # left and right of each row
    cuts: tuple[int, ...] | None = None  # first tokens of the documents of packed rows, beside 0
    dtype: torch.dtype = torch.float64
    mixed: bool = False  # the summaries' weights are kept in the dtype that sums are computed in
    layout: str = "contiguous"
    seed: int = 0


@dataclass
class Call:
    """Tensors of a case: ``leaves`` by name, which gradients are taken of, and the remaining keyword arguments."""

    leaves: dict[str, torch.Tensor]
    options: dict
    upstream: torch.Tensor  # gradient of the output
    layout: str = "contiguous"

    def __call__(self, attention) -> torch.Tensor:
        names = "q", "k", "v", "far_keys", "log_masses"
        tensors = {name: lay_out(self.leaves[name], self.layout) for name in names if name in self.leaves}
        if "far_bias" in self.leaves:
            tensors["far_bias"] = self.leaves["far_bias"]
        return attention(**tensors, **self.options)

    def with_gradients(self, attention) -> dict[str, torch.Tensor]:
        out = self(attention)
        if not out.requires_grad:  # the reference, where every token is padding
            return {"out": out} | {name: torch.zeros_like(x) for name, x in self.leaves.items()}
        gradients = torch.autograd.grad(out, list(self.leaves.values()), self.upstream, allow_unused=True, materialize_grads=True)
        return {"out": out.detach()} | dict(zip(self.leaves, gradients))

    def with_leaves(self, leaves: dict[str, torch.Tensor]) -> "Call":
        return Call(leaves, self.options, self.upstream, self.layout)

    def visible(self) -> torch.Tensor:
        """``(batch, queries, n)`` bool, from the definition: one document, both real, not later, within the reach of the levels."""
        batch, n = self.leaves["k"].shape[0], self.leaves["k"].shape[2]
        queries = self.leaves["q"].shape[2]
        real = self.options.get("attention_mask")
        real = torch.ones(batch, n, dtype=torch.bool) if real is None else real.bool().cpu()
        visible = real[:, :, None] & real[:, None]
        if self.options.get("segment_ids") is not None:
            ids = self.options["segment_ids"].cpu()
            visible &= ids[:, :, None] == ids[:, None]
        if self.options["max_levels"] is not None:
            # Groups of the last level are seen beside the own pair of them.
            place = (visible & torch.ones(n, n, dtype=torch.bool).tril(-1)).sum(-1)
            pair = place // (self.options["block_size"] << self.options["max_levels"])
            visible &= ((pair[:, :, None] - pair[:, None]).abs() <= 1) | (place < self.options["sink_tokens"])[:, None]
        if self.options["causal"]:
            visible &= torch.ones(n, n, dtype=torch.bool).tril()
        return visible[:, n - queries :]

    def real_queries(self) -> torch.Tensor:
        return self.visible().any(-1)


def make(case: Case, dtype: torch.dtype | None = None, rounded: torch.dtype | None = None, device="cpu", scale: float = 1.0) -> Call:
    """The case's tensors in ``dtype`` (its own by default), optionally rounded to ``rounded`` before that, in steps of 1 / ``scale`` of
    its own.
    """
    dtype = dtype or case.dtype
    generator = torch.Generator().manual_seed(case.seed)

    def of_weights(kind):
        return compute_dtype(kind) if case.mixed else kind

    def leaf(x, kind=lambda dtype: dtype):
        x = x if rounded is None else (x * scale).to(kind(rounded)).double() / scale
        return x.to(device, kind(dtype)).requires_grad_()

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    queries, heads = case.queries or case.n, case.kv_heads * case.repeats
    leaves = {
        "q": leaf(normal(case.batch, heads, queries, case.dim)),
        "k": leaf(normal(case.batch, case.kv_heads, case.n, case.dim)),
        "v": leaf(normal(case.batch, case.kv_heads, case.n, case.value_dim)),
    }
    upstream = leaf(normal(case.batch, heads, queries, case.value_dim)).detach()
    if case.far_keys:
        leaves["far_keys"] = leaf(normal(case.batch, case.kv_heads, case.n, case.dim))
    if case.saliency:
        leaves["log_masses"] = leaf(normal(case.batch, case.kv_heads, case.n))
    if case.bias_levels:
        leaves["far_bias"] = leaf(normal(heads, case.bias_levels))
    mask, segments = mask_of(case), segments_of(case)
    options = dict(
        block_size=case.block_size,
        rank=case.rank,
        causal=case.causal,
        size_weighting=case.size_weighting,
        max_levels=case.max_levels,
        softcap=case.softcap,
        sink_tokens=case.sinks,
        downsample_queries=case.downsample,
        attention_mask=None if mask is None else mask.to(device),
        segment_ids=None if segments is None else segments.to(device),
    )
    parts = [("key_summary", case.dim, case.kv_heads), ("value_summary", case.value_dim, case.kv_heads)]
    parts += [("query_summary", case.dim, heads)] if case.downsample and not case.causal else []
    for name, width, own in parts:
        if case.summary != "mean":
            kind = {"direct": DirectSummary, "hierarchical": HierarchicalSummary}[case.summary]
            length = (case.n,) if case.summary == "direct" else ()
            options[name] = kind(case.block_size, case.rank, own, width, *length).to(device, of_weights(dtype))
            for parameter, weight in options[name].named_parameters():
                with torch.no_grad():
                    weight.copy_(leaf(weight.detach().double().cpu() + 0.3 * normal(*weight.shape), of_weights))
                leaves[f"{name}.{parameter}"] = weight
    return Call(leaves, options, upstream, case.layout)


@st.composite
def cases(draw, dtypes=(torch.float64,), n=st.integers(1, 40), summaries=("mean", "direct", "hierarchical"), **fixed):
    """Random calls: lengths below, at and above the block size, ragged ends, grouped heads, padding, packing, strides."""
    block_size, rank = draw(st.sampled_from([(2, 1), (2, 2), (3, 3), (4, 1), (4, 2), (6, 3), (8, 4)]))
    n = draw(n)
    padding = cuts = None
    batch = draw(st.integers(1, 2))
    if draw(st.booleans()):
        sides = st.integers(0, max(0, n // 2))
        padding = tuple((left := draw(sides), draw(st.integers(0, min(n - left, n // 2)))) for _ in range(batch))
    if n > 1 and draw(st.sampled_from([False, False, True])):
        cuts = tuple(sorted(draw(st.sets(st.integers(1, n - 1), max_size=4))))
    drawn = dict(
        n=n,
        queries=draw(st.sampled_from([None, None, 1, -(-n // 3)])),
        block_size=block_size,
        rank=rank,
        batch=batch,
        kv_heads=draw(st.integers(1, 2)),
        repeats=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([1, 3, 4])),
        value_dim=draw(st.sampled_from([1, 2, 5])),
        causal=draw(st.booleans()),
        summary=draw(st.sampled_from(summaries)),
        size_weighting=draw(st.booleans()),
        bias_levels=draw(st.integers(0, 2)),
        max_levels=draw(st.sampled_from([None, None, 0, 1, 2])),
        softcap=draw(st.sampled_from([None, None, 1.5])),
        far_keys=draw(st.booleans()),
        sinks=draw(st.sampled_from([0, 0, 1, 3, 9, 60])),
        saliency=draw(st.booleans()),
        padding=padding,
        cuts=cuts,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        mixed=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    return Case(**drawn | fixed)

"""What every implementation of fast multipole attention must fulfil, as plain functions over an attention callable.

``attention`` takes the arguments of :func:`hf_multipole.multipole_attention`. A ``Case`` describes one call; its tensors
follow from its seed, so that a failing case can be run again from its printed form:

    matches_reference(multipole_attention, Case(n=37, causal=False), device="cuda")
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.summaries import DirectSummary, HierarchicalSummary
from hf_multipole.reference import multipole_attention_reference


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums must be computed in; not the package's own, whose faults would widen the bounds."""
    return torch.float64 if dtype == torch.float64 else torch.float32


LAYOUTS = ("contiguous", "transposed", "strided", "fused")


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
        tensors = {name: _lay_out(self.leaves[name], self.layout) for name in ("q", "k", "v", "far_keys") if name in self.leaves}
        if "far_bias" in self.leaves:
            tensors["far_bias"] = self.leaves["far_bias"]
        return attention(**tensors, **self.options)

    def with_gradients(self, attention) -> dict[str, torch.Tensor]:
        out = self(attention)
        if not out.requires_grad:  # the reference, where every token is padding
            return {"out": out} | {name: torch.zeros_like(x) for name, x in self.leaves.items()}
        gradients = torch.autograd.grad(out, list(self.leaves.values()), self.upstream, allow_unused=True, materialize_grads=True)
        return {"out": out.detach()} | dict(zip(self.leaves, gradients))

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
            visible &= (pair[:, :, None] - pair[:, None]).abs() <= 1
        if self.options["causal"]:
            visible &= torch.ones(n, n, dtype=torch.bool).tril()
        return visible[:, n - queries :]

    def real_queries(self) -> torch.Tensor:
        return self.visible().any(-1)


def _lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides; gradients arrive at the contiguous leaf."""
    if layout == "transposed":  # as a projection leaves it: (batch, tokens, heads, dim)
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if layout == "fused":  # a part of one projection of q, k and v
        around = torch.full_like(x[:, :1], torch.nan)
        return torch.cat([around, x, around], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, 1:-1]
    return x


def mask_of(case: Case) -> torch.Tensor | None:
    if case.padding is None:
        return None
    mask = torch.zeros(case.batch, case.n, dtype=torch.bool)
    for row, (left, right) in zip(mask, case.padding):
        row[left : case.n - right] = True
    return mask


def segments_of(case: Case) -> torch.Tensor | None:
    if case.cuts is None:
        return None
    starts = torch.zeros(case.n, dtype=torch.long)
    starts[list(case.cuts)] = 1
    ids = starts.cumsum(0) * 7 % 11  # not in order, yet different (for up to 11 documents)
    return torch.stack([ids + row for row in range(case.batch)])


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


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: float, what: str, case) -> None:
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}: {case}"
    # Not-a-number compares false, so that it fails as well.
    error = (actual.double().cpu() - expected.double().cpu()).abs()
    assert (error <= bound).all(), f"{what} is off by {error.max().item():.3g}, more than {bound:.3g}: {case}"


class RoundedProducts(TorchDispatchMode):
    """Rounds products, weights and their derivatives to a dtype, as tensor cores take them; sums are left as they are."""

    NAMES = ("mul", "div", "mm", "mv", "dot", "bmm", "tanh", "tanh_backward", "_softmax", "_softmax_backward_data")

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out.to(self.dtype).double() if function.overloadpacket.__name__ in self.NAMES else out


def error_bounds(case: Case, exact: dict[str, torch.Tensor], rounded_products: bool = False) -> dict[str, float]:
    """How far an implementation in the case's dtype may lie from ``exact``, the reference on unrounded float64 tensors.

    Twice the error that rounding the arguments and the result of that same reference makes, which is unavoidable, once more
    for what an implementation rounds on its way; and its sums' rounding, one unit of the compute dtype a term. The error is the largest
    of three roundings, to other steps each: a tensor of few numbers may be lucky in one. With
    ``rounded_products`` that reference takes them in the case's dtype.
    """
    if case.dtype == torch.float64:
        return {name: 1e-10 for name in exact}
    with RoundedProducts(case.dtype) if rounded_products else nullcontext():
        ways = [make(case, torch.float64, case.dtype, scale=x).with_gradients(multipole_attention_reference) for x in (1.0, 1.3, 1.7)]
    terms = (case.n + case.dim) * torch.finfo(compute_dtype(case.dtype)).eps
    bounds = {}
    for name, value in exact.items():
        if "." in name and not case.mixed and case.dtype != compute_dtype(case.dtype):
            continue  # autograd rounds its parts, through the summary and through the mass, which may cancel
        size = value.abs().max().item()
        unavoidable = max((rounded[name].to(case.dtype).double() - value).abs().max().item() for rounded in ways)
        bounds[name] = 2 * unavoidable + torch.finfo(case.dtype).eps * size + terms * max(1.0, size)
    return bounds


def matches_reference(attention, case: Case, device="cpu", rounded_products: bool = False) -> None:
    """Output and all gradients: of q, k, v, far keys, far bias and the weights of the summaries."""
    call = make(case, device=device)
    actual = call.with_gradients(attention)
    exact = make(case, torch.float64).with_gradients(multipole_attention_reference)
    bounds = error_bounds(case, exact, rounded_products)
    assert actual["out"].dtype == case.dtype
    for name, bound in bounds.items():
        assert_within(actual[name], exact[name], bound, name, case)
    padded = ~call.real_queries()[:, None, :, None].expand(exact["out"].shape)
    assert (actual["out"].cpu()[padded] == 0).all(), f"padded queries are not zero: {case}"


def weights_sum_to_one(attention, case: Case, device="cpu") -> None:
    """With mean values of a constant, the output is that constant; a padded query's is zero."""
    if not case.causal:
        # In a ragged group learned keys may stand for fewer tokens in more summaries than mean values do.
        case = replace(case, summary="mean")
    call = make(case, device=device)
    call.options["value_summary"] = None
    call.leaves["v"] = torch.full_like(call.leaves["v"], 3)
    out = call(attention)
    expected = 3.0 * call.real_queries()[:, None, :, None].expand(out.shape)
    # Each weight, their sum and the mean round once; 3 is exact in every dtype.
    eps = torch.finfo(case.dtype).eps
    assert_within(out, expected, 3 * eps + 3 * case.n * torch.finfo(compute_dtype(case.dtype)).eps, "constant values", case)


def sees_exactly_what_is_visible(attention, case: Case, device="cpu") -> None:
    """The gradient of each query's output is zero at hidden tokens and nonzero at visible ones, in values and keys."""
    call = make(replace(case, value_dim=1, far_keys=False), device=device)
    out = call(attention)
    visible = call.visible()
    # One output alone: the gradients of different queries would add up.
    for t in range(out.shape[2]):
        by_value, by_key = torch.autograd.grad(out[:, :, t].sum(), [call.leaves["v"], call.leaves["k"]], retain_graph=True)
        for name, gradient in (("v", by_value), ("k", by_key)):
            touched = (gradient != 0).any(-1).cpu()
            seen = visible[:, None, t].expand(touched.shape)
            assert not (touched & ~seen).any(), f"query {t} depends on hidden tokens of {name}: {case}"
            if name == "v":
                missing = seen & ~touched
            else:  # the only visible key has weight 1, whatever it is
                missing = seen & ~touched & (seen.sum(-1, keepdim=True) > 1)
            assert not missing.any(), f"query {t} does not depend on visible tokens of {name}: {case}"


def future_does_not_matter(attention, case: Case, device="cpu") -> None:
    """Causal: outputs up to a token are the same, whatever comes after it, not-a-number and infinity included."""
    case = replace(case, causal=True, queries=None)
    call = make(case, device=device)
    before = call(attention).detach()
    names = [name for name in ("q", "k", "v", "far_keys") if name in call.leaves]
    # The same sums in the same order; a careful masking may add a rounding.
    bound = 4 * torch.finfo(case.dtype).eps * max(1.0, before.abs().max().item())
    for t in sorted({0, case.n // 3, case.n - 2} & set(range(case.n - 1))):
        # One at a time as well: a fault in one may switch on the care that the others need.
        for changes, value in [(names, 17.0), (names, torch.nan), *(([name], torch.nan) for name in names), (names, torch.inf)]:
            changed = make(case, device=device)
            with torch.no_grad():
                for name in changes:
                    changed.leaves[name][:, :, t + 1 :] = value
            after = changed(attention).detach()
            what = f"the past of token {t}, with {value} in the future of {changes},"
            assert_within(after[:, :, : t + 1], before[:, :, : t + 1], bound, what, case)


def dense_attention(call: Call) -> torch.Tensor:
    """Softmax attention of the call's tensors over all visible tokens, by PyTorch, in float64."""
    q, k, v = (call.leaves[name].detach().double().cpu() for name in ("q", "k", "v"))
    repeats = q.shape[1] // k.shape[1]
    visible = call.visible()[:, None]
    out = F.scaled_dot_product_attention(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), attn_mask=visible)
    return out.masked_fill(~visible.any(-1, keepdim=True), 0)


def exact_when_short(attention, case: Case, device="cpu") -> None:
    """Rows that the near field covers: softmax attention, whatever the summaries would be."""
    case = replace(case, block_size=max(case.block_size, -(-case.n // (2 * case.rank)) * case.rank), softcap=None)
    assert level_count(case.n, case.block_size) == 0
    call = make(case, device=device)
    bound = 1e-10 if case.dtype == torch.float64 else _rounding(case, call)
    assert_within(call(attention), dense_attention(call), bound, "attention of a short row", case)


def exact_when_keys_are_constant(attention, case: Case, device="cpu") -> None:
    """Keys constant within every summarised segment, means, size weighting, no far bias: softmax attention."""
    case = replace(case, summary="mean", size_weighting=True, bias_levels=0, softcap=None, far_keys=False, padding=None, cuts=None)
    call = make(case, device=device)
    widest = case.block_size // case.rank << max(0, level_count(case.n, case.block_size) - 1)
    with torch.no_grad():
        k = call.leaves["k"]
        k.copy_(k[:, :, torch.arange(case.n, device=k.device) // widest * widest])
    bound = 1e-10 if case.dtype == torch.float64 else _rounding(case, call)
    assert_within(call(attention), dense_attention(call), bound, "attention to piecewise constant keys", case)


def as_without_downsampling(attention, case: Case, device="cpu") -> None:
    """Queries constant within every segment: those of the far field are the tokens' own."""
    call = make(replace(case, downsample=True, summary="mean", padding=None, cuts=None, queries=None), device=device)
    widest = case.block_size // case.rank << max(0, level_count(case.n, case.block_size) - 1)
    with torch.no_grad():
        q = call.leaves["q"]
        q.copy_(q[:, :, torch.arange(case.n, device=q.device) // widest * widest])
    actual = call(attention)
    call.options["downsample_queries"] = False
    bound = 1e-10 if case.dtype == torch.float64 else 2 * _rounding(case, call)
    assert_within(actual, call(attention), bound, "attention of piecewise constant queries", case)


def _rounding(case: Case, call: Call) -> float:
    # The tensors are the rounded ones already: what remains is the output's rounding and that of the weights and sums.
    eps, size = torch.finfo(case.dtype).eps, call.leaves["v"].abs().max().item()
    return 2 * eps * size + (case.n + case.dim) * torch.finfo(compute_dtype(case.dtype)).eps * size


def padding_does_not_matter(attention, case: Case, device="cpu") -> None:
    """A row gives the same outputs and gradients alone and with padding on either side, whatever the padding holds."""
    case = replace(case, padding=None, cuts=None, queries=None, batch=1)
    pad = case.block_size + 1  # shifts the row against the blocks
    alone = make(case, device=device)
    expected = alone.with_gradients(attention)
    for left, right, garbage in ((pad, 0, 1e4), (0, pad, torch.nan), (pad, 2 * pad, torch.inf), (1, 0, -torch.inf)):
        padded = make(case, device=device)

        def fill(x, value):
            return F.pad(x.detach(), (0, 0, left, right), value=value).requires_grad_()

        real = slice(left, left + case.n)
        leaves = {name: fill(x, garbage) if name in ("q", "k", "v", "far_keys") else x for name, x in padded.leaves.items()}
        options = padded.options | {"attention_mask": fill(torch.ones(case.n, 1, device=device), 0)[:, 0].detach().long()[None]}
        if isinstance(options.get("key_summary"), DirectSummary):
            # Levels that only the padded row has room for: never used, but asked for.
            longer = make(replace(case, n=case.n + left + right), device=device)
            for name in [name for name in options if name.endswith("_summary")]:
                options[name] = longer.options[name]
                for parameter, weight in options[name].named_parameters():
                    if f"{name}.{parameter}" in leaves:
                        weight.data.copy_(leaves[f"{name}.{parameter}"])
                        leaves[f"{name}.{parameter}"] = weight
        call = Call(leaves, options, fill(padded.upstream, 1.0).detach(), case.layout)
        actual = call.with_gradients(attention)
        for name, value in actual.items():
            of_tokens = name in ("out", "q", "k", "v", "far_keys")
            # The same terms, perhaps summed in other groups.
            size = max(1.0, expected[name].abs().max().item())
            bound = 1e-10 if case.dtype == torch.float64 else 2 * torch.finfo(case.dtype).eps * size + case.n * 1e-6 * size
            assert_within(value[:, :, real] if of_tokens else value, expected[name], bound, f"{name}, padded ({left}, {right})", case)
            if of_tokens:
                assert (value[:, :, :left] == 0).all() and (value[:, :, left + case.n :] == 0).all(), f"{name} at padding: {case}"


def documents_do_not_meet(attention, case: Case, device="cpu") -> None:
    """Every document of a packed row gives what it gives alone, in outputs and gradients."""
    case = replace(case, padding=None, queries=None, batch=1, summary="mean" if case.summary == "direct" else case.summary)
    packed = make(case, device=device)
    actual = packed.with_gradients(attention)
    weights = {name: torch.zeros_like(x) for name, x in packed.leaves.items() if "." in name or name == "far_bias"}
    size = max(1.0, *(x.abs().max().item() for x in actual.values()))
    bound = 1e-10 if case.dtype == torch.float64 else 2 * torch.finfo(case.dtype).eps * size + case.n * 1e-6 * size
    edges = [0, *(case.cuts or ()), case.n]
    for start, stop in zip(edges, edges[1:]):
        part = slice(start, stop)
        leaves = {name: x if name in weights else x[:, :, part].detach().requires_grad_() for name, x in packed.leaves.items()}
        alone = Call(leaves, packed.options | {"segment_ids": None}, packed.upstream[:, :, part], case.layout)
        for name, value in alone.with_gradients(attention).items():
            if name in weights:
                weights[name] += value
            else:
                assert_within(actual[name][:, :, part], value, bound, f"{name} of tokens {start} to {stop}", case)
    for name, value in weights.items():
        assert_within(actual[name], value, bound, name, case)


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
        padding=padding,
        cuts=cuts,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        mixed=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    return Case(**drawn | fixed)

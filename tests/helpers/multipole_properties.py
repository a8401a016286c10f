"""What every implementation of fast multipole attention must fulfil, as plain functions over an attention callable, which takes the
arguments of :func:`hf_multipole.multipole_attention`.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch.nn import functional as F

from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.summaries import DirectSummary
from hf_multipole.reference import multipole_attention_reference
from tests.helpers.multipole_cases import Call, Case, make
from tests.helpers.numerics import RoundedProducts, assert_within, compute_dtype

OF_TOKENS = ("q", "k", "v", "far_keys", "log_masses")


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
    names = [name for name in OF_TOKENS if name in call.leaves]
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
    case = replace(case, saliency=False)
    call = make(case, device=device)
    widest = case.block_size // case.rank << max(0, level_count(case.n, case.block_size) - 1)
    with torch.no_grad():
        k = call.leaves["k"]
        k.copy_(k[:, :, torch.arange(case.n, device=k.device) // widest * widest])
    bound = 1e-10 if case.dtype == torch.float64 else _rounding(case, call)
    assert_within(call(attention), dense_attention(call), bound, "attention to piecewise constant keys", case)


def as_many_sinks_as_tokens_are_exact_attention(attention, case: Case, device="cpu") -> None:
    """Whatever the summaries would be, and more of them than there are tokens."""
    for sinks in (case.n, 3 * case.n):
        call = make(replace(case, sinks=sinks, softcap=None), device=device)
        bound = 1e-10 if case.dtype == torch.float64 else _rounding(case, call)
        assert_within(call(attention), dense_attention(call), bound, f"attention with {sinks} sinks", case)


def masses_of_one_change_nothing(attention, case: Case, device="cpu") -> None:
    """To the bit, in the output and in the gradients of tokens."""
    without, ones = make(case, device=device), make(replace(case, saliency=True), device=device)
    with torch.no_grad():
        for name, x in without.leaves.items():
            ones.leaves[name].copy_(x)
        ones.leaves["log_masses"].zero_()
    ones.upstream = without.upstream
    assert torch.equal(without(attention), ones(attention)), case
    actual, expected = (call.with_gradients(attention) for call in (ones, without))
    for name, value in expected.items():
        assert_within(actual[name], value, 1e-12 if case.dtype == torch.float64 else 1e-5, name, case)


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
            return F.pad(x.detach(), (0, 0) * (x.dim() - 3) + (left, right), value=value).requires_grad_()

        real = slice(left, left + case.n)
        leaves = {name: fill(x, garbage) if name in OF_TOKENS else x for name, x in padded.leaves.items()}
        options = padded.options | {"attention_mask": fill(torch.ones(1, 1, case.n, device=device), 0)[0].detach().long()}
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
            of_tokens = name in ("out", *OF_TOKENS)
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


def agrees(attention, other, case: Case, bound: float = 1e-11) -> None:
    """Two implementations, in output and gradients."""
    actual, expected = (make(case).with_gradients(function) for function in (attention, other))
    for name, value in expected.items():
        assert_within(actual[name], value, bound * max(1, value.abs().max().item()), name, case)


# Ways it is called


def half_precision_is_rounded_once(attention, case: Case) -> None:
    """Closer than the bound of every implementation: what is computed from the arguments is float32 to the end."""
    actual = make(case).with_gradients(attention)
    exact = make(case, torch.float64, rounded=case.dtype).with_gradients(multipole_attention_reference)
    # Queries that stand for a segment take their gradients in parts.
    for name in ("out",) if case.downsample else ("out", "q"):
        error = (actual[name].double() - exact[name]).abs()
        assert (error <= 0.51 * torch.finfo(case.dtype).eps * exact[name].abs() + 1e-5).all(), (name, error.max(), case)


def not_finite_reaches_whom_the_reference_says(attention, case: Case, name: str, value: float, tokens: tuple[int, ...]) -> None:
    """Neither farther, as a masked 0 * NaN would, nor less far, which would hide a fault of the model; a token in each row."""
    padding = case.padding and case.padding * len(tokens)
    call = make(replace(case, batch=case.batch * len(tokens), padding=padding))
    with torch.no_grad():
        for row, token in enumerate(token for token in tokens for _ in range(case.batch)):
            call.leaves[name][row, 0, token, 1] = value
    actual, expected = call(attention).isfinite(), call(multipole_attention_reference).isfinite()
    wrong = (actual != expected).flatten(1).any(1).nonzero().flatten()
    assert not len(wrong), f"rows {wrong.tolist()} of {case}"
    assert not expected.all()


def layout_does_not_matter(attention, case: Case) -> None:
    assert torch.equal(make(case)(attention), make(replace(case, layout="contiguous"))(attention)), case


def arguments_are_not_written_to(attention, case: Case) -> None:
    call = make(case)
    tensors = call.leaves | {"upstream": call.upstream}
    before = {name: (x.clone(), x._version) for name, x in tensors.items()}
    call.with_gradients(attention)
    for name, (value, version) in before.items():
        assert torch.equal(tensors[name], value) and tensors[name]._version == version, name


def one_tensor_in_every_place(attention, case: Case) -> None:
    """Gradients of its four uses add up, though some are completed in place."""
    call = make(replace(case, repeats=1, dim=4, value_dim=4))
    x = call.leaves["q"]
    call.leaves |= {"k": x, "v": x, "far_keys": x}
    (actual,) = torch.autograd.grad(call(attention), x, call.upstream, retain_graph=True)
    (expected,) = torch.autograd.grad(call(multipole_attention_reference), x, call.upstream)
    assert_within(actual, expected, 1e-10, "gradient", case)


def autocast_computes_in_bfloat16(attention, case: Case) -> None:
    """float32 in, bfloat16 computed and out, as by torch's own attention; gradients are float32. As without it, on rounded tensors."""
    call, rounded = make(case), make(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(attention)
    expected = rounded(lambda q, k, v, **options: attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options))
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    gradients = torch.autograd.grad(out, list(call.leaves.values()), call.upstream.bfloat16())
    expected = torch.autograd.grad(expected, list(rounded.leaves.values()), call.upstream.bfloat16())
    for name, one, other in zip(call.leaves, gradients, expected):
        assert one.dtype == torch.float32 and torch.equal(one, other), name


def gradients_are_numerical_derivatives(attention, case: Case, shape: str) -> None:
    """Which share nothing with the reference."""
    case = replace(case, n=14, block_size=2, rank=1, dim=2, value_dim=1, batch=1, kv_heads=1)
    padding = ((1, 2),) if "padded" in shape else None
    call = make(replace(case, padding=padding, cuts=(2, 9) if "packed" in shape else None))
    names = list(call.leaves)

    def function(*leaves):
        # The weights of the summaries are the modules' own: changed in place by gradcheck.
        return call.with_leaves(dict(zip(names, leaves)))(attention)

    assert torch.autograd.gradcheck(function, tuple(call.leaves.values()))


def compiles_without_a_graph_break(attention, case: Case) -> None:
    """Traced forward and backward, without the code generator."""
    torch._dynamo.reset()
    agrees(torch.compile(attention, fullgraph=True, backend="aot_eager"), attention, case)

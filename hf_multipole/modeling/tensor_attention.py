"""Tensor attention: the function, its checks, and what it hands to the exact and to the near-linear path (arXiv 2310.04064)."""

import math
from collections.abc import Sequence

import torch

from .backends import takes_kernels
from .calls import check_logits, check_tensors
from .hierarchy import check_rows, real_tokens
from .options import TensorOptions
from .polynomial_attention import TOLERANCE, Approximation, BoundViolation, Certificate, approximate, attend, certify
from .tensor_torch import stretches, tensor_tiles


def document_numbers(attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None) -> torch.Tensor | None:
    """``(batch, n)``: different for the documents of a row that touch each other, -1 at padding."""
    if attention_mask is None and segment_ids is None:
        return None
    real = None if attention_mask is None else real_tokens(attention_mask)
    if not torch.compiler.is_compiling():
        check_rows(real, segment_ids)
    numbers = torch.zeros_like(real, dtype=torch.long) if segment_ids is None else segment_ids.long() - segment_ids.min()
    return numbers if real is None else numbers.masked_fill(~real, -1)


# Wide: the public interface, in which every option has its name.
def tensor_attention(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    method: str = "exact",
    causal: bool = True,
    window: list[int | None] | tuple[int | None, ...] | None = None,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    degree: int | None = None,
    entry_bound: float | None = None,
    tolerance: float = TOLERANCE,
    on_violation: str = "raise",
    return_certificate: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, Certificate | None]:
    """Attention of each query to pairs, triples, ... of tokens (Alman and Song, arXiv 2310.04064).

    Of order ``k = len(keys) + 1``: the score of query i and tokens j1, ..., j(k-1) is ``scale * sum(q[i] * keys[0][j1] *
    keys[1][j2] * ...)``, one softmax runs over all choices of tokens, and what is weighted is ``values[0][j1] * values[1][j2] *
    ...``. Order 2 is ordinary attention.

    ``method="exact"`` takes O(n ** k) time, or O(n) times the product of the windows, and O(n) memory; one new query to n tokens
    takes O(n ** (k - 1)). ``method="polynomial"`` takes O(n) time and a state that does not depend on n, both in proportion to the
    ``C(head_dim + degree, degree)`` features, and is for scores of a few units at most: see :mod:`.polynomial_attention`. It breaks
    the graph of torch.compile, since the number of features, and so shapes, depend on what the entries are found to be.

    Args:
        q: ``(batch, heads, queries, head_dim)``, floating point. Fewer queries than keys are the last tokens.
        keys, values: ``(batch, kv_heads, n, head_dim)`` and ``(batch, kv_heads, n, value_dim)`` each; kv_heads divides heads.
        method: "exact" or "polynomial".
        causal: every index is at most the query's. Otherwise attention is bidirectional.
        window: of each index, how many tokens up to and with the query it may take (``i - window < j <= i``), as in 2-simplicial
            attention (arXiv 2507.02754), or None for all; bidirectional, ``|i - j| < window``. Exact only.
        attention_mask: ``(batch, n)``, bool or 0/1: the real tokens; padding on either side of a row.
        segment_ids: ``(batch, n)`` integers: rows packed with documents that do not see each other.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        dropout_p: dropout of the attention weights. Exact only.
        degree: of the polynomial; by default the least one whose relative error of the weights is at most ``tolerance``. At most 24,
            and 65,536 features.
        entry_bound: B, which no entry of q and keys exceeds, so that scores lie within ``scale * head_dim * B ** k``. By default
            measured at every call, over all rows and tokens, and rounded up by at most 3 %. State it where the past must not depend
            on the future, not even through the choice of the polynomial, and to generate token by token.
        on_violation: what happens where the polynomial cannot vouch for its output, since entries exceed the bound or since the
            bound asks for too many features: "raise", or "exact" for the exact path.
        return_certificate: also returns a :class:`Certificate`, a bound on the error of the output; None where the exact path ran.
        backend: "torch"; "triton", the GPU kernels, for order 3 in float32, bfloat16 and float16, no dropout, and head_dim up to 256
            on the exact path; "auto": the kernels on CUDA devices, where they can, else the PyTorch path. Results are the same up to
            rounding; what is not finite makes not-a-number of all channels of the queries that see it.

    Returns:
        ``(batch, heads, queries, value_dim)`` in q's dtype, zeros at padded queries.

    Raises:
        ValueError, TypeError: an argument is of the wrong kind, shape, dtype or device, or not supported.
        BoundViolation: a ValueError; see on_violation.
    """
    _check_tensors(q, keys, values, attention_mask, segment_ids, scale, dropout_p)
    options = TensorOptions(len(keys) + 1, method, window, degree, entry_bound)
    _check_call(options, tolerance, on_violation, return_certificate, backend)
    if torch.is_autocast_enabled(q.device.type):
        kind = torch.get_autocast_dtype(q.device.type)
        q, keys, values = q.to(kind), [k.to(kind) for k in keys], [v.to(kind) for v in values]
    return document_attention(
        q,
        keys,
        values,
        document_numbers(attention_mask, segment_ids),
        options,
        causal=causal,
        scale=scale,
        dropout_p=dropout_p,
        tolerance=tolerance,
        on_violation=on_violation,
        return_certificate=return_certificate,
        backend=backend,
    )


def document_attention(
    q,
    keys,
    values,
    document: torch.Tensor | None,
    options: TensorOptions,
    *,
    causal,
    scale=None,
    dropout_p=0.0,
    tolerance=TOLERANCE,
    on_violation="raise",
    return_certificate=False,
    backend="auto",
):
    """:func:`tensor_attention` of checked arguments in one dtype; document: as from :func:`document_numbers`. The exact path takes no
    notice of a bound on the entries.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    order = len(values) + 1
    if options.method == "polynomial":
        check_dropout(options, dropout_p)
        kernels = takes_kernels(backend, q, {}, dropout_p, order)
        real = None if document is None else document >= 0
        try:
            approximation = _approximation(q, keys, values, real, scale, options.degree, options.entry_bound, tolerance)
        except BoundViolation:
            if on_violation == "raise":
                raise
        else:
            out = _near_linear(q, keys, values, document, approximation, causal, kernels)
            if not return_certificate:
                return out
            dtype = torch.promote_types(q.dtype, torch.float32)
            return out, certify(approximation, q.shape[-1], [v.detach() for v in values], real, q.shape[1], dtype, q.dtype)

    kernels = takes_kernels(backend, q, {"q": q.shape[-1], "values": values[0].shape[-1]}, dropout_p, order)
    out = _exact(q, keys, values, document, causal, options.window, scale, dropout_p, kernels)
    return (out, None) if return_certificate else out


def _exact(q, keys, values, document, causal, window, scale, dropout_p, kernels) -> torch.Tensor:
    n, dtype = keys[0].shape[2], torch.promote_types(q.dtype, torch.float32)
    windows = [n if width is None else min(width, n) for width in window or [None] * len(keys)]
    # The order of the indices does not matter, and the widest window is best gone through last.
    order = sorted(range(len(keys)), key=windows.__getitem__)
    keys, values, windows = ([x[i] for i in order] for x in (keys, values, windows))
    if kernels:
        from .tensor_triton import tensor_kernels

        return tensor_kernels(*(x.contiguous() for x in (q, *keys, *values)), document, causal, windows, scale)[0].to(q.dtype)
    stacked = (torch.stack([x.to(dtype) for x in tensors]) for tensors in (keys, values))
    seed = torch.randint(2**62, ()) if dropout_p else None
    return tensor_tiles(q.to(dtype), *stacked, document, causal, windows, scale, dropout_p, seed)[0].to(q.dtype)


@torch.compiler.disable
def _approximation(q, keys, values, real, scale, degree, entry_bound, tolerance) -> Approximation:
    """The polynomial for the entries that the tensors have at real tokens; raises BoundViolation."""

    def largest(x):
        x = x.detach()
        if real is not None:
            x = x.masked_fill(~real[:, None, -x.shape[2] :, None], 0)
        return x.abs().amax().double().item()

    measured = max([largest(q), *map(largest, keys)], key=lambda x: math.inf if math.isnan(x) else x)
    if not math.isfinite(measured):
        raise BoundViolation("q or keys are not finite: no polynomial bounds their scores")
    if not all(math.isfinite(largest(v)) for v in values):
        raise BoundViolation("values are not finite: no bound on the output holds")
    if entry_bound is None:
        # Few different bounds, so that their polynomials are found once.
        entry_bound = 2 ** (math.ceil(32 * math.log2(measured) + 1e-9) / 32) if measured else 0.0
    elif measured > entry_bound:
        raise BoundViolation(
            f"entries of q and keys reach {measured:.6g}, beyond entry_bound {entry_bound:.6g}: normalise them, state a larger bound, "
            "or set on_violation='exact'"
        )
    return approximate(q.shape[-1], len(keys) + 1, scale, entry_bound, degree, tolerance, torch.promote_types(q.dtype, torch.float32))


@torch.compiler.disable
def _near_linear(q, keys, values, document, approximation, causal, kernels) -> torch.Tensor:
    (batch, _, queries, _), n, dtype = q.shape, keys[0].shape[2], torch.promote_types(q.dtype, torch.float32)
    keys, values = (torch.stack([x.to(dtype) for x in tensors]) for tensors in (keys, values))
    out = q.new_zeros(*q.shape[:3], values.shape[-1])
    for rows, start, stop in stretches(document, batch, n):
        asking = slice(max(0, start - n + queries), max(0, stop - n + queries))
        if asking.start < asking.stop:
            part, k, v = q[rows, :, asking].to(dtype), keys[:, rows, :, start:stop], values[:, rows, :, start:stop]
            out[rows, :, asking] = attend(part, k, v, approximation, causal=causal, kernels=kernels)[0].to(q.dtype)
    # Rows of padding alone have gradients, too, of zero.
    return out + sum(x[..., :0].sum() for x in (q, keys, values)).to(q.dtype)


def _check_tensors(q, keys, values, attention_mask, segment_ids, scale, dropout_p) -> None:
    for name, given in (("keys", keys), ("values", values)):
        if isinstance(given, torch.Tensor) or not isinstance(given, Sequence) or not given:
            raise TypeError(f"{name} must be a sequence of tensors, one for each index of a tuple of tokens")
        if len(given) != len(keys):
            raise ValueError(f"there are {len(keys)} keys, but {len(values)} values: each index has one of both")
        for i, x in enumerate(given):
            if not isinstance(x, torch.Tensor) or x.dim() != 4:
                got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
                raise ValueError(f"{name}[{i}] must be a tensor (batch, kv_heads, n, dim), but is {got}")
            for what, one, other in (("shape", tuple(x.shape), tuple(given[0].shape)), ("device", x.device, given[0].device)):
                if one != other:
                    raise ValueError(f"{name}[{i}] has {what} {one}, but {name}[0] has {other}")
            if x.dtype != given[0].dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"{name}[{i}] has dtype {x.dtype}, but {name}[0] has {given[0].dtype}: convert them to one dtype")
            if not x.is_floating_point():
                raise TypeError(f"{name}[{i}] has dtype {x.dtype}, but attention needs a floating-point dtype")
    # The first index stands for all.
    check_tensors(q, keys[0], values[0], None, attention_mask, segment_ids)
    check_logits(scale, None, dropout_p)


def check_dropout(options: TensorOptions, dropout_p: float) -> None:
    if dropout_p and options.method == "polynomial":
        raise ValueError("dropout_p belongs to method='exact': the near-linear path has no single weights; leave it out")


def _check_call(options: TensorOptions, tolerance, on_violation, return_certificate, backend) -> None:
    for name, value, allowed in (("on_violation", on_violation, ("raise", "exact")), ("backend", backend, ("auto", "torch", "triton"))):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, but must be {' or '.join(map(repr, allowed))}")
    if not (isinstance(tolerance, int | float) and 0 < tolerance < math.inf):
        raise ValueError(f"tolerance is {tolerance!r}, but must be a positive number")
    if options.method == "exact":
        for name, value in (("entry_bound", options.entry_bound), ("return_certificate", return_certificate or None)):
            if value is not None:
                raise ValueError(f"{name} belongs to method='polynomial': leave it out, or set that method")

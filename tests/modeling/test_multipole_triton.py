"""The GPU kernels beyond their properties: sizes, generation, the operator; and compiled for GPUs that need not be there."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import hf_multipole
from hf_multipole.modeling import multipole_state
from hf_multipole.modeling.backends import takes_kernels
from hf_multipole.reference import multipole_attention_reference
from tests.helpers.interpreter import DEVICE, GPU
from tests.helpers.multipole_cases import Case, make
from tests.helpers.multipole_properties import matches_reference
from tests.helpers.numerics import assert_within
from tests.helpers.operators import check_operator
from tests.helpers.processes import environment
from tests.helpers.tiny_models import build, tokens

triton = pytest.importorskip("triton")

from hf_multipole.modeling import multipole_kernels, state_triton, triton_common  # noqa: E402
from hf_multipole.modeling import multipole_triton as kernels  # noqa: E402

# The interpreter computes what is not finite as the kernels do, and says so.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("quick_interpreter")]

multipole_attention = partial(hf_multipole.multipole_attention, backend="triton")

# One of everything, as small as three levels allow.
FULL = Case(n=17, batch=1, kv_heads=1, repeats=2, block_size=2, rank=1, bias_levels=2, softcap=2.0, far_keys=True, summary="hierarchical")
FULL = replace(FULL, dtype=torch.float32)
PACKED = {"cuts": (5,), "padding": ((2, 1),)}


@pytest.mark.parametrize("token, sinks", [(5, 0), (1, 3)], ids=["", "a sink"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name, value", [("k", torch.nan), ("v", torch.nan), ("v", torch.inf), ("q", torch.nan)])
@pytest.mark.slow
def test_what_is_not_finite_reaches_the_queries_that_see_it(name, value, causal, token, sinks):
    """All channels of them, but no other query."""
    case = replace(FULL, repeats=1, causal=causal, summary="mean", far_keys=False, softcap=None, sinks=sinks)
    call = make(case if causal else replace(case, cuts=(9,)))
    with torch.no_grad():
        call.leaves[name][:, 0, token, 1] = value
    expected = call(multipole_attention_reference).isfinite().all(-1)
    call = type(call)({key: x.to(DEVICE) for key, x in call.leaves.items()}, call.options, call.upstream)
    assert torch.equal(call(multipole_attention).isfinite().all(-1).cpu(), expected)
    assert not expected.all() and expected.any()


# Sizes of models

BIG = Case(n=330, block_size=64, rank=4, batch=1, kv_heads=1, repeats=2, dim=64, value_dim=64, summary="hierarchical", bias_levels=2)
SIZES = {
    "bfloat16": replace(BIG, dtype=torch.bfloat16),
    "float32": replace(BIG, repeats=1, causal=False, padding=((30, 20),), softcap=5.0, dtype=torch.float32),
    "bfloat16, sinks, masses": replace(BIG, dtype=torch.bfloat16, sinks=4, saliency=True),
}
ON_GPU = {
    "8192 tokens": replace(BIG, n=8192, batch=2, kv_heads=4, dtype=torch.bfloat16),
    "float16, ragged": replace(BIG, n=5000, causal=False, dtype=torch.float16),
    "head_dim 128, packed": replace(BIG, n=4096, dim=128, value_dim=128, cuts=(700, 3000), dtype=torch.bfloat16),
    "head_dim 256, padded": replace(BIG, n=2048, dim=256, value_dim=256, padding=((100, 7),), dtype=torch.bfloat16, far_keys=True),
    "head_dim 16, rank 16": replace(BIG, n=3000, dim=16, value_dim=16, rank=16, causal=False, cuts=(1000,), dtype=torch.bfloat16),
    "blocks of 256": replace(BIG, n=8192, block_size=256, rank=8, softcap=20.0, dtype=torch.bfloat16),
    "float32, head_dim 128": replace(BIG, n=4096, dim=128, value_dim=64, dtype=torch.float32),
    "float32, head_dim 256": replace(BIG, n=2048, dim=256, value_dim=256, causal=False, dtype=torch.float32),
    "65536 tokens": replace(BIG, n=65536, kv_heads=2, dtype=torch.bfloat16),
    "sinks, masses": replace(BIG, n=8192, batch=2, kv_heads=4, sinks=4, saliency=True, dtype=torch.bfloat16),
    "100 sinks, packed": replace(BIG, n=4096, dim=128, value_dim=128, cuts=(700, 3000), sinks=100, dtype=torch.bfloat16),
    "sinks, masses, head_dim 256": replace(BIG, n=2048, dim=256, value_dim=256, sinks=20, saliency=True, dtype=torch.bfloat16),
    "sinks, masses, float32": replace(BIG, n=3000, causal=False, padding=((100, 7),), sinks=40, saliency=True, dtype=torch.float32),
}
ON_GPU = [pytest.param(case, id=name, marks=GPU) for name, case in ON_GPU.items()]


@pytest.mark.parametrize("case", [*(pytest.param(case, id=name) for name, case in SIZES.items()), *ON_GPU])
@pytest.mark.slow
def test_error_is_within_twice_that_of_the_pytorch_path(case):
    """Which is held to the reference, and in float64 stands for it here."""
    exact, other, actual = (
        make(case, dtype, device=DEVICE).with_gradients(partial(hf_multipole.multipole_attention, backend=backend))
        for dtype, backend in ((torch.float64, "torch"), (None, "torch"), (None, "triton"))
    )
    for name, value in exact.items():
        unavoidable = (other[name].double() - value).abs().max().item()
        size = value.abs().max().item()
        # As in properties.error_bounds: the result's rounding, and one of float32 a term of the sums.
        rounding = torch.finfo(case.dtype).eps * size + (case.n + case.dim) * torch.finfo(torch.float32).eps * max(1.0, size)
        assert_within(actual[name], value, 2 * unavoidable + rounding, name, case)


# Generation


LINEAR = {"layer_types": ["multipole_linear_attention"]}
CACHES = {
    "direct": ({"summary": "direct", "size_weighting": False}, True),
    "rotated": ({"rotate_summaries": True}, False),
    "fewer levels than the row has": ({"max_position_embeddings": 8}, True),
    "no levels": ({"max_position_embeddings": 4}, False),
    "sinks, masses": ({"sink_tokens": 3, "saliency": True}, True),
    "sinks, masses, direct": ({"sink_tokens": 1, "saliency": True, "summary": "direct"}, True),
    "sinks, O(n) form": (LINEAR | {"sink_tokens": 5, "saliency": True}, True),
    "O(n) form": (LINEAR, True),
    "O(n) form, no levels": (LINEAR | {"max_position_embeddings": 4}, True),
    "O(n) form, rotated, bfloat16": (LINEAR | {"rotate_summaries": True, "dtype": torch.bfloat16}, False),
    "O(n) form, direct, float16": (LINEAR | {"summary": "direct", "dtype": torch.float16}, False),
}


@pytest.mark.parametrize("options, padded", CACHES.values(), ids=CACHES)
@pytest.mark.slow
def test_a_cache_on_the_kernels(monkeypatch, options, padded):
    """A prompt in two pieces, then single tokens, over the ends of blocks of all levels: the PyTorch path's logits, and one pass's."""
    sizes = {"layer_types": ["multipole_attention"], "block_size": 2, "rank": 1, "num_key_value_heads": 1, "dtype": torch.float32}
    model = build(**sizes | options).to(DEVICE)
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :3] = 1 - padded
    with torch.no_grad():
        results = [model(ids.to(DEVICE), attention_mask=mask.to(DEVICE), use_cache=False).logits * mask[..., None].to(DEVICE)]
    steps, real = [], state_triton.step
    monkeypatch.setattr(state_triton, "step", lambda *arguments: steps.append(arguments) or real(*arguments))
    for use in (False, True):
        monkeypatch.setattr(multipole_state, "takes_kernels", lambda *_, use=use: use)
        cache, logits, done = None, [], 0
        for piece in (5, 2, 1, 1, 1, 1):
            done += piece
            with torch.no_grad():
                out = model(
                    ids[:, done - piece : done].to(DEVICE), attention_mask=mask[:, :done].to(DEVICE), past_key_values=cache, use_cache=True
                )
            cache = out.past_key_values
            logits.append(out.logits * mask[:, done - piece : done, None].to(DEVICE))
        results.append(torch.cat(logits, 1))
        assert len(steps) == (4 if use else 0)
    # Low precision: a few roundings of numbers of the size of the logits.
    close = 100 * torch.finfo(torch.float32).eps if model.dtype == torch.float32 else 4 * torch.finfo(model.dtype).eps
    for expected in results[:2]:
        assert_within(results[2], expected, close * expected.abs().max().item(), "logits", options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", [False, True], ids=["", "O(n) form"])
@pytest.mark.parametrize("sinks", [0, 3, 20], ids="{} sinks".format)
@pytest.mark.slow
def test_a_step_has_a_cap_and_grouped_heads(linear, dtype, sinks):
    """Against its definition, tokens alone, sinks among them, or with the far result of a segment; and its registration."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 6, 5), (3, 2, sinks + 12, 5), (3, 2, sinks + 12, 3), (3, 6, 3, 4)
    q, keys, values, far = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    q, lengths = q.to(dtype), torch.tensor([6, 9, 23], dtype=torch.int32, device=DEVICE)
    arguments = (q, keys, values, lengths, 0, None, far if linear else None, sinks, 12, 4, 4, 2, True, 0.5, 1.5, None)
    out = state_triton.step(*arguments)
    for row, length in enumerate(lengths.tolist()):
        begin = max(length // 4 - 1, 0) * 4
        slots = torch.cat([torch.arange(min(begin, sinks)), sinks + torch.arange(begin, length + 1) % 12])
        for head in range(6):
            k, v = (x[row, head // 3, slots].double() for x in (keys, values))
            logits = 1.5 * torch.tanh(0.5 * (k @ q[row, head].double()) / 1.5)
            if linear:
                *mean, total = far[row, head, length // 2 % 3].double().tolist()
                logits, v = torch.cat([logits, logits.new_tensor([total])]), torch.cat([v, v.new_tensor([mean])])
            torch.testing.assert_close(out[row, head].double(), torch.softmax(logits, 0) @ v, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(state_triton.step, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.slow
def test_a_step_with_counts(heads, biased):
    """In place of size weighting they are added to the logits of summaries, -inf hides one; against its definition."""
    generator = torch.Generator().manual_seed(0)
    block_size, rank, sinks, ring, groups, levels, length = 4, 2, 2, 12, 4, 2, 29
    slots = sinks + ring + levels * groups * rank
    q, keys, values = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((2, 4, 5), (2, 2, slots, 5), (2, 2, slots, 3)))
    counts = torch.randn(2, heads, slots - sinks - ring, generator=generator)
    bias = torch.randn(4, 1, generator=generator).to(DEVICE) if biased else None
    # Of level 1, the groups 4 and 5 behind the blocks 6 and 7 of the near field; of level 2, of 8 tokens, 0 and 1.
    far = [(level, group) for level, own in enumerate((4, 5)) for group in ((4, 5), (0, 1))[level]]
    seen = [ring + sinks + (level * groups + group % groups) * rank + r for level, group in far for r in range(rank)]
    counts[..., seen[1] - sinks - ring] = -torch.inf
    counts = counts.to(DEVICE)
    arguments = (q, keys, values, None, length, bias, None, sinks, ring, groups, block_size, rank, True, 0.5, None, counts)
    out = state_triton.step(*arguments)
    near = [0, 1, *(sinks + token % ring for token in range(24, length + 1))]
    for row in range(2):
        for head in range(4):
            k, v = (x[row, head // 2, near + seen].double() for x in (keys, values))
            logits = 0.5 * (k @ q[row, head].double())
            logits[len(near) :] += counts[row, head // 2 % heads, torch.tensor(seen) - sinks - ring].double()
            if biased:
                logits[len(near) :] += bias[head, 0].double()
            torch.testing.assert_close(out[row, head].double(), torch.softmax(logits, 0) @ v, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(state_triton.step, arguments, test_utils=("test_schema", "test_faketensor"))


# The operator


def test_the_log_sum_exp_has_a_gradient():
    """One block, without a far field, against PyTorch."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(1, 2, 6, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    of_lse, far = torch.randn(1, 2, 6, generator=generator, dtype=torch.float64), torch.zeros(1, 2, 0, 5, device=DEVICE)

    def ours(q, k, v):
        return kernels.attention(q, k, v, far, far, *[None] * 8, [], [], 6, 1, 0, True, True, 0.5, None)

    def exact(q, k, v):
        logits = (q @ k.transpose(2, 3) * 0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        return logits.softmax(-1) @ v, logits.logsumexp(-1) / math.log(2)

    results = []
    for function, dtype, device in ((ours, torch.float32, DEVICE), (exact, torch.float64, "cpu")):
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        for weights in ((upstream, of_lse), (0 * upstream, of_lse)):
            given = [x.to(device, dtype) for x in weights]
            results.append(torch.autograd.grad(function(*leaves), leaves, given))
        results.append(
            torch.autograd.grad(function(*leaves)[1], leaves, of_lse.to(device, dtype), allow_unused=True, materialize_grads=True)
        )
    for actual, expected in zip(results[:3], results[3:]):
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_parts_of_summaries_and_of_sinks_meet(monkeypatch):
    """Several programs share the queries that see a group, some of which are not there, or a sink."""
    monkeypatch.setattr(kernels, "_UNIT", 4)
    matches_reference(multipole_attention, replace(FULL, queries=7, repeats=1, softcap=None, sinks=3), DEVICE)


@pytest.mark.slow
def test_opcheck():
    packed = PACKED | {"cuts": (3,), "sinks": 1, "saliency": True}
    cases = replace(FULL, n=9, causal=False, **packed), replace(FULL, n=5, bias_levels=0, softcap=None), replace(FULL, n=7, sinks=2)
    calls = (partial(make(case, device=DEVICE), multipole_attention) for case in cases)
    check_operator(kernels, "attention", *calls, more=("test_aot_dispatch_static",))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    case = replace(FULL, n=8, causal=False, cuts=(6,), padding=((1, 0),), layout="fused", sinks=1, saliency=True)
    torch._dynamo.reset()
    compiled = torch.compile(multipole_attention, fullgraph=True, backend="aot_eager")
    actual, expected = (make(case, device=DEVICE).with_gradients(function) for function in (compiled, multipole_attention))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=name)


CANNOT = {
    "dropout": ({"dropout_p": 0.1}, "dropout_p is 0.1"),
    "float64": ({"dtype": torch.float64}, "torch.float64"),
    "wide heads": ({"width": 257}, "that of q is 257"),
    "order 4": ({"order": 4}, "but there are 3"),
}


@pytest.mark.parametrize("options, words", [({}, None), ({"width": 256}, None), *CANNOT.values()], ids=["", "256", *CANNOT])
def test_auto_takes_the_kernels_on_cuda_devices(options, words):
    """But not where they cannot run, where "triton" raises; nowhere else, and nowhere where PyTorch is asked for."""
    options = dict(options)
    dtype, widths = options.pop("dtype", torch.float32), {"q": options.pop("width", 64)}
    gpu, cpu = (SimpleNamespace(device=torch.device(device), dtype=dtype) for device in ("cuda", "cpu"))
    assert takes_kernels("auto", gpu, widths, **options) == (words is None)
    assert not takes_kernels("torch", gpu, widths, **options)
    assert not takes_kernels("auto", cpu, widths, **options)
    if words is None:
        assert takes_kernels("triton", gpu, widths, **options)
    else:
        with pytest.raises((ValueError, TypeError), match=words):
            takes_kernels("triton", gpu, widths, **options)


# What is refused


def small(device=DEVICE, **options):
    q = torch.zeros(1, 1, 3, 4)
    given = {"q": q, "k": q, "v": q, "block_size": 2, "rank": 1} | options
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


WIDE = torch.zeros(1, 1, 3, 257)
REFUSED = {
    "float64": (
        {name: torch.zeros(1, 1, 3, 4, dtype=torch.float64) for name in "qkv"},
        TypeError,
        "q has torch.float64; pass backend='auto' or 'torch'",
    ),
    "wide heads": ({name: WIDE for name in "qkv"}, ValueError, "that of q is 257; pass backend='auto' or 'torch'"),
    "wide values": ({"v": WIDE}, ValueError, "that of v is 257; pass backend='auto' or 'torch'"),
    "dropout": ({"dropout_p": 0.1}, ValueError, "dropout_p is 0.1; pass backend='auto' or 'torch'"),
}


@pytest.mark.parametrize("options, error, words", REFUSED.values(), ids=REFUSED)
def test_refused_with_a_remedy(options, error, words):
    with pytest.raises(error, match=words):
        multipole_attention(**small(**options))


def test_a_device_that_has_no_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="q is on cpu; move them, or pass backend='auto' or 'torch'"):
        multipole_attention(**small("cpu"))


def test_without_triton_or_with_an_old_one(monkeypatch):
    for module in (kernels, triton_common, multipole_kernels):
        monkeypatch.delitem(sys.modules, module.__name__)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.2.0")
        with pytest.raises(ImportError, match="need Triton 3.3 or later, but this is 3.2.0"):
            multipole_attention(**small())
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install 'triton>=3.3', or pass backend='torch'"):
        multipole_attention(**small())
    assert hf_multipole.multipole_attention(**small(), backend="torch").shape == (1, 1, 3, 4)


# Compiled


COMPILE = """
import json, torch
from tests.helpers.compiled_kernels import compile_all
cases = (90, "bfloat16", 64, 0), (80, "bfloat16", 128, 1), (90, "float16", 128, 1), (80, "float16", 256, 0)
for capability, dtype, dim, everything in cases:
    found = [kernel._asdict() for kernel in compile_all(capability, getattr(torch, dtype), dim, bool(everything))]
    print(json.dumps({f"{capability} {dtype} {dim} {everything}": found}))
"""


@pytest.mark.slow
def test_compiles_for_gpus():
    """Types are right, tiles fit: on machines without one, too. In one interpreter, where kernels are not interpreted."""
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 4
    for name, found in (pair for case in cases for pair in case.items()):
        assert len(found) == (11 if name.endswith("1") else 10), name  # with sinks there is one more
        for kernel in found:
            # What a program may take on the smallest GPU of this kind that has bfloat16, two at a time; a few bytes of stack are not
            # in loops.
            assert kernel["shared"] <= 100 * 1024 and kernel["stack"] <= 64, (name, kernel)

"""The cost model against counted columns, counted products and tensors at hand; the plan and the benchmarks that draw it."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hf_multipole import multipole_attention
from hf_multipole.modeling.calls import Call
from hf_multipole.modeling.hierarchy import far_columns, group_count, level_count, near_offsets
from hf_multipole.modeling.multipole_attention import aligned_attention
from hf_multipole.modeling.multipole_state import MultipoleState, NewTokens
from hf_multipole.modeling.options import MultipoleOptions
from hf_multipole.modeling.shared_query_state import LinearState
from hf_multipole.modeling.state_slots import Layout
from hf_multipole.modeling.summaries import HierarchicalSummary
from scripts.benchmarks import cost_model
from scripts.benchmarks.cost_model import Layer
from scripts.common import peers
from tests.helpers.commands import run

sizes = st.tuples(st.integers(1, 700), st.sampled_from([2, 4, 8, 12]), st.sampled_from([1, 2]))


def tokens_of(n, width, i):
    return min(width, n - i * width)


@settings(max_examples=60, deadline=None)
@given(sizes, st.booleans())
def test_pairs_are_those_of_the_lists(sizes, causal):
    n, m, rank = sizes
    layer, levels = Layer(n, block_size=m, rank=rank), level_count(n, m)
    columns, blocks = far_columns(n, m, levels, causal), group_count(n, m, 1)
    near = sum(tokens_of(n, m, b) * m * sum(0 <= b + o < blocks for o in near_offsets(blocks, causal)) for b in range(blocks))
    near = near if levels or n > 2 * m else n * n
    each, shared = 0, 0
    for b in range(blocks):
        each += tokens_of(n, m, b) * int((~columns.hidden[b]).sum())
    for level in range(1, levels + 1):
        width = m << (level - 1)
        for segment in range(math.ceil(n / (width // rank))):
            first = segment * (width // rank) // m  # block in which the segment begins
            shared += int((~columns.hidden[first] & (columns.level == level)).sum())
    assert cost_model.near_pairs(layer, causal) == near
    assert cost_model.pairs("multipole", layer, causal) == near + rank * each
    assert cost_model.pairs("multipole_linear", layer, causal) == near + rank * shared + (n if levels else 0)


@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_the_weights_that_are_not_zero(causal):
    n, m, rank, heads = 208 if causal else 256, 8, 2, 2  # bidirectional, summaries of nothing are hidden, too
    q, k, v = (torch.randn(1, heads, n, 4) for _ in range(3))
    _, weights = aligned_attention(q, k, v, None, Call(MultipoleOptions(block_size=m, rank=rank), causal=causal), return_weights=True)
    triangles = n // m * m * (m - 1) // 2 if causal else 0  # of a block, counted whole
    seen = cost_model.pairs("multipole", Layer(n, block_size=m, rank=rank), causal) - triangles
    assert (weights > 0).sum().item() == heads * seen


@pytest.mark.parametrize("kind, causal", [("full", False), ("linear", True), ("linear", False), ("nystrom", False)])
def test_operations_are_those_of_the_products(kind, causal):
    """By PyTorch's own counter, where the products are its own operators; exact attention in its causal form counts half the pairs."""
    if kind == "nystrom" and not peers.PEERS["peer_nystrom"].installed():
        pytest.skip("nystrom-attention is not installed")
    layer = Layer(256, batch=2, heads=3, kv_heads=3, head_dim=8, chunk=peers.CHUNK, landmarks=peers.LANDMARKS)
    q, k, v = (torch.randn(2, 3, 256, 8, requires_grad=True) for _ in range(3))
    dense = {"full": lambda q, k, v, *_: (q @ k.mT).softmax(-1) @ v}
    attend = (dense | {"linear": peers.linear, "nystrom": peers.nystrom})[kind]
    for cost, backward in (cost_model.forward, False), (cost_model.both, True):
        with FlopCounterMode(display=False) as counter:
            out = attend(q, k, v, causal, 0.3)
            if backward:
                out.sum().backward()
        assert counter.get_total_flops() == cost(kind, layer, causal).flops


def test_memory_is_that_of_the_tensors():
    """What the PyTorch path keeps for its backward pass beside its arguments, and returns."""
    layer = Layer(2048, batch=2, heads=4, kv_heads=4, head_dim=16, block_size=16, rank=2)
    q, k, v = (torch.randn(2, 4, layer.n, 16, requires_grad=True) for _ in range(3))
    key, value = (HierarchicalSummary(16, 2, 4, 16) for _ in range(2))
    given = {x.untyped_storage().data_ptr() for x in (q, k, v, *key.parameters(), *value.parameters())}
    kept = {}

    def note(x):
        if x.untyped_storage().data_ptr() not in given:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() if x.is_floating_point() else 0
        return x

    assert (q.nbytes, k.nbytes) == (layer.query_bytes, layer.key_bytes)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = multipole_attention(q, k, v, block_size=16, rank=2, key_summary=key, value_summary=value)
    far = cost_model.far_bytes("multipole", layer)
    normalizers = 4 * layer.batch * layer.heads * layer.n  # which the GPU kernels keep, and this path works out again
    assert cost_model.forward("multipole", layer).memory == out.nbytes + normalizers + far
    # All summaries side by side, before that those that are merged, and what hides columns.
    assert far <= sum(kept.values()) <= 2.5 * far
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    extra = cost_model.both("multipole", layer).memory - cost_model.forward("multipole", layer).memory
    assert extra == sum(x.nbytes for x in grads) + far


@pytest.mark.parametrize("n", [1, 63, 64, 200, 1000])
@pytest.mark.parametrize("kind", [MultipoleState, LinearState])
def test_state_of_a_decoding_step(kind, n):
    heads, kv_heads, dim, m, rank = 4, 2, 8, 16, 2
    q, k = torch.randn(3, heads, n, dim), torch.randn(3, kv_heads, n, dim)
    state = kind(q, k, k, Layout(m, rank, spare=1), level_count(n + 1, m))
    key, value = (HierarchicalSummary(m, rank, kv_heads, dim) for _ in range(2))
    with torch.no_grad():
        state.attend(q, k, k, [NewTokens(0, n)] * 3, Call(MultipoleOptions(block_size=m, rank=rank), key, value))
    layer = Layer(n, 3, heads, kv_heads, dim, block_size=m, rank=rank)
    cost = cost_model.decode("multipole_linear" if kind is LinearState else "multipole", layer)
    assert cost.memory == sum(x.nbytes for x in state.tensors().values())
    assert cost_model.decode("full", layer).memory == 2 * k.nbytes


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(2, 12), st.sampled_from([2, 4]))
def test_groups_that_a_part_of_a_row_receives(blocks, devices, m):
    """Of each level at most four: those seen by some query of the part, and the first half of one that ends in it."""
    n = blocks * devices * m
    part, worst = n // devices, 0
    for level in range(1, level_count(n, m) + 1):
        width = m << (level - 1)
        for begin in range(0, n, part):
            own = range(begin // width, (begin + part - 1) // width + 1)
            seen = {j for i in own for j in range(max(0, i - 3), i - 1) if abs(j // 2 - i // 2) <= 1}
            elsewhere = {j for j in seen if (j + 1) * width <= begin}
            completed = {i for i in own if i * width < begin < (i + 1) * width <= begin + part}
            worst = max(worst, len(elsewhere) + len(completed))
    layer = Layer(n, block_size=m, rank=1)
    received, _ = cost_model.exchange("multipole", layer, devices)
    # What the model counts of each level is enough.
    assert 2 * 8 * 64 * 4 * (m + worst * level_count(n, m)) <= received == 2 * 8 * 64 * 4 * (m + 4 * level_count(n, m))
    assert cost_model.exchange("full", layer, devices)[0] == 2 * layer.key_bytes * (devices - 1) // devices
    assert cost_model.exchange("multipole", layer, 1) == cost_model.exchange("full", layer, 1) == (0, 0)


def test_what_the_model_refuses():
    with pytest.raises(ValueError, match="kind is 'flash'"):
        cost_model.forward("flash", Layer(100))
    with pytest.raises(ValueError, match="nystrom is bidirectional"):
        cost_model.decode("nystrom", Layer(100))
    with pytest.raises(ValueError, match="no exchange is worked out for 'linear'"):
        cost_model.exchange("linear", Layer(100), 2)


def test_benchmark_and_plan(tmp_path):
    """A benchmark over lengths and batch sizes, its floors, and the plan that takes its rates."""
    sizes = ["--heads", 2, "--head-dim", 8, "--block-size", 8, "--rank", 2, "--repeats", 1, "--threads", 1, "--clock", "processor"]
    methods = ["--methods", "sdpa", "multipole-hierarchical", "multipole-linear", "linear-attention"]
    shapes = ["--lengths", 64, 256, "--batch", 1, 3]
    run("scripts.benchmarks.attention", *sizes, *methods, *shapes, "--no-memory", "--output", "out", cwd=tmp_path)
    record = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [(r["n"], r["batch"]) for r in record["results"][::4]] == [(64, 1), (64, 3), (256, 1), (256, 3)]
    assert all(min(r["forward_floors"].values()) > 0 and r["forward"]["median"] > 0 and not r["note"] for r in record["results"])
    least = cost_model.both("multipole", Layer(256, 3, 2, 2, 8, block_size=8, rank=2)).memory
    assert record["results"][-3]["least_memory"] == least

    plan = ["--lengths", 2**20, "--devices", 1, 512, "--measured", "out/benchmark.json", "--report", "reports/cost.md"]
    run("scripts.benchmarks.cost_plan", *plan, cwd=tmp_path)
    text = (tmp_path / "reports" / "cost.md").read_text()
    assert "| 1,048,576 | 512 |" in text and "## The processor that was measured" in text
    # 524,288.5 columns of 128 entries for 32 heads, two products forward and four backward, at 60 % of 989 Tflop/s.
    assert f"| {3 * 4 * 2**20 * 524288.5 * 128 * 32 / (0.6 * 989e12):.1f} s |" in text


def test_what_was_not_run_is_marked(tmp_path):
    """Without time for more, the first call counts, and says so; beyond, exact attention is extrapolated, and every cell of it has a ~."""
    sizes = ["--heads", 2, "--head-dim", 8, "--block-size", 8, "--rank", 2, "--threads", 1, "--no-memory", "--output", "out"]
    budget = ["--lengths", 64, 256, "--methods", "sdpa", "near", "--max-seconds-per-method", 1e-9]
    run("scripts.benchmarks.attention", *sizes, *budget, cwd=tmp_path)
    first, _, scaled, left_out = json.loads((tmp_path / "out" / "benchmark.json").read_text())["results"]
    assert [len(x) for x in first["samples"].values()] == [1, 1] and "the first call alone" in first["note"]
    assert scaled["both"]["median"] == pytest.approx(16 * first["both"]["median"], rel=1e-5) and "samples" not in scaled
    assert "left out" in left_out["note"]
    rows = {tuple(line.split(" | ")[:3]): line for line in (tmp_path / "out" / "benchmark.md").read_text().splitlines()}
    cells = rows["| 256", "1", "sdpa"].strip("| ").split(" | ")[3:]
    assert [cell[0] for cell in cells[:9]] == ["~"] * 9 and not any("~" in cell for cell in rows["| 64", "1", "sdpa"])


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("attention", ["--tokens", 100, "--lengths", 64], "--tokens 100 is no multiple of --lengths 64"),
        ("attention", ["--tokens", 64, "--lengths", 64, "--batch", 2], "--tokens and --batch exclude each other"),
        ("cost_plan", ["--lengths", 1000, "--devices", 8], "--lengths 1000 cannot be cut into whole blocks of 64 for --devices 8"),
        ("cost_plan", ["--lengths", 4096, "--devices", 3, 8], "--lengths 4096 cannot be cut into whole blocks of 64 for --devices 3"),
        ("cost_plan", ["--share-full", 2], "--share-full 2.0 must be at most 1"),
        ("cost_plan", ["--measured", "none.json"], "--measured none.json does not exist"),
    ],
)
def test_what_the_scripts_refuse(script, arguments, message, tmp_path):
    assert message in run(f"scripts.benchmarks.{script}", *arguments, cwd=tmp_path, fails=True)
    assert not list(tmp_path.iterdir())


def test_memory_in_a_process_of_its_own(tmp_path):
    """Exact attention holds the outputs and gradients of the model, and a few MB that libraries take."""
    shape = ["--lengths", 4096, "--methods", "sdpa", "--heads", 1, "--repeats", 1, "--threads", 1, "--block-size", 8]
    run("scripts.benchmarks.attention", *shape, "--output", "out", cwd=tmp_path)
    (result,) = json.loads((tmp_path / "out" / "benchmark.json").read_text())["results"]
    assert result["least_memory"] == 4 * 4096 * 64 * 4 + 4096 * 4
    assert 0.5 * result["least_memory"] <= result["memory"] <= result["least_memory"] + 2**24

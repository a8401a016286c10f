"""The generation state with sinks and token masses, by itself: what the reference says, in whatever pieces tokens come."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.state_runs import BLOCK, SPARE, begin, expected, read, saved, text

CLOSE = {"atol": 1e-10, "rtol": 1e-10}
SINKS = [0, 1, 3, 9, 60]


def follow(state, tokens, plan):
    """Attention of the rows by a plan: pieces to read; "stray" tokens, which are read and taken back; "select"ed rows; "save"."""
    want, got, done, last = expected(tokens), [], 0, tokens.q.shape[2]
    for what, size in plan:
        if what == "read":
            stop = min(last, done + size)
            if stop > done:
                out = read(state, tokens, done, stop)
                got.append((out, want[:, :, done:stop], [max(0, min(left, stop) - done) for left in tokens.left]))
            done = stop
        elif what == "stray":
            # What comes instead of the next tokens, or after the last.
            stop = min(last, done + size)
            stray = tokens._replace(k=-tokens.k, v=tokens.v + 5)
            if stop > done:
                for start, end in [(done, stop)] if size % 2 else [(i, i + 1) for i in range(done, stop)]:
                    read(state, stray, start, end)
                state.take_back(stop - done)
        elif what == "save":
            state = saved(state)
        else:
            index = torch.tensor([(i * size) % len(tokens.left) for i in range(1, len(tokens.left) + 1)])
            state.select(index)
            tokens, want = tokens.rows(index), want[index]
    for out, true, hidden in got:
        for row, count in enumerate(hidden):
            torch.testing.assert_close(out[row, :, count:], true[row, :, count:], **CLOSE)
    return state, done


def test_room_for_sinks_grows_with_the_rows():
    """However many are asked for, there is room for no more than twice as many as a row has tokens."""
    tokens = text(50, [0, 30], sink_tokens=10**9, salient=True)
    state, done = begin(tokens), 0
    for size in [1] * 9 + [20] + [1] * 21:
        read(state, tokens, done, done + size)
        done += size
        assert max(done, BLOCK) <= state.layout.sinks <= max(2 * done + 2, BLOCK)
    assert begin(text(50, [0], sink_tokens=3)).layout.sinks == 3
    # None where nothing was asked for.
    plain = begin(text(50, [0]))
    assert plain.layout.sinks == 0 and set(plain.tensors()) == {"keys", "values"}


def test_masses_go_with_changed_weights():
    """What is remembered of weights is forgotten as they change."""
    tokens = text(48, [0], kind="hierarchical", salient=True)
    follow(begin(tokens), tokens, [("read", 1)] * 24)
    state = begin(tokens)
    with torch.no_grad():
        for start in range(0, 24):
            read(state, tokens, start, start + 1)
        for summary in (tokens.call.key_summary, tokens.call.value_summary):
            for weight in summary.parameters():
                weight.mul_(torch.linspace(0.5, 2, weight[0, 0].numel()).view(weight.shape[2:]))
        fresh = begin(tokens)
        fresh.shares = state.shares
        out = torch.cat([read(fresh, tokens, start, start + 1) for start in range(48)], 2)
    torch.testing.assert_close(out, expected(tokens), **CLOSE)


@pytest.mark.parametrize("downsample", [False, True])
def test_gradients_reach_masses_of_new_tokens(downsample):
    tokens = text(50, [0], kind="hierarchical", salient=True, sink_tokens=3, downsample_queries=downsample)
    grads = []
    for attend in (expected, lambda given: read(begin(given), given, 0, 50)):
        leaves = [x.clone().requires_grad_() for x in (tokens.q, tokens.k, tokens.v, tokens.log_masses)]
        q, k, v, log_masses = leaves
        out = attend(tokens._replace(q=q, k=k, v=v, log_masses=log_masses))
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for want, got in zip(*grads):
        torch.testing.assert_close(got, want, **CLOSE)


steps = st.one_of(
    st.tuples(st.just("read"), st.one_of(st.just(1), st.just(1), st.integers(1, 3 * BLOCK), st.integers(1, 60))),
    st.tuples(st.just("stray"), st.integers(1, SPARE * BLOCK)),
    st.tuples(st.just("select"), st.integers(1, 3)),
    st.tuples(st.just("save"), st.just(0)),
)
kinds = st.sampled_from(["mean", "hierarchical", "direct"])


@given(
    plan=st.lists(steps, min_size=1, max_size=12),
    last=st.sampled_from([1, 7, 70]),
    n=st.integers(1, 70),
    left=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {
            "kind": kinds,
            "heads": st.sampled_from([2, 4]),
            "kv_heads": st.sampled_from([1, 2]),
            "rotated": st.booleans(),
            "salient": st.booleans(),
            "bias": st.booleans(),
            "max_levels": st.sampled_from([None, None, 0, 1]),
            "softcap": st.sampled_from([None, 1.5]),
            "sink_tokens": st.sampled_from(SINKS),
            "size_weighting": st.booleans(),
            "downsample_queries": st.booleans(),
            "seed": st.integers(0, 99),
        }
    ),
)
@pytest.mark.slow
def test_any_plan_gives_the_reference(plan, last, n, left, options):
    if options["kind"] == "direct":
        options["max_levels"] = None  # they have as many as they were made with
    tokens = text(n, [min(count, n) for count in left], **options)
    state, done = follow(begin(tokens), tokens, plan + [("read", last)] * n)
    assert state.seen == done == n

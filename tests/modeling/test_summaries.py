"""Group summaries against their definition in reference.py, and what ragged, padded and long rows ask of them."""

import pytest
import torch

from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.summaries import DirectSummary, HierarchicalSummary, MeanSummary, depthwise_map
from hf_multipole.reference import effective_weights, segment_means, summarise

BLOCK_SIZE, RANK, HEADS, DIM, LENGTH = 4, 2, 2, 3, 64
KINDS = ["mean", "direct", "hierarchical"]


def build(kind: str, random: bool = True, dtype=torch.float64) -> MeanSummary:
    torch.manual_seed(0)
    summary = {
        "mean": lambda: MeanSummary(BLOCK_SIZE, RANK),
        "direct": lambda: DirectSummary(BLOCK_SIZE, RANK, HEADS, DIM, LENGTH),
        "hierarchical": lambda: HierarchicalSummary(BLOCK_SIZE, RANK, HEADS, DIM),
    }[kind]().to(dtype)
    if random:
        for weight in summary.parameters():
            weight.data.normal_()
    return summary


def tokens(n: int = LENGTH, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, HEADS, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n", [LENGTH, 36])
@pytest.mark.parametrize("kind", KINDS)
def test_summaries_masses_and_counts_are_as_defined(kind, n):
    """Full and ragged groups of rows of several lengths, group by group."""
    summary, x = build(kind), tokens(n)
    lengths = [n, n - 11]
    validity = torch.arange(n) < torch.tensor(lengths)[:, None]
    x[1, :, n - 11 :] = 0
    levels = level_count(n, BLOCK_SIZE)
    assert levels > 1
    ours, masses = summary(x, validity, levels), summary.masses(validity, levels, DIM, torch.float64)
    counts = summary.counts(validity, levels, DIM, torch.float64)
    for level in range(1, levels + 1):
        width = BLOCK_SIZE << level - 1
        assert ours[level - 1].shape == (2, HEADS, -(-n // width), RANK, DIM)
        for b, length in enumerate(lengths):
            for h in range(HEADS):
                maps = effective_weights(summary, h, level, BLOCK_SIZE, RANK)
                for group, first in enumerate(range(0, n, width)):
                    expected, mass = summarise(x[b, h, first : min(first + width, length)], *maps)
                    own = min(h, masses[level - 1].shape[1] - 1)
                    torch.testing.assert_close(ours[level - 1][b, h, group], expected)
                    torch.testing.assert_close(masses[level - 1][b, own, group].expand_as(mass), mass)
                    torch.testing.assert_close(counts[level - 1][b, own, group], mass.mean(-1) * width / RANK)
    if n % width == 0:
        for without, full in zip(summary(x, None, levels), summary(x, torch.ones(1, n, dtype=torch.bool), levels)):
            torch.testing.assert_close(without, full)


def test_counts_of_means_are_numbers_of_tokens():
    validity = torch.arange(24)[None] < 18
    counts = MeanSummary(BLOCK_SIZE, RANK).counts(validity, 2, DIM, torch.float64)
    assert counts[0].flatten().tolist() == [2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0]
    assert counts[1].flatten().tolist() == [4, 4, 4, 4, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["direct", "hierarchical"])
def test_learned_summaries_start_exactly_at_the_mean(kind, dtype):
    summary = build(kind, random=False, dtype=dtype)
    levels = level_count(LENGTH, BLOCK_SIZE)
    for level in range(1, levels + 1):
        linear, share, even = effective_weights(summary, 1, level, BLOCK_SIZE, RANK)
        mean = segment_means(RANK, BLOCK_SIZE << level - 1).expand_as(linear)
        assert torch.equal(linear, mean) and torch.equal(share, mean) and torch.equal(even, mean[..., 0])
    # Integers are summed without rounding, and the widths are powers of two: equal to the last bit.
    x = torch.randint(-9, 9, (2, HEADS, LENGTH, DIM)).to(dtype)
    validity = torch.arange(LENGTH)[None] < LENGTH - 16
    for valid in (None, validity):
        if valid is not None:
            x[:, :, LENGTH - 16 :] = 0
        for learned, mean in zip(summary(x, valid, levels), MeanSummary(BLOCK_SIZE, RANK)(x, valid, levels)):
            assert torch.equal(learned, mean)
    for learned, mean in zip(*(s.counts(validity, levels, DIM, dtype) for s in (summary, MeanSummary(BLOCK_SIZE, RANK)))):
        assert torch.equal(learned, mean.expand_as(learned))


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_is_the_truncated_row(kind):
    """However many empty slots follow a row: the same summaries and gradients, and none beyond its groups."""
    summary, n = build(kind), 27
    levels = level_count(n, BLOCK_SIZE)
    results = []
    for length in (28, 32, LENGTH):
        row = torch.zeros(2, HEADS, length, DIM, dtype=torch.float64)
        row[:, :, :n] = tokens()[:, :, :n]
        row.requires_grad_()
        summaries = summary(row, torch.arange(length)[None] < n, levels)
        kept = [level[:, :, : -(-n // (BLOCK_SIZE << i))] for i, level in enumerate(summaries)]
        assert all((level[:, :, k.shape[2] :] == 0).all() for level, k in zip(summaries, kept))
        gradients = torch.autograd.grad(sum((k * k).sum() for k in kept), [row, *summary.parameters()], allow_unused=True)
        results.append([*kept, gradients[0][:, :, :n], *(g for g in gradients[1:] if g is not None)])
    for others in results[1:]:
        for one, other in zip(results[0], others):
            torch.testing.assert_close(one, other)


def test_a_group_without_weight_on_its_tokens_is_left_out():
    """Learned weights may put all their mass on absent tokens, or be zero altogether: finite, in gradients too."""
    summary = build("hierarchical")
    with torch.no_grad():
        summary.tokens[0, 0, 0] = 0  # nothing for the only token of the last group
        summary.tokens[1] = 0
    x = tokens(16)
    x[:, :, 13:] = 0
    x.requires_grad_()
    validity = torch.arange(16)[None] < 13
    summaries = summary(x, validity, 1)[0]
    masses = summary.masses(validity, 1, DIM, torch.float64)[0]
    assert (masses[:, 0, 3, 0] == 0).all() and (summaries[:, 0, 3, 0] == 0).all()
    assert (masses[:, 0, 3, 1] > 0).all()
    assert (masses[:, 1, 3] == 0.25).all(), "without weights, shares are even"
    for gradient in torch.autograd.grad(summaries.sum() + masses.sum(), [x, summary.tokens]):
        assert gradient.isfinite().all()


def test_direct_summaries_have_a_longest_row():
    summary = build("direct")
    levels = level_count(LENGTH, BLOCK_SIZE)
    assert len(summary.levels) == levels == len(summary(tokens(), None, levels))
    with pytest.raises(ValueError, match="at most 64 tokens.*hierarchical"):
        summary(tokens(2 * LENGTH), None, levels + 1)


def test_hierarchical_summaries_have_none():
    """Trained at one length, run at eight times it: as defined at every level, with the same parameters."""
    summary = build("hierarchical")
    assert {name: tuple(p.shape) for name, p in summary.named_parameters()} == {
        "tokens": (HEADS, RANK, BLOCK_SIZE, DIM),
        "merge": (HEADS, RANK, 2 * RANK, DIM),
    }
    x = tokens(8 * LENGTH, 1)
    levels = level_count(8 * LENGTH, BLOCK_SIZE)
    assert levels == level_count(LENGTH, BLOCK_SIZE) + 3
    top = summary(x, None, levels)[-1]
    width = BLOCK_SIZE << levels - 1
    for group in range(top.shape[2]):
        expected, _ = summarise(x[0, 1, group * width : (group + 1) * width], *effective_weights(summary, 1, levels, BLOCK_SIZE, RANK))
        torch.testing.assert_close(top[0, 1, group], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_summed_in_float32(kind):
    """Summaries of bfloat16 tokens are float32, and as exact as float32 sums of those tokens."""
    summary, x = build(kind, dtype=torch.bfloat16), tokens().bfloat16()
    levels = level_count(LENGTH, BLOCK_SIZE)
    x[:, :, LENGTH - 13 :] = 0
    validity = torch.arange(LENGTH)[None] < LENGTH - 13
    # Masses, too: their shares are of the weights as they are, not rounded once more.
    exact = build(kind, dtype=torch.bfloat16).double()
    for low, high in zip(summary(x, validity, levels), exact(x.double(), validity, levels)):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-5)
    for low, high in zip(*(s.counts(validity, levels, DIM, t) for s, t in ((summary, torch.float32), (exact, torch.float64)))):
        torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-6)


def one_map(width: int, rank: int, heads: int, dim: int) -> DirectSummary:
    """A summary of one level, which is one depthwise map, with random weights."""
    summary = DirectSummary(width, rank, heads, dim, 2 * width + 1).double()
    torch.nn.init.normal_(summary.levels[0], generator=torch.Generator().manual_seed(2))
    return summary


@pytest.mark.parametrize(
    "batch, heads, groups, width, rank, dim", [(2, 3, 5, 1, 1, 4), (2, 3, 5, 6, 3, 4), (1, 1, 5, 16, 4, 2), (2, 1, 19, 256, 2, 128)]
)
def test_depthwise_map_is_the_einsum(batch, heads, groups, width, rank, dim):
    """In gradients, too. The last shape is worked off in parts, which do not divide its groups."""
    generator = torch.Generator().manual_seed(3)
    # As a projection leaves it: heads behind tokens.
    x = torch.randn(batch, groups * width, heads, dim, dtype=torch.float64, generator=generator).transpose(1, 2).requires_grad_()
    summary = one_map(width, rank, heads, dim)
    grouped, weight = x.unflatten(2, (groups, width)), summary.levels[0]
    expected = torch.einsum("hrtc,bhgtc->bhgrc", weight, grouped)
    torch.testing.assert_close(depthwise_map(grouped, weight, None), expected)
    ours = summary(x, None, 1)[0]
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
    for one, other in zip(torch.autograd.grad(ours, [x, weight], upstream), torch.autograd.grad(expected, [x, weight], upstream)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_gradcheck(kind):
    summary, x = build(kind), tokens(22, 1).requires_grad_()
    levels = level_count(22, BLOCK_SIZE)
    x.data[:, :, 19:] = 0
    for validity in (None, torch.arange(22)[None] < 19):

        def function(x, *_):
            # The weights are the module's own, changed in place by gradcheck.
            return tuple(summary(x, validity, levels)) + tuple(summary.counts(torch.arange(22)[None] < 19, levels, DIM, torch.float64))

        # Padding's own gradient is the caller's to remove.
        assert torch.autograd.gradcheck(function, (x, *list(summary.parameters())[:levels]))


def test_operators_are_registered():
    """Schema and fake tensors, as torch.compile relies on them."""
    x, weight = tokens(16).unflatten(2, (4, 4)), torch.randn(HEADS, RANK, 4, DIM, dtype=torch.float64)
    masses = torch.rand(x.shape[:-1], dtype=torch.float64)
    strided = x.transpose(3, 4).contiguous().transpose(3, 4)
    for arguments in ((x, weight, None), (x, weight, masses), (strided, weight, masses), (x.bfloat16(), weight.float(), None)):
        torch.library.opcheck(depthwise_map, arguments, test_utils=("test_schema", "test_faketensor"))

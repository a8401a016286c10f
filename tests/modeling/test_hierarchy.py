"""Every token seen once, lists that do not depend on the length, and the grid of padded and packed rows: by brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_multipole.modeling.hierarchy import align_rows, block_of, check_rows, far_columns, group_count, level_count, near_offsets

LONGEST = 70


def lists_of(n: int, block_size: int, causal: bool) -> list[tuple[list[range], list[tuple[int, int]]]]:
    """Of each block: the ranges of near tokens, and the far groups as (level, first token)."""
    m = block_of(n, block_size)
    blocks = -(-n // m)
    columns = far_columns(n, m, level_count(n, block_size), causal)
    out = []
    for b in range(blocks):
        near = [range((b + o) * m, min(n, (b + o + 1) * m)) for o in near_offsets(blocks, causal) if 0 <= b + o < blocks]
        shown = (~columns.hidden[b]).nonzero()[:, 0].tolist()
        out.append((near, [(int(columns.level[c]), int(columns.first[b, c])) for c in shown]))
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
def test_every_token_is_covered_once(block_size, causal):
    for n in range(1, LONGEST):
        for b, (near, far) in enumerate(lists_of(n, block_size, causal)):
            times = [0] * n
            for tokens in near + [range(first, min(n, first + (block_size << level - 1))) for level, first in far]:
                for token in tokens:
                    times[token] += 1
            # In the causal case up to the block's end: the triangle within it belongs to the operator.
            end = min(n, (b + 1) * block_of(n, block_size)) if causal else n
            assert times == [1] * end + [0] * (n - end), f"n={n}, block {b}"


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 8])
def test_causal_lists_do_not_depend_on_the_length(block_size):
    longest = lists_of(LONGEST, block_size, True)
    for n in range(2 * block_size + 1, LONGEST):
        for b, (_, far) in enumerate(lists_of(n, block_size, True)):
            assert far == longest[b][1], f"n={n}, block {b}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 7, 32, 33, 67])
def test_levels_and_groups(n, causal):
    """Levels exist as defined; ``row`` numbers the groups level after level; a later first block drops only the rows before it."""
    block_size = 4
    levels = level_count(n, block_size)
    assert levels == sum(n > 2 * block_size * 2**i for i in range(20))
    starts = []
    for level in range(1, levels + 1):
        assert group_count(n, block_size, level) == len(range(0, n, block_size << level - 1))
        starts += [(level, first) for first in range(0, n, block_size << level - 1)]
    columns = far_columns(n, block_size, levels, causal)
    for b, c in (~columns.hidden).nonzero().tolist():
        assert starts[columns.row[b, c]] == (columns.level[c], columns.first[b, c])
        assert columns.width[c] == block_size << columns.level[c] - 1
    # Hidden columns are gathered too, so that their numbers must exist.
    assert columns.row.numel() == 0 or 0 <= columns.row.min() <= columns.row.max() < len(starts)
    for first_block in range(columns.row.shape[0]):
        later = far_columns(n, block_size, levels, causal, first_block)
        assert torch.equal(later.row, columns.row[first_block:]) and torch.equal(later.hidden, columns.hidden[first_block:])


@st.composite
def rows(draw):
    """A mask with padding on both sides, segment ids, and a block size; either of the first two may be None."""
    n, batch = draw(st.integers(1, 60)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["padded", "packed", "both"]))
    mask = ids = None
    if kind != "packed":
        mask = torch.zeros(batch, n, dtype=torch.long)
        for row in mask:
            left = draw(st.integers(0, n))
            row[left : draw(st.integers(left, n))] = 1
    if kind != "padded":
        ids = torch.zeros(batch, n, dtype=torch.long)
        for row in ids:
            row[sorted(draw(st.sets(st.integers(0, n - 1), max_size=6)))] = 1
        ids = 50 - ids.cumsum(1)
    return mask, ids, draw(st.sampled_from([1, 2, 3, 4, 8]))


def documents_of(mask, ids, row) -> list[list[int]]:
    n = (mask if ids is None else ids).shape[1]
    real = [t for t in range(n) if mask is None or mask[row, t]]
    if ids is None:
        return [real] if real else []
    return [[t for t in real if ids[row, t] == value] for value in dict.fromkeys(ids[row, real].tolist())]


@given(rows())
def test_alignment_is_a_grid_of_whole_documents(arguments):
    mask, ids, block_size = arguments
    alignment = align_rows(mask, ids, block_size)
    batch, n = (mask if ids is None else ids).shape
    slots = alignment.index.shape[1]
    assert slots % block_size == 0 and slots == alignment.document.shape[1]
    assert slots <= -(-(n if ids is None else 2 * n) // block_size) * block_size
    for row in range(batch):
        documents = documents_of(mask, ids, row)
        assert alignment.valid[row].nonzero()[:, 0].tolist() == sorted(sum(documents, []))
        empty = set(range(slots))
        for number, tokens in enumerate(documents):
            taken = alignment.slot[row, tokens].tolist()
            assert taken == list(range(taken[0], taken[0] + len(tokens)))
            assert alignment.index[row, taken].tolist() == tokens
            assert alignment.document[row, taken].tolist() == [number] * len(tokens)
            assert empty.issuperset(taken)
            empty -= set(taken)
        assert (alignment.document[row, sorted(empty)] == -1).all()


@pytest.mark.parametrize("causal", [True, False])
@given(arguments=rows())
def test_the_grid_shows_every_document_its_own_groups(causal, arguments):
    """Inside a document's stretch, the grid's lists are those of the document alone, wherever it lies."""
    mask, ids, block_size = arguments
    alignment = align_rows(mask, ids, block_size)
    slots = alignment.index.shape[1]
    columns = far_columns(slots, block_size, level_count(slots, block_size), causal)
    ends = columns.first + columns.width
    for row in range(len(alignment.index)):
        for tokens in documents_of(mask, ids, row):
            origin = int(alignment.slot[row, tokens[0]])
            alone = lists_of(len(tokens), block_size, causal)
            for b in range(origin // block_size, (origin + len(tokens) - 1) // block_size + 1):
                inside = (columns.first[b] >= alignment.first[row, b]) & (ends[b] <= alignment.last[row, b]) & ~columns.hidden[b]
                seen = [(int(columns.level[c]), int(columns.first[b, c]) - origin) for c in inside.nonzero()[:, 0]]
                # A group of empty slots has no mass and is left out for that.
                seen = [(level, first) for level, first in seen if first < len(tokens)]
                if len(tokens) <= 2 * block_size:
                    assert not seen
                else:
                    assert seen == alone[b - origin // block_size][1]


@pytest.mark.parametrize(
    "mask, ids, words",
    [
        ([[1, 1, 1, 1], [1, 0, 1, 1]], None, "attention_mask has a hole in row 1"),
        ([[0, 1, 0, 1]], None, "attention_mask has a hole in row 0"),
        (None, [[0, 0, 1, 1], [2, 3, 3, 2]], "segment_ids of row 1"),
        ([[0, 1, 1, 1]], [[5, 4, 5, 4]], "segment_ids of row 0"),
    ],
)
def test_check_rows_refuses(mask, ids, words):
    with pytest.raises(ValueError, match=words):
        check_rows(*(None if x is None else torch.tensor(x) for x in (mask, ids)))


def test_check_rows_accepts():
    check_rows(torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), None)
    check_rows(None, torch.tensor([[3, 3, 1, 2]]))
    # Padding may carry any segment's number.
    check_rows(torch.tensor([[0, 1, 1, 0]]), torch.tensor([[7, 6, 7, 7]]))

"""Which tokens and which groups a query sees: integers only.

A row of ``n`` tokens is cut into blocks of ``block_size`` m. Level l = 1, 2, ... exists when ``n > 2 * w_l`` and has groups
of ``w_l = m * 2 ** (l - 1)`` tokens. A query in group i of level l sees, at that level, the groups j with ``|j - i| >= 2``
and ``|j // 2 - i // 2| <= 1``, that is, two of its parent's neighbours' four children; in the causal case those before it.
With the blocks b - 1, b and b + 1, every token is then covered exactly once (Fast Multipole Attention, arXiv 2310.11960).
"""

from typing import NamedTuple

import torch


def level_count(n: int, block_size: int, max_levels: int | None = None) -> int:
    """Number of levels of a row of ``n`` tokens, at most ``max_levels``; 0 when the near field covers the row (``n <= 2 * block_size``).

    Raises ValueError in an export in which ``n`` is not known: a program has so many levels as it was made with.
    """
    if torch.compiler.is_exporting() and not isinstance(n, int):
        raise ValueError(
            "multipole attention cannot be exported with a dynamic length: its levels are as many as the length asks for; export with a "
            "fixed length (the batch may be dynamic), or with exact attention, attn_implementation='sdpa'"
        )
    blocks = -(-n // block_size)
    levels = max(0, (blocks - 1).bit_length() - 1)
    return levels if max_levels is None else min(levels, max_levels)


def block_of(n: int, block_size: int) -> int:
    """Block size that a row of ``n`` tokens is run with: one block where the near field covers the row anyway."""
    return n if n <= 2 * block_size else block_size


def group_count(n: int, block_size: int, level: int) -> int:
    """Number of groups of ``level`` (1, 2, ...); the last one may be ragged."""
    return -(-n // (block_size << (level - 1)))


def near_offsets(blocks: int, causal: bool) -> tuple[int, ...]:
    """Blocks of the near field, relative to the query's own."""
    if blocks == 1:
        return (0,)
    return (-1, 0) if causal else (-1, 0, 1)


class FarColumns(NamedTuple):
    """The far field of each query block; one column a listed group, which stands for ``rank`` summaries."""

    level: torch.Tensor  # (columns,) level of each column
    width: torch.Tensor  # (columns,) tokens in a group of that level
    first: torch.Tensor  # (blocks, columns) first token of each group; meaningless where hidden
    row: torch.Tensor  # (blocks, columns) number of each group when the groups of all levels are listed one after another
    hidden: torch.Tensor  # (blocks, columns) bool: the group does not exist, or a finer level covers it


def far_columns(n: int, block_size: int, levels: int, causal: bool, first_block: int = 0, device=None) -> FarColumns:
    """Interaction lists of the blocks ``first_block, ..., ceil(n / block_size) - 1``, ``levels`` levels side by side."""
    blocks = -(-n // block_size)
    numbers = range(1, levels + 1)
    groups = [group_count(n, block_size, level) for level in numbers]
    lists = [
        (level, groups[level - 1], sum(groups[: level - 1]), side, child)
        for level in numbers
        for side in ((-1,) if causal else (-1, 1))
        for child in (0, 1)
    ]
    level, count, start, side, child = torch.tensor(lists, dtype=torch.long, device=device).reshape(-1, 5).unbind(1)
    own = torch.arange(first_block, blocks, device=device)[:, None] >> (level - 1)
    group = 2 * (own // 2 + side) + child
    hidden = (group < 0) | (group >= count) | ((group - own).abs() < 2)
    width = block_size << (level - 1)
    return FarColumns(level, width, group * width, start + group.clamp(min=0).minimum(count - 1), hidden)


class Alignment(NamedTuple):
    """Where each token of a padded or packed row lies in the grid of blocks.

    Every document (all real tokens of a row, or one segment of a packed row) starts at a slot that is a multiple of all the
    group widths it needs, so that the grid's groups are the document's own.
    """

    index: torch.Tensor  # type: ignore[assignment]  # (batch, slots) token of each slot, 0 where empty
    slot: torch.Tensor  # (batch, n) slot of each token, 0 where padding
    valid: torch.Tensor  # (batch, n) bool, the real tokens
    document: torch.Tensor  # (batch, slots) number of the document in its row, -1 where empty
    first: torch.Tensor  # (batch, blocks) first slot of the stretch that belongs to the document of each block
    last: torch.Tensor  # (batch, blocks) one past that stretch


def real_tokens(attention_mask: torch.Tensor, new: int | None = None) -> torch.Tensor:
    """A mask ``(batch, n)`` as bool. Raises ValueError for numbers other than 0 and 1, documents say, among the last ``new`` columns."""
    if attention_mask.dtype == torch.bool:
        return attention_mask
    if not torch.compiler.is_compiling():
        looked_at = attention_mask if new is None else attention_mask[:, attention_mask.shape[1] - new :]
        wrong = looked_at[(looked_at != 0) & (looked_at != 1)]
        if len(wrong):
            raise ValueError(
                f"attention_mask holds {wrong[0].item()}, but must be 1 for real tokens and 0 for padding: documents of packed rows are "
                "told apart by position_ids that start anew with each, or by segment_ids of the functions"
            )
    return attention_mask.bool()


def check_rows(attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None) -> None:
    """Raises ValueError where padding stands inside a row, or the tokens of a segment do not stand together."""
    if attention_mask is not None:
        mask = attention_mask.bool()
        starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
        rows = (starts > 1).nonzero()
        if len(rows):
            raise ValueError(
                f"attention_mask has a hole in row {rows[0].item()}: padding must lie at the ends of a row; move it to one side. (Behind a "
                "prefix, as PEFT puts it before rows, that is the right side. generate takes pad tokens of a prompt for padding, unless it "
                "is given attention_mask=torch.ones_like(input_ids), or pad_token_id=eos_token_id where another model assists)"
            )
    if segment_ids is not None:
        for row, ids in enumerate(segment_ids):
            runs = torch.unique_consecutive(ids if attention_mask is None else ids[mask[row]])
            if len(runs) != len(torch.unique(runs)):
                raise ValueError(f"segment_ids of row {row} return to an earlier segment: the tokens of a segment must be contiguous")


def align_rows(attention_mask: torch.Tensor | None, segment_ids: torch.Tensor | None, block_size: int) -> Alignment:
    """Grid of a padded or packed batch; either argument may be None, ``(batch, n)`` otherwise.

    A document of more than ``block_size`` tokens takes a stretch of ``block_size`` times a power of two, longest first, which
    aligns all of them; shorter ones follow without a gap, since the near field covers them anywhere. The grid of a packed row
    has at most ``2 * n`` slots, rounded up to a block; under ``torch.compile`` exactly as many, so that its shape does not
    depend on the data.
    """
    given = attention_mask if segment_ids is None else segment_ids
    batch, n = given.shape
    device = given.device
    valid = torch.ones_like(given, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    starts = valid.clone()
    if segment_ids is None:
        starts[:, 1:] &= ~valid[:, :-1]
    else:
        starts[:, 1:] &= ~valid[:, :-1] | (segment_ids[:, 1:] != segment_ids[:, :-1])
    document = (starts.long().cumsum(1) - 1).clamp(min=0)
    token = torch.arange(n, device=device).expand(batch, n)
    length = torch.zeros(batch, n, dtype=torch.long, device=device).scatter_add_(1, document, valid.long())
    begin = torch.zeros_like(length).scatter_add_(1, document, token * starts)

    blocks = (length + block_size - 1) // block_size
    stretch = torch.where(blocks > 1, block_size * (2 ** torch.log2(blocks.clamp(min=1).double()).ceil()).long(), length)
    order = stretch.argsort(dim=1, descending=True, stable=True)
    ordered = stretch.gather(1, order)
    origin = torch.zeros_like(stretch).scatter_(1, order, ordered.cumsum(1) - ordered)
    slot = (origin.gather(1, document) + token - begin.gather(1, document)) * valid

    if torch.compiler.is_compiling():
        slots = n if segment_ids is None else 2 * n
    else:
        slots = max(1, int((slot * valid).max()) + 1)
    slots = -(-slots // block_size) * block_size
    # Padding is written to one slot past the grid and cut off.
    target = torch.where(valid, slot, slots)
    index = torch.zeros(batch, slots + 1, dtype=torch.long, device=device).scatter_(1, target, token)[:, :slots]
    owner = torch.full((batch, slots + 1), -1, dtype=torch.long, device=device).scatter_(1, target, document)[:, :slots]
    of_block = owner[:, ::block_size].clamp(min=0)
    first = origin.gather(1, of_block)
    return Alignment(index, slot, valid, owner, first, first + stretch.gather(1, of_block))

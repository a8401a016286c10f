"""A generation state by itself, without a model: random tokens that come in pieces, and what the reference says of them."""

import json
from typing import NamedTuple

import torch

from hf_multipole.modeling.calls import Call
from hf_multipole.modeling.hierarchy import level_count
from hf_multipole.modeling.multipole_state import MultipoleState, NewTokens
from hf_multipole.modeling.options import MultipoleOptions
from hf_multipole.modeling.shared_query_state import LinearState
from hf_multipole.modeling.state_slots import Layout
from hf_multipole.modeling.summaries import DirectSummary, HierarchicalSummary, MeanSummary
from hf_multipole.reference import multipole_attention_reference

BLOCK, RANK, DIM, WIDTH = 4, 2, 4, 3
SPARE = 2  # blocks that can be taken back


class Text(NamedTuple):
    """Tokens of rows that begin behind ``left`` columns of padding, in float64, and how they are read."""

    q: torch.Tensor  # (batch, heads, n, DIM)
    k: torch.Tensor  # (batch, kv_heads, n, DIM)
    v: torch.Tensor
    far_keys: torch.Tensor | None  # keys without positions, where summaries are rotated
    log_masses: torch.Tensor | None
    left: list[int]
    call: Call

    def rows(self, index: torch.Tensor) -> "Text":
        chosen = [None if x is None else x[index] for x in self[:5]]
        return Text(*chosen, [self.left[i] for i in index.tolist()], self.call)


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A rotary embedding: one angle for each half of the channels."""
    a, b = x.chunk(2, -1)
    angle = positions.to(x.dtype)[..., None] * torch.tensor([0.4, 0.05], dtype=x.dtype)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def text(
    n, left, *, kind="mean", heads=4, kv_heads=2, rotated=False, salient=False, bias=False, seed=0, max_levels=None, **options
) -> Text:
    """``softcap`` and the fields of MultipoleOptions among ``options``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch = len(left)
    q, k, v = normal(batch, heads, n, DIM), normal(batch, kv_heads, n, DIM), normal(batch, kv_heads, n, WIDTH)
    summaries = []
    for width in (DIM, WIDTH):
        made = {"mean": MeanSummary, "hierarchical": HierarchicalSummary, "direct": DirectSummary}[kind](
            BLOCK, RANK, *(() if kind == "mean" else (kv_heads, width)), *((max(n, 2 * BLOCK + 1),) if kind == "direct" else ())
        ).double()
        for weight in made.parameters():
            weight.requires_grad_(False).add_(0.3 * normal(*weight.shape))
        summaries.append(made)
    place = torch.arange(n) - torch.tensor(left)[:, None]
    far_keys, k = (k, turned(k, place[:, None])) if rotated else (None, k)
    softcap = options.pop("softcap", None)
    call = Call(
        MultipoleOptions(block_size=BLOCK, rank=RANK, **{"sink_tokens": 0} | options),
        *summaries,
        far_bias=normal(heads, 2) if bias else None,
        max_levels=max_levels,
        softcap=softcap,
    )
    return Text(q, k, v, far_keys, normal(batch, kv_heads, n) if salient else None, left, call)


def expected(given: Text) -> torch.Tensor:
    """The attention of all tokens, by the reference."""
    call, n = given.call, given.q.shape[2]

    def rotate(summary, first, width):
        # Groups that are not full are never seen.
        return turned(summary, first + (torch.arange(RANK, dtype=torch.float64) + 0.5) * (width / RANK) - 0.5)

    return multipole_attention_reference(
        given.q,
        given.k,
        given.v,
        block_size=BLOCK,
        rank=RANK,
        key_summary=call.key_summary,
        value_summary=call.value_summary,
        far_keys=given.far_keys,
        log_masses=given.log_masses,
        sink_tokens=call.options.sinks(causal=True),
        attention_mask=torch.arange(n) >= torch.tensor(given.left)[:, None],
        size_weighting=call.options.size_weighting,
        far_bias=call.far_bias,
        max_levels=call.max_levels,
        softcap=call.softcap,
        downsample_queries=call.options.downsample_queries,
        rotate_summary=None if given.far_keys is None else rotate,
    )


def begin(given: Text) -> MultipoleState:
    call, n, direct = given.call, given.q.shape[2], isinstance(given.call.key_summary, DirectSummary)
    rotated = given.far_keys is not None
    keys = torch.cat([given.k, given.far_keys], -1) if rotated else given.k
    layout = Layout(BLOCK, RANK, SPARE, call.options.sinks(causal=True))
    levels = level_count(max(n, 2 * BLOCK + 1), BLOCK) if direct else 1 if call.max_levels is None else call.max_levels
    how = {"direct": direct, "rotated": rotated, "max_levels": call.max_levels, "salient": given.log_masses is not None}
    return (LinearState if call.options.downsample_queries else MultipoleState)(given.q, keys, given.v, layout, levels, **how)


def read(state: MultipoleState, given: Text, start: int, stop: int) -> torch.Tensor:
    """Attention of the columns from ``start`` to ``stop``."""
    part = slice(start, stop)
    new = [NewTokens(min(max(left - start, 0), stop - start), max(0, stop - max(start, left)), max(0, start - left)) for left in given.left]
    new = [x if x.count else NewTokens(0, 0) for x in new]
    keys = given.k if given.far_keys is None else torch.cat([given.k, given.far_keys], -1)
    masses = None if given.log_masses is None else given.log_masses[:, :, part]
    call = given.call._replace(log_masses=masses)
    return state.attend(given.q[:, :, part], keys[:, :, part], given.v[:, :, part], new, call, None if given.far_keys is None else turned)


def saved(state: MultipoleState, without: tuple[str, ...] = ()) -> MultipoleState:
    """The state through its description and its tensors."""
    description = {name: x for name, x in json.loads(json.dumps(state.description())).items() if name not in without}
    return type(state).restored(description, {name: x.clone() for name, x in state.tensors().items()})

"""Group summaries: what a query sees of a far group in place of its tokens (arXiv 2310.11960, section 3).

A summary module maps tokens ``(batch, heads, n, dim)`` in the grid of hierarchy.py (``n`` a multiple of ``block_size``;
zeros where ``validity`` ``(batch or 1, n)`` bool, or None for all, does not mark a real one) to one tensor of summaries
``(batch, heads, groups, rank, dim)`` for each of ``levels`` levels. The learned kinds have weights for each head, rank and
channel, and start exactly at the mean: summary r of a group is the mean of the r-th of ``rank`` equal contiguous segments.

Groups that are not full are divided by their mass, the share of their absolute weight that lies on valid tokens;
``counts`` says for how many tokens each summary stands: the mean mass times the width of a segment.

Tokens may have masses of their own (0 for those that are in no summary), as bodies in a tree code: they are weighed by them, and a
summary is divided, and its mass multiplied, by its mean token mass, which is weighted by the shares of all channels together. Masses of
1 change nothing. They add up the tree: two children are merged by theirs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .hierarchy import level_count

# Of this copy of the file: to define an operator again, when the code of a checkpoint is loaded too, breaks the first one.
_NAMESPACE = __name__.replace(".", "_")


def _phases(width: int) -> int:
    # Tokens handled in one vectorised step; eight keep the accumulator within the cache and the inner loop long.
    return math.gcd(width, 8)


@torch.library.custom_op(_NAMESPACE + "::depthwise_map", mutates_args=())
def depthwise_map(x: torch.Tensor, weight: torch.Tensor, masses: torch.Tensor | None) -> torch.Tensor:
    """``out[b, h, g, r, c] = sum_t weight[h, r, t, c] * masses[b, h, g, t] * x[b, h, g, t, c]``, reading x once.

    x: ``(batch, heads, groups, width, dim)``; weight: ``(heads, rank, width, dim)``; masses, in the compute dtype: ``(batch, heads,
    groups, width)``, None for 1; out, in the compute dtype: ``(batch, heads, groups, rank, dim)``.
    """
    batch, heads, groups, width, dim = x.shape
    rank, u = weight.shape[1], _phases(width)
    weight = weight.to(torch.promote_types(x.dtype, torch.float32)).reshape(heads, 1, rank, width // u, u * dim)
    out = weight.new_empty(batch, heads, groups, rank, dim)
    # A few groups at a time, so that the sums stay in the cache.
    together = max(1, min(groups, 2**17 // (heads * rank * u * dim)))
    sums = weight.new_empty(heads, together, rank, u * dim)
    for b in range(batch):
        for start in range(0, groups, together):
            part = x[b, :, start : start + together]
            if masses is not None:
                part = part * masses[b, :, start : start + together, :, None]
            part = part.reshape(heads, -1, width // u, 1, u * dim)
            total = sums[:, : part.shape[1]].zero_()
            for step in range(width // u):
                total.addcmul_(part[:, :, step], weight[:, :, :, step])
            torch.sum(total.unflatten(3, (u, dim)), 3, out=out[b, :, start : start + together])
    return out


@torch.library.custom_op(_NAMESPACE + "::depthwise_map_backward_", mutates_args=("grad_x",))
def depthwise_map_backward_(
    grad_x: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, masses: torch.Tensor | None, of_masses: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the gradient of x to ``grad_x`` (x's shape) and returns the weight's and, if ``of_masses``, that of the masses; ``grad`` is the
    summaries'.
    """
    batch, heads, groups, width, dim = x.shape
    rank = weight.shape[1]
    cast = weight.to(grad.dtype)
    # A few groups at a time, so that tokens and sums stay in the cache.
    together = max(1, min(groups, 2**18 // (heads * width * dim)))
    total = grad.new_zeros(heads, min(groups, max(1, 2**20 // weight.numel())), rank, width, dim)
    grad_masses = grad.new_empty(masses.shape if of_masses else 0)
    for b in range(batch):
        for start in range(0, groups, together):
            part = slice(start, start + together)
            # In low precision the sum is rounded once.
            apart = grad_x.dtype != grad.dtype or masses is not None
            out = torch.zeros_like(grad_x[b, :, part], dtype=grad.dtype) if apart else grad_x[b, :, part]
            for r in range(rank):
                out.addcmul_(grad[b, :, part, r, None], cast[:, None, r])
            if of_masses:
                torch.sum(out * x[b, :, part], -1, out=grad_masses[b, :, part])
            if masses is not None:
                grad_x[b, :, part].addcmul_(out, masses[b, :, part, :, None])
            elif apart:
                grad_x[b, :, part] += out
        for start in range(0, groups, total.shape[1]):
            part = slice(start, start + total.shape[1])
            tokens = x[b, :, part] if masses is None else x[b, :, part] * masses[b, :, part, :, None]
            upper = grad[b, :, part, :, None]
            total[:, : upper.shape[1]].addcmul_(tokens[:, :, None], upper)
    return total.sum(1).to(weight.dtype), grad_masses


@depthwise_map.register_fake
def _(x, weight, masses):
    return x.new_empty(*x.shape[:3], weight.shape[1], x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))


@depthwise_map_backward_.register_fake
def _(grad_x, grad, x, weight, masses, of_masses):
    return torch.empty_like(weight, memory_format=torch.contiguous_format), grad.new_empty(masses.shape if of_masses else 0)


def _operators(kernels: bool):
    """The map and its backward pass, by PyTorch or by the GPU kernels."""
    if not kernels:
        return depthwise_map, depthwise_map_backward_
    from .summaries_triton import depthwise_map as forward
    from .summaries_triton import depthwise_map_backward_ as backward

    return forward, backward


class _Map(torch.autograd.Function):
    """Groups of tokens mapped to summaries, by weights or (None) to their mean; also returns the tokens.

    Whoever goes on with the returned tokens has their gradient completed in place: tensors of the size of the keys cost more to
    make than to fill.
    """

    @staticmethod
    def forward(ctx, tokens, width, weight, masses, kernels):
        groups = tokens.unflatten(2, (-1, width))
        ctx.width, ctx.kernels = width, kernels
        ctx.save_for_backward(None if weight is None and masses is None else tokens, weight, masses)
        return tokens.view_as(tokens), _mapped(groups, weight, _by_group(masses, groups), kernels)

    @staticmethod
    def backward(ctx, grad, upper):
        tokens, weight, masses = ctx.saved_tensors  # asked for once: checkpointing hands them out once
        of_groups = grad.unflatten(2, (-1, ctx.width))
        if tokens is None:
            of_groups.add_((upper / ctx.width).unsqueeze(3))
            return grad, None, None, None, None
        groups, upper = tokens.unflatten(2, (-1, ctx.width)), upper.contiguous()
        every, of_masses = _by_group(masses, groups), ctx.needs_input_grad[3]
        if weight is None:
            upper = (upper / ctx.width).unsqueeze(3)
            of_groups.addcmul_(upper, every[..., None])
            grad_weight, grad_masses = None, (upper * groups).sum(-1) if of_masses else None
        else:
            grad_weight, grad_masses = _operators(ctx.kernels)[1](of_groups, upper, groups, weight, every, of_masses)
        grad_masses = grad_masses.flatten(2).sum_to_size(masses.shape) if of_masses else None
        return grad, None, grad_weight, grad_masses, None


def _mapped(groups: torch.Tensor, weight: torch.Tensor | None, masses: torch.Tensor | None, kernels: bool) -> torch.Tensor:
    if weight is not None:
        return _operators(kernels)[0](groups, weight, masses)
    return (groups if masses is None else groups * masses[..., None]).mean(3, dtype=torch.promote_types(groups.dtype, torch.float32))


def _by_group(masses: torch.Tensor | None, groups: torch.Tensor) -> torch.Tensor | None:
    """Masses ``(batch or 1, heads or 1, n)`` as ``(batch, heads, groups, width)``."""
    return None if masses is None else masses.unflatten(2, (-1, groups.shape[3])).expand(*groups.shape[:2], -1, -1)


def _map(
    tokens: torch.Tensor, width: int, weight: torch.Tensor | None, kernels: bool = False, masses: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(batch, heads, n, dim)`` to the same tokens and ``(batch, heads, groups, rank, dim)``, or ``(batch, heads, groups, dim)``
    means; the last group is filled up with zeros. masses: of the tokens, ``(batch or 1, heads or 1, n)``.
    """
    if tokens.shape[2] % width == 0:
        return _Map.apply(tokens, width, weight, masses, kernels)
    if masses is not None:
        masses = nn.functional.pad(masses, (0, -masses.shape[2] % width))
    return tokens, _Map.apply(_groups(tokens, width).flatten(2, 3), width, weight, masses, kernels)[1]


def _groups(x: torch.Tensor, width: int) -> torch.Tensor:
    """``(batch, heads, n, dim)`` to ``(batch, heads, groups, width, dim)``, zeros after the end."""
    missing = -x.shape[2] % width
    if missing:
        x = nn.functional.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, width))


# What summaries are made with: the weights as they are, or


def _share(weight: torch.Tensor) -> torch.Tensor:
    """Absolute weights as shares of their sum over the tokens (uniform where all are 0)."""
    size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
    total = size.sum(2, keepdim=True)
    return torch.where(total > 0, size / total.clamp(min=torch.finfo(size.dtype).tiny), 1 / weight.shape[2])


def even_share(weight: torch.Tensor) -> torch.Tensor:
    """These shares for all channels at once, ``(heads, rank, width, 1)``."""
    return _share(weight).mean(3, keepdim=True)


def _mean_weight(rank: int, width: int, **like) -> torch.Tensor:
    """``(rank, width)``: row r takes the mean of the r-th of ``rank`` equal segments."""
    segment = torch.arange(width, device=like.get("device")) // (width // rank)
    return (segment == torch.arange(rank, device=like.get("device"))[:, None]).to(**like) * (rank / width)


class Field(NamedTuple):
    """The summaries of the keys and values of rows."""

    keys: list[torch.Tensor]  # (batch, kv_heads, groups, rank, dim) a level
    values: list[torch.Tensor]
    counts: list[torch.Tensor] | None  # tokens that each stands for, (batch, kv_heads or 1, groups, rank) a level; None: all groups full

    def side_by_side(self) -> list[torch.Tensor | None]:
        """Keys, values and counts of all levels: ``(batch, heads, summaries, ...)``."""
        return [None if levels is None else torch.cat([x.flatten(2, 3) for x in levels], 2) for levels in self]


class Past(NamedTuple):
    """What came before the tokens, when a row is summarised piece by piece."""

    block: int  # number of blocks before
    held: list[torch.Tensor]  # what the open groups hold: finished children, a level; of direct summaries: sums, a level
    masses: list[torch.Tensor] | None = None  # where tokens have masses: those of the children (batch, heads, groups, rank); or their sums
    shares: Callable = even_share  # of weights, to weigh masses by


class Grown(NamedTuple):
    """What tokens bring that come after others."""

    groups: list[torch.Tensor]  # the groups of each level that they finish, (batch, heads, groups, rank, dim)
    sums: list[torch.Tensor]  # of direct summaries: what the open groups hold then
    masses: list[torch.Tensor] | None = None  # mean token masses of the groups, (batch, heads, groups, rank), where tokens have masses
    mass_sums: list[torch.Tensor] | None = None


class MeanSummary(nn.Module):
    """Segment means: no parameters, any length."""

    def __init__(self, block_size: int, rank: int):
        super().__init__()
        self.block_size, self.rank = block_size, rank

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, rank={self.rank}"

    def extend(self, max_length: int) -> None:
        """For longer rows of training."""

    # weigh: what is made of the weights first; None for nothing. masses: of the tokens, (batch or 1, heads or 1, n), or None for 1.

    def _first(self, tokens: torch.Tensor, weigh: Callable | None, kernels: bool = False, masses=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens, and their summaries of level 1."""
        tokens, means = _map(tokens, self.block_size // self.rank, None, kernels, masses)
        return tokens, _groups(means, self.rank)

    def _first_masses(self, masses: torch.Tensor, weigh: Callable) -> torch.Tensor:
        """:meth:`_first` for masses ``(batch, heads, n, 1)`` of a few blocks, as a decoding step has them."""
        return self._first(masses, weigh)[1]

    def _merge(self, children: torch.Tensor, weigh: Callable | None, kernels: bool = False) -> torch.Tensor:
        """Summaries ``(batch, heads, groups, 2 * rank, dim)`` of pairs of groups to those of their parents."""
        return children.unflatten(3, (self.rank, 2)).mean(4)

    def _maps(self, tokens, levels: int, weigh: Callable | None, kernels: bool, masses=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The tokens, and the linear maps of all levels, not yet divided by the mass; of shares: the masses."""
        tokens, summaries = self._first(tokens, weigh, kernels, masses)
        out = [summaries]
        for _ in range(2, levels + 1):
            out.append(self._merge(_groups(out[-1].flatten(2, 3), 2 * self.rank), weigh, kernels))
        return tokens, out

    def _extend(self, tokens, levels: int, past: Past, weigh: Callable | None, kernels: bool, masses=None):
        """The groups of each level that ``tokens``, whole blocks or None, finish, and what the open groups hold then."""
        if tokens is None:
            new = past.held[0][:, :, :0]
        else:
            new = self._first(tokens, None, kernels, masses)[1] if weigh is None else self._first_masses(tokens, weigh)
        out = [new]
        for held in past.held[: levels - 1]:
            children = torch.cat([held.to(new.dtype), new], 2)
            pairs = children[:, :, : children.shape[2] // 2 * 2]
            new = self._merge(pairs.unflatten(2, (-1, 2)).flatten(3, 4), weigh, kernels)
            out.append(new)
        return out, []

    def masses(self, validity: torch.Tensor, levels: int, dim: int, dtype: torch.dtype, kernels: bool = False) -> list[torch.Tensor]:
        """Mass of every summary, ``(batch, heads or 1, groups, rank, dim or 1)`` a level, from 0 (no valid token) to 1."""
        heads, channels = self._mass_shape(dim)
        valid = validity[:, None, :, None].to(dtype).expand(-1, heads, -1, channels)
        return self._maps(valid, levels, _share, kernels)[1]

    def _mass_shape(self, dim: int) -> tuple[int, int]:
        return 1, 1

    def _even(self, masses: torch.Tensor, levels: int, kernels: bool) -> list[torch.Tensor]:
        """Masses of tokens ``(batch, heads or 1, n)``, summed by shares of all channels: ``(batch, heads, groups, rank)`` a level."""
        heads = max(masses.shape[1], self._mass_shape(1)[0])
        found = self._maps(masses.expand(-1, heads, -1)[..., None], levels, even_share, kernels)[1]
        return [x.squeeze(-1) for x in found]

    def _mean_masses(self, masses: torch.Tensor, validity: torch.Tensor | None, levels: int, kernels: bool) -> list[torch.Tensor]:
        """Mean mass of the real tokens of each summary, ``(batch, heads or 1, groups, rank)`` a level; 0 where there are none."""
        real = self._whole(masses, levels, kernels) if validity is None else self._even(validity[:, None].to(masses.dtype), levels, kernels)
        return [_ratio(x, of) for x, of in zip(self._even(masses, levels, kernels), real)]

    def _whole(self, like: torch.Tensor, levels: int, kernels: bool = False) -> list[torch.Tensor]:
        """What masses of 1 sum up to in a full group of each level, ``(1, heads or 1, 1, rank)``: 1, but for rounding."""
        ones = like.new_ones(1, 1, self.block_size << (levels - 1))
        return [x[:, :, :1] for x in self._even(ones, levels, kernels)]

    def _counts(self, masses: list[torch.Tensor]) -> list[torch.Tensor]:
        segment = self.block_size // self.rank
        return [mass.mean(-1) * (segment << level) for level, mass in enumerate(masses)]

    def counts(self, validity: torch.Tensor, levels: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Tokens that each summary stands for, ``(batch, heads or 1, groups, rank)`` a level."""
        return self._counts(self.masses(validity, levels, dim, dtype))

    def forward(
        self,
        tokens: torch.Tensor,
        validity: torch.Tensor | None,
        levels: int,
        everything: bool = False,
        past: Past | None = None,
        kernels: bool = False,
        token_masses: torch.Tensor | None = None,
    ):
        """The summaries. With ``everything``: the tokens for further use, which makes the backward pass cheaper, the summaries,
        and their counts (None where all groups are full). With ``kernels`` the GPU kernels compute them. token_masses: ``(batch or 1,
        heads or 1, n)``, 0 where there is no token, or None for 1 each. With ``past``: the summaries of the groups that these tokens,
        whole blocks or None, finish, as :class:`Grown`.
        """
        if past is not None:
            return self._grow(tokens, levels, past, kernels, token_masses)
        tokens, summaries = self._maps(tokens, levels, None, kernels, token_masses)
        wide, masses, counts = torch.promote_types(tokens.dtype, torch.float32), None, None
        if validity is not None:
            masses = self.masses(validity, levels, tokens.shape[-1], wide, kernels)
        if token_masses is not None:
            means = [x[..., None] for x in self._mean_masses(token_masses, validity, levels, kernels)]
            masses = means if masses is None else [x * mean for x, mean in zip(masses, means)]
        if masses is not None:
            summaries = [_ratio(summary, mass) for summary, mass in zip(summaries, masses)]
            counts = self._counts(masses)
        return (tokens, summaries, counts) if everything else summaries

    def _grow(self, tokens, levels: int, past: Past, kernels: bool, token_masses: torch.Tensor | None) -> Grown:
        if past.masses is None:
            return Grown(*self._extend(tokens, levels, past, None, kernels, token_masses))
        weights = None if token_masses is None else token_masses[..., None]
        held = past.held if self.keeps_sums else [x * mass[..., None] for x, mass in zip(past.held, past.masses)]
        found, sums = self._extend(tokens, levels, Past(past.block, held), None, kernels, token_masses)
        # Finished groups are full, and the shares of their tokens add up to 1.
        masses, mass_sums = self._extend(weights, levels, Past(past.block, [x[..., None] for x in past.masses]), past.shares, kernels)
        groups = [_ratio(x, mass) for x, mass in zip(found, masses)]
        return Grown(groups, sums, [x.squeeze(-1) for x in masses], [x.squeeze(-1) for x in mass_sums])

    keeps_sums = False  # whether open groups are sums of their tokens, in place of finished children


def _ratio(x: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """x divided by a mass; 0 where that is 0."""
    return torch.where(mass > 0, x / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0)


class _LearnedSummary(MeanSummary):
    def __init__(self, block_size: int, rank: int, heads: int, dim: int):
        super().__init__(block_size, rank)
        self.heads, self.dim = heads, dim

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}, dim={self.dim}"

    def _mass_shape(self, dim: int) -> tuple[int, int]:
        return self.heads, self.dim

    @staticmethod
    def start(weight: torch.Tensor) -> torch.Tensor:
        """The mean, as weights shaped like ``weight`` ``(heads, rank, width, dim)``."""
        _, rank, width, _ = weight.shape
        return _mean_weight(rank, width, dtype=weight.dtype, device=weight.device)[None, :, :, None].expand_as(weight)


class HierarchicalSummary(_LearnedSummary):
    """Level 1 maps ``block_size`` tokens to ``rank`` summaries; every further level merges the ``2 * rank`` summaries of two
    children with one map shared by all levels (the multipole-to-multipole step). Any length, O(n) in all.
    """

    def __init__(self, block_size: int, rank: int, heads: int, dim: int):
        super().__init__(block_size, rank, heads, dim)
        self.tokens = nn.Parameter(torch.empty(heads, rank, block_size, dim))
        self.merge = nn.Parameter(torch.empty(heads, rank, 2 * rank, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.tokens.copy_(self.start(self.tokens))
        self.merge.copy_(self.start(self.merge))

    def _first(self, tokens, weigh, kernels=False, masses=None):
        return _map(tokens, self.block_size, weigh(self.tokens) if weigh else self.tokens, kernels, masses)

    def _first_masses(self, masses, weigh):
        tokens = masses.squeeze(-1).unflatten(2, (-1, 1, self.block_size))
        return (tokens * weigh(self.tokens).squeeze(-1)[:, None]).sum(-1, keepdim=True)

    def _merge(self, children, weigh, kernels=False):
        weight = weigh(self.merge) if weigh else self.merge
        if kernels:
            return _map(children.flatten(2, 3), 2 * self.rank, weight, True)[1]
        return (children[:, :, :, None] * weight[:, None]).sum(4)


class DirectSummary(_LearnedSummary):
    """Each level maps its own ``w_l`` tokens to ``rank`` summaries, as in the paper: parameters in proportion to the length,
    which is at most ``max_length`` tokens.
    """

    def __init__(self, block_size: int, rank: int, heads: int, dim: int, max_length: int):
        super().__init__(block_size, rank, heads, dim)
        self.max_length = max_length
        # Parameters of the module itself: what loads weights when a module runs (offloading) does not see those of a list.
        for level in range(level_count(max_length, block_size)):
            self.register_parameter(f"level_{level + 1}", nn.Parameter(torch.empty(heads, rank, block_size << level, dim)))
        self.reset_parameters()

    @property
    def levels(self) -> list[nn.Parameter]:
        """Weights of each level, ``(heads, rank, width, dim)``."""
        return [getattr(self, f"level_{level + 1}") for level in range(level_count(self.max_length, self.block_size))]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_length={self.max_length}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight in self.levels:
            weight.copy_(self.start(weight))

    def extend(self, max_length):
        raise ValueError(f"direct summaries have weights for {self.max_length} tokens: only 'hierarchical' or 'mean' can be extended")

    def check_levels(self, levels: int) -> None:
        if levels > len(self.levels):
            raise ValueError(
                f"direct summaries were built for at most {self.max_length} tokens and have {len(self.levels)} levels, "
                f"but this row needs {levels}; use summary='hierarchical', which has no such limit"
            )

    def _maps(self, tokens, levels, weigh, kernels, masses=None):
        self.check_levels(levels)
        out = []
        for weight in self.levels[:levels]:
            tokens, summaries = _map(tokens, weight.shape[2], weigh(weight) if weigh else weight, kernels, masses)
            out.append(summaries)
        return tokens, out

    keeps_sums = True

    def _extend(self, tokens, levels, past, weigh, kernels, masses=None):
        out, sums = [], []
        for level, weight in enumerate(self.levels[:levels]):
            weight = weigh(weight) if weigh else weight
            span, phase = 1 << level, past.block % (1 << level)
            rest, total, groups, heavy = tokens, past.held[level], [], masses
            # The end of the open group, whole groups, the beginning of the next open one.
            while rest.shape[2]:
                blocks = rest.shape[2] // self.block_size
                if phase == 0 and blocks >= span:
                    taken = blocks // span * span
                    own = slice(taken * self.block_size)
                    groups.append(_map(rest[:, :, own], weight.shape[2], weight, kernels, _part(heavy, own))[1])
                else:
                    taken = min(span - phase, blocks)
                    own = slice(phase * self.block_size, (phase + taken) * self.block_size)
                    first = slice(taken * self.block_size)
                    part = _map(rest[:, :, first], first.stop, weight[:, :, own], kernels, _part(heavy, first))[1][:, :, 0]
                    total = part + total if phase else part
                    phase = (phase + taken) % span
                    if phase == 0:
                        groups.append(total[:, :, None])
                past_it = slice(taken * self.block_size, None)
                rest, heavy = rest[:, :, past_it], _part(heavy, past_it)
            out.append(torch.cat(groups, 2) if groups else tokens.new_zeros(*tokens.shape[:2], 0, self.rank, tokens.shape[-1]))
            sums.append(total)
        return out, sums


def _part(masses: torch.Tensor | None, tokens: slice) -> torch.Tensor | None:
    return None if masses is None else masses[:, :, tokens]

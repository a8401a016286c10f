"""One forward of a multipole model: what it is given, checked, with the positions, documents and masks that its layers need."""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMode
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)

from .attention_functions import seen
from .attention_masks import MultipoleMask, check_one_document
from .configuration_multipole import MultipoleConfig
from .hierarchy import level_count, real_tokens
from .kinds import BY_IMPLEMENTATION, layer_implementation
from .multipole_cache import check_cache, compiled_state, keeps_state
from .private import with_implementation
from .rotary import check_rotation, depends_on_length
from .summaries import MeanSummary


class ModelInputs(NamedTuple):
    """What the layers of a model share in one forward."""

    position_ids: torch.Tensor  # (batch or 1, queries)
    implementations: list[str]  # the attention function of each layer, by its name
    masks: dict[str, Any]  # of each of these
    past_key_values: Cache | None
    centres: list[torch.Tensor] | None  # positions of summaries that are rotated, as from summary_positions


def prepare(model, embeddings, attention_mask, position_ids, past_key_values, use_cache, output_attentions, bounds) -> ModelInputs:
    """The inputs of a forward of ``model``, a :class:`MultipoleModel`, which explains them; bounds: its ``cu_seq_lens_q``.

    Raises ValueError for what contradicts itself, the model or the cache, before any layer has run.
    """
    config, (batch, queries) = model.config, embeddings.shape[:2]
    if batch == 0 or queries == 0:
        raise ValueError(f"the input is empty: {batch} rows of {queries} tokens")
    if past_key_values is not None and not config.is_causal:
        raise ValueError(
            "past_key_values belong to causal models: in a bidirectional one (is_causal=False) new tokens change all the others; "
            "pass use_cache=False"
        )
    compiled = None if past_key_values is None else compiled_state(past_key_values)
    if compiled is not None:
        past, length = seen(compiled.number).to(embeddings.device), None
    else:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = past + queries
    attention_mask = _padding(attention_mask, batch, queries, length)
    _check_positions(position_ids, batch, queries)
    segment_ids = _segments(embeddings, attention_mask, position_ids, past_key_values, bounds)
    # Nothing could be generated from rows of training, packed ones, or both sides.
    if use_cache and past_key_values is None and not model.training and segment_ids is None and config.is_causal:
        past_key_values = DynamicCache(config=config)
    if position_ids is None:
        position_ids = _positions(embeddings, attention_mask, segment_ids, past)
    implementations = [layer_implementation(config, kind, output_attentions) for kind in config.layer_types]
    masks = _masks(config, implementations, _Tokens(embeddings, attention_mask, segment_ids, position_ids, past_key_values, length))
    multipole = masks.get("multipole", masks.get("multipole_linear"))
    if past_key_values is not None and compiled is None:
        mask = None if output_attentions else multipole
        if multipole is not None and config.rotate_summaries:
            _check_width(config, implementations, past_key_values)
        check_cache(past_key_values, model, embeddings, mask, masks.get("tensor"), attention_mask)
    if past_key_values is not None and depends_on_length(config):
        check_rotation(config, past_key_values, position_ids)
    centres = None
    if multipole is not None and config.rotate_summaries:
        layer = next(i for i, implementation in enumerate(implementations) if masks[implementation] is multipole)
        if past_key_values is None or not keeps_state(past_key_values, layer, output_attentions):
            centres = summary_positions(config, position_ids, multipole)
    return ModelInputs(position_ids, implementations, masks, past_key_values, centres)


def _check_width(config: MultipoleConfig, implementations: list[str], cache: Cache) -> None:
    """Raises ValueError where a cache that others have filled, PEFT say, lacks the keys without positions that are summarised."""
    for implementation, layer in zip(implementations, cache.layers):
        keys = getattr(layer, "keys", None)
        if implementation in ("multipole", "multipole_linear") and isinstance(keys, torch.Tensor) and keys.shape[-1] == config.head_dim:
            raise ValueError(
                "the cache holds keys as exact attention has them, but rotate_summaries=True needs those without positions beside them: a "
                "prefix of PEFT (prefix tuning) has none; use prompt tuning, or a model with rotate_summaries=False"
            )


def _segments(embeddings, attention_mask, position_ids, past_key_values, bounds) -> torch.Tensor | None:
    """``(batch, n)`` numbers of the documents of packed rows, or None."""
    batch, n = embeddings.shape[:2]
    if bounds is not None:
        if batch != 1 or past_key_values is not None:
            raise ValueError("cu_seq_lens_q describes a batch of one packed row without a cache; use position_ids for more rows")
        tokens = torch.arange(n, device=embeddings.device)
        return torch.searchsorted(bounds.to(tokens), tokens, right=True)[None]
    # Compiled code looks at no data: there, a mask says that rows are not packed.
    if position_ids is None or (attention_mask is not None and torch.compiler.is_compiling()):
        return None
    real = None if attention_mask is None else attention_mask[:, -n:]
    if past_key_values is not None:
        if n > 1 and not torch.compiler.is_compiling():
            check_one_document(position_ids, real)
        return None
    if real is None or bool(real.all()):
        return find_packed_sequence_indices(position_ids.expand(batch, -1))
    starts = (position_ids.diff(dim=1) != 1) & (real[:, 1:] & real[:, :-1]).to(position_ids.device)
    return nn.functional.pad(starts.cumsum(1), (1, 0)) if starts.any() else None


def _padding(attention_mask: torch.Tensor | None, batch: int, queries: int, length: int | None) -> torch.Tensor | None:
    """The mask ``(batch, n)`` of padding, bool; length: n, or None where a compiled step does not know it. What was checked when a cache
    took it in is not checked again.
    """
    if attention_mask is None:
        return None
    wrong = length is not None and attention_mask.shape != (batch, length)
    if attention_mask.is_floating_point() and not (wrong or torch.compiler.is_compiling()):
        # Ones in floating point, as PEFT puts them before a mask for its virtual tokens. Zeros alone may be an additive mask.
        real = attention_mask == 1
        if ((attention_mask == 0) | real).all() and real.any(1).all():
            return real
    if wrong or attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}, but must be "
            f"(batch, n) = {(batch, length)}, bool or 0 and 1: masks over pairs of tokens and additive masks are not supported"
        )
    # A compiled step hands it on as it is: what is computed from it would be compiled again for other strides.
    return attention_mask if length is None else real_tokens(attention_mask, queries)


def _check_positions(position_ids: torch.Tensor | None, batch: int, queries: int) -> None:
    """Raises ValueError for positions of a wrong shape or dtype."""
    if position_ids is None:
        return
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != queries:
        raise ValueError(
            f"position_ids have shape {tuple(position_ids.shape)}, but must be (batch, tokens) = {(batch, queries)}, or (1, {queries}) for "
            "all rows"
        )
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(f"position_ids have dtype {position_ids.dtype}, but must be integers")


def _positions(embeddings, attention_mask, segment_ids, past) -> torch.Tensor:
    """Positions of the tokens in their documents. Summaries of rotated keys are not a matter of distances only, since their
    weights differ from channel to channel: counted otherwise, padding and the documents before would change the result.
    """
    queries = embeddings.shape[1]
    tokens = past + torch.arange(queries, device=embeddings.device)[None]
    if segment_ids is not None:
        return tokens - torch.where(segment_ids == segment_ids.roll(1, 1), 0, tokens).cummax(1).values
    if attention_mask is not None:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -queries:].to(tokens.device)
    return tokens


class _Tokens(NamedTuple):
    """What masks are made of."""

    embeddings: torch.Tensor
    attention_mask: torch.Tensor | None
    segment_ids: torch.Tensor | None
    position_ids: torch.Tensor
    past_key_values: Cache | None
    length: int | None


def _masks(config: MultipoleConfig, implementations: list[str], tokens: _Tokens) -> dict[str, Any]:
    """The masks of all attention functions; those with one mask function share the mask."""
    masks, made = {}, {}
    for name in implementations:
        maker = BY_IMPLEMENTATION[name].mask if name in BY_IMPLEMENTATION else name
        if maker not in made:
            made[maker] = _mask(config, name, tokens)
        masks[name] = made[maker]
    return masks


def _mask(config: MultipoleConfig, implementation: str, tokens: _Tokens) -> object:
    """The mask of one attention function; Transformers' own for the exact ones."""
    batch, queries = tokens.embeddings.shape[:2]
    causal, length = config.is_causal, tokens.length
    if length is None and implementation in ("multipole", "multipole_linear"):
        return MultipoleMask(True, batch, queries, None, config.block_size, tokens.attention_mask, None, tokens.position_ids)
    if implementation in BY_IMPLEMENTATION:
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=batch,
            q_length=queries,
            kv_length=length,
            q_offset=length - queries,
            mask_function=causal_mask_function if causal else bidirectional_mask_function,
            attention_mask=tokens.attention_mask,
            segment_ids=tokens.segment_ids,
            position_ids=tokens.position_ids,
            config=config,
        )
    config = with_implementation(config, implementation)
    create = create_causal_mask if causal else create_bidirectional_mask
    packed = {} if tokens.segment_ids is None else {"and_mask_function": packed_sequence_mask_function(tokens.segment_ids)}
    return create(config, tokens.embeddings, tokens.attention_mask, past_key_values=tokens.past_key_values, **packed)


def last_tokens(x: torch.Tensor, attention_mask, input_ids, pad_token_id: int | None) -> torch.Tensor:
    """Of each row of x ``(batch, n, ...)``, the number of its last real token in x, ``(batch,)``.

    Raises ValueError where nothing tells rows of input_ids from their padding.
    """
    batch, n = x.shape[:2]
    if attention_mask is not None:
        real = attention_mask[:, -n:] > 0
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    elif input_ids is not None and batch > 1:
        raise ValueError(f"{batch} rows without attention_mask or config.pad_token_id do not tell where they end; give one of the two")
    else:
        real = torch.ones(batch, n)
    return (torch.arange(n, device=x.device) * real.to(x.device)).argmax(1)


def summary_positions(config: MultipoleConfig, position_ids: torch.Tensor, mask: MultipoleMask) -> list[torch.Tensor]:
    """The position of the centre of every summarised segment, ``(batch or 1, 1, groups, rank)`` float32 a level."""
    alignment = mask.alignment
    levels = level_count(mask.length, config.block_size)
    positions = position_ids.float()
    missing = mask.length - positions.shape[1]
    if missing:
        # Tokens of the cache: their positions go before those of the new ones, without gaps.
        before = positions[:, :1] + torch.arange(-missing, 0, device=positions.device)
        positions = torch.cat([before, positions], 1)
    if alignment is not None:
        positions = positions.expand(alignment.index.shape[0], -1).gather(1, alignment.index)
        validity = (alignment.document >= 0).expand(positions.shape[0], -1)
    else:
        slots = -(-mask.length // config.block_size) * config.block_size
        validity = (torch.arange(slots, device=positions.device) < mask.length).expand(positions.shape[0], -1)
        positions = nn.functional.pad(positions, (0, slots - mask.length))
    means = MeanSummary(config.block_size, config.rank)
    centres = means(positions.masked_fill(~validity, 0)[:, None, :, None], validity, levels)
    masses = means.masses(validity, levels, 1, positions.dtype)
    segment = torch.arange(config.rank, device=positions.device) + 0.5
    for level, mass in enumerate(masses):
        # A learned summary may stand for a segment of its group that has no token: then where the tokens would be.
        width = config.block_size << level
        there = positions[:, None, ::width, None] + segment * (width // config.rank) - 0.5
        centres[level] = torch.where(mass > 0, centres[level], there[..., None])
    return [centre.squeeze(-1) for centre in centres]


def refuse_cut_weights(config: MultipoleConfig, generation: GenerationConfig, options: dict) -> None:
    """Raises ValueError where generate, given ``options``, is to return the attention weights of layers whose summaries have columns
    behind those of the tokens, and is assisted: Transformers then cuts weights to as many columns as there are tokens.
    """
    generation = copy.deepcopy(generation)
    generation.update(**options)
    assisted = generation.get_generation_mode(options.get("assistant_model")) == GenerationMode.ASSISTED_GENERATION
    if assisted and any(layer_implementation(config, kind, True) == "multipole" for kind in config.layer_types):
        raise ValueError(
            "output_attentions is not supported in assisted generation, which would cut the columns of summaries off: leave one out, "
            "or load the model with attn_implementation='eager'"
        )

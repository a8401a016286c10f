"""The multipole transformer: one block, one backbone, four heads. Causal or bidirectional by its configuration."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    create_bidirectional_mask,
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_functions import seen
from .attention_masks import MultipoleMask
from .configuration_multipole import MULTIPOLE_LAYERS, MultipoleConfig, attention_options
from .hierarchy import level_count
from .learned import FarField
from .multipole_cache import check_cache, compiled_state, keeps_state, take_number
from .summaries import MeanSummary, compute_dtype
from .tensor_layer import TensorAttention

logger = logging.get_logger(__name__)


class MultipoleRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(compute_dtype(x.dtype))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class MultipoleMLP(nn.Module):
    def __init__(self, config: MultipoleConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MultipoleRotaryEmbedding(nn.Module):
    def __init__(self, config: MultipoleConfig):
        super().__init__()
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        initial = self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = initial(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MultipoleConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``(..., head_dim)`` of positions ``(...)``, which need not be integers."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device).float()
        angles = torch.cat([angles, angles], -1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class _RotatedSummary:
    """Summaries of keys that have no position yet, rotated at the centres of their segments."""

    def __init__(self, summary, centres: list[tuple[torch.Tensor, torch.Tensor]]):
        self.summary, self.centres = summary, centres

    def __call__(self, tokens, validity, levels, everything, kernels=False):
        tokens, summaries, counts = self.summary(tokens, validity, levels, everything, kernels=kernels)
        return tokens, [rotate(x, cos.to(x.dtype), sin.to(x.dtype)) for x, (cos, sin) in zip(summaries, self.centres)], counts


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, -1, dtype=compute_dtype(query.dtype)).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def layer_implementation(config: MultipoleConfig, layer_type: str, output_attentions: bool) -> str:
    """The attention function of a layer: a full_attention layer is always exact; a multipole layer is, when asked to be; a tensor
    layer stays one.
    """
    implementation = config._attn_implementation
    if layer_type in MULTIPOLE_LAYERS and implementation in ("multipole", "multipole_linear"):
        return "multipole" if layer_type == "multipole_attention" else "multipole_linear"
    if layer_type == "tensor_attention":
        return "tensor"
    if layer_type == "full_attention" and implementation in ("multipole", "multipole_linear", "tensor"):
        implementation = "sdpa"
    # The same attention, but with its weights.
    return "eager" if output_attentions and implementation == "sdpa" else implementation


class MultipoleAttention(nn.Module):
    """Projections, rotary positions and cache, then the attention function of the layer."""

    def __init__(self, config: MultipoleConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = config.is_causal
        self.number = take_number(self)
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.num_key_value_groups = heads // kv_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=bias)
        if self.layer_type in MULTIPOLE_LAYERS:
            options, queries = attention_options(config), self.layer_type == "multipole_linear_attention" and not config.is_causal
            self.far_field = FarField(options, heads, kv_heads, config.head_dim, config.max_position_embeddings, queries)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.number = take_number(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_masks: dict[str, object],
        past_key_values: Cache | None = None,
        centres: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        rotary: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        implementation = layer_implementation(self.config, self.layer_type, kwargs.get("output_attentions"))
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        query, plain, key = rotate(query, cos, sin), key, rotate(key, cos, sin)

        multipole = implementation in ("multipole", "multipole_linear")
        unrotated = multipole and self.config.rotate_summaries
        state = multipole and keeps_state(past_key_values, self.layer_idx, kwargs.get("output_attentions"))
        if past_key_values is not None:
            # Keys without positions are kept beside the rotated ones where summaries are made of them.
            key = torch.cat([key, plain], -1) if unrotated else key
            key, value = past_key_values.update(key, value, self.layer_idx, **({"state": True} if state else {}))
            if unrotated and not state:
                key, plain = key.chunk(2, -1)
        if unrotated and state:
            kwargs["rotary"] = rotary
        elif unrotated:
            kwargs["far_keys"] = plain
            kwargs["key_summary"] = _RotatedSummary(self.far_field.key_summary, centres)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        out, weights = attention(
            self,
            query,
            key,
            value,
            attention_masks[implementation],
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.flatten(2)), weights


class MultipoleBlock(GradientCheckpointingLayer):
    def __init__(self, config: MultipoleConfig, layer_idx: int):
        super().__init__()
        attention = TensorAttention if config.layer_types[layer_idx] == "tensor_attention" else MultipoleAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = MultipoleMLP(config)
        self.input_layernorm = MultipoleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MultipoleRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MultipolePreTrainedModel(PreTrainedModel):
    config: MultipoleConfig
    config_class = MultipoleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MultipoleBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MultipoleBlock, "attentions": MultipoleAttention}

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # Transformers takes "sdpa" when nothing is asked for.
        return super().get_correct_attn_implementation(requested_attention or "multipole", is_init_check)


class MultipoleModel(MultipolePreTrainedModel):
    """The backbone: embeddings, blocks and the final norm."""

    def __init__(self, config: MultipoleConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([MultipoleBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.norm = MultipoleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MultipoleRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.number = take_number(self)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        attention_mask: ``(batch, n)``, 1 for real tokens; padding on either side. position_ids ``(batch, n)`` that start anew
        within a row, without an attention mask or cache, and cu_seq_lens_q ``(documents + 1,)`` for a batch of one, mark packed
        documents, which do not see each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both or none")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, queries = inputs_embeds.shape[:2]
        if batch == 0 or queries == 0:
            raise ValueError(f"the input is empty: {batch} rows of {queries} tokens")
        if past_key_values is not None and not self.config.is_causal:
            raise ValueError(
                "past_key_values belong to causal models: in a bidirectional one (is_causal=False) new tokens change all the others; "
                "pass use_cache=False"
            )
        output_attentions = kwargs.setdefault("output_attentions", self.config.output_attentions)

        segment_ids = self._segments(inputs_embeds, attention_mask, position_ids, past_key_values, kwargs.get("cu_seq_lens_q"))
        if past_key_values is None and (self.training or segment_ids is not None or not self.config.is_causal):
            # Nothing could be generated from here.
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        compiled = compiled_state(past_key_values)
        if compiled is not None:
            past = seen(compiled.number).to(inputs_embeds.device)
        else:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
        wrong = compiled is None and attention_mask is not None and attention_mask.shape != (batch, past + queries)
        if attention_mask is not None and attention_mask.is_floating_point() and not (wrong or torch.compiler.is_compiling()):
            # Ones in floating point, as PEFT puts them before a mask for its virtual tokens. Zeros alone may be an additive mask.
            real = attention_mask == 1
            if ((attention_mask == 0) | real).all() and real.any(1).all():
                attention_mask = real
        if wrong or (attention_mask is not None and attention_mask.is_floating_point()):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}, but must be "
                f"(batch, n) = {(batch, past + queries)}, bool or 0 and 1: masks over pairs of tokens and additive masks are not supported"
            )
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, segment_ids, past)
        kinds = {layer_implementation(self.config, kind, output_attentions) for kind in self.config.layer_types}
        length = None if compiled is not None else past + queries
        masks = {
            kind: self._mask(kind, inputs_embeds, attention_mask, segment_ids, position_ids, past_key_values, length)
            for kind in {"multipole" if kind == "multipole_linear" else kind for kind in kinds}
        }
        if "multipole" in masks:
            masks["multipole_linear"] = masks["multipole"]
        if past_key_values is not None and compiled is None:
            mask = None if output_attentions else masks.get("multipole")
            attentions = [layer.self_attn for layer in self.layers]
            check_cache(past_key_values, self, attentions, mask, masks.get("tensor"), attention_mask)
        centres = None
        if "multipole" in masks and self.config.rotate_summaries:
            layer = next(i for i, kind in enumerate(self.config.layer_types) if kind in MULTIPOLE_LAYERS)
            if not keeps_state(past_key_values, layer, output_attentions):
                centres = self._centres(inputs_embeds, position_ids, masks["multipole"])

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_masks=masks,
                past_key_values=past_key_values,
                centres=centres,
                rotary=self.rotate_at,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values if use_cache else None)

    def _segments(self, inputs_embeds, attention_mask, position_ids, past_key_values, bounds) -> torch.Tensor | None:
        """``(batch, n)`` numbers of the documents of packed rows, or None."""
        batch, n = inputs_embeds.shape[:2]
        if bounds is not None:
            if batch != 1 or past_key_values is not None:
                raise ValueError("cu_seq_lens_q describes a batch of one packed row without a cache; use position_ids for more rows")
            tokens = torch.arange(n, device=inputs_embeds.device)
            return torch.searchsorted(bounds.to(tokens), tokens, right=True)[None]
        if position_ids is None or attention_mask is not None or past_key_values is not None:
            return None
        return find_packed_sequence_indices(position_ids.expand(batch, -1))

    def _positions(self, inputs_embeds, attention_mask, segment_ids, past) -> torch.Tensor:
        """Positions of the tokens in their documents. Summaries of rotated keys are not a matter of distances only, since their
        weights differ from channel to channel: counted otherwise, padding and the documents before would change the result.
        """
        queries = inputs_embeds.shape[1]
        tokens = past + torch.arange(queries, device=inputs_embeds.device)[None]
        if segment_ids is not None:
            return tokens - torch.where(segment_ids == segment_ids.roll(1, 1), 0, tokens).cummax(1).values
        if attention_mask is not None:
            return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -queries:].to(tokens.device)
        return tokens

    def rotate_at(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x ``(..., head_dim)`` rotated by positions, which need not be integers."""
        return rotate(x, *self.rotary_emb(x, positions))

    def __setstate__(self, state):
        super().__setstate__(state)
        self.number = take_number(self)

    def _mask(self, implementation, inputs_embeds, attention_mask, segment_ids, position_ids, past_key_values, length):
        """The mask of one attention function; Transformers' own for the exact ones."""
        batch, queries = inputs_embeds.shape[:2]
        causal = self.config.is_causal
        if implementation == "multipole" and length is None:
            return MultipoleMask(True, batch, queries, None, self.config.block_size, attention_mask, None, position_ids)
        if implementation in ("multipole", "tensor"):
            return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
                batch_size=batch,
                q_length=queries,
                kv_length=length,
                q_offset=length - queries,
                mask_function=causal_mask_function if causal else bidirectional_mask_function,
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                position_ids=position_ids,
                config=self.config,
            )
        config = copy.copy(self.config)
        config._attn_implementation_internal = implementation
        create = create_causal_mask if causal else create_bidirectional_mask
        packed = {} if segment_ids is None else {"and_mask_function": packed_sequence_mask_function(segment_ids)}
        return create(config, inputs_embeds, attention_mask, past_key_values=past_key_values, **packed)

    def _centres(self, inputs_embeds, position_ids, mask: MultipoleMask) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines at the centre of every summarised segment, ``(batch or 1, 1, groups, rank, head_dim)`` a level."""
        config, alignment = self.config, mask.alignment
        levels = level_count(mask.length, config.block_size)
        positions = position_ids.float()
        missing = mask.length - positions.shape[1]
        if missing:
            # Tokens of the cache: their positions go before those of the new ones, without gaps.
            before = positions[:, :1] + torch.arange(-missing, 0, device=positions.device)
            positions = torch.cat([before, positions], 1)
        if alignment is not None:
            positions = positions.expand(len(alignment.index), -1).gather(1, alignment.index)
            validity = (alignment.document >= 0).expand(len(positions), -1)
        else:
            slots = -(-mask.length // config.block_size) * config.block_size
            validity = (torch.arange(slots, device=positions.device) < mask.length).expand(len(positions), -1)
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
        return [self.rotary_emb(inputs_embeds, centre.squeeze(-1)) for centre in centres]

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value


class MultipoleForCausalLM(MultipolePreTrainedModel, GenerationMixin):
    """Next-token prediction."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MultipoleConfig):
        super().__init__(config)
        self.model = MultipoleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """labels: ``(batch, n)`` tokens, -100 where no loss is counted; the model shifts them itself."""
        if labels is not None and not self.config.is_causal:
            raise ValueError("a bidirectional model (is_causal=False) sees the labels of next-token prediction; use MultipoleForMaskedLM")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def _is_stateful(self) -> bool:
        """Whether no token can be taken back, which assisted generation needs."""
        return self.config.tensor_method == "polynomial" and "tensor_attention" in self.config.layer_types

    def generate(self, *args, **kwargs):
        """See :meth:`transformers.GenerationMixin.generate`."""
        if not self.config.is_causal:
            raise ValueError("generation needs a causal model, but this one is bidirectional (is_causal=False)")
        return super().generate(*args, **kwargs)


class MultipoleForMaskedLM(MultipolePreTrainedModel):
    """Prediction of masked tokens, for a bidirectional configuration."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MultipoleConfig):
        super().__init__(config)
        if config.is_causal:
            logger.warning_once("MultipoleForMaskedLM with is_causal=True sees the left side only; pass is_causal=False for both sides")
        self.model = MultipoleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """labels: ``(batch, n)`` tokens, -100 where nothing was masked."""
        kwargs["use_cache"] = False
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


class MultipoleForSequenceClassification(GenericForSequenceClassification, MultipolePreTrainedModel):
    """A label for each row, read at its last real token."""

    def __init__(self, config: MultipoleConfig):
        # Not the generic constructor: it looks the backbone up in AutoModel, which a checkpoint with its own code is not in.
        MultipolePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MultipoleModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class MultipoleForTokenClassification(GenericForTokenClassification, MultipolePreTrainedModel):
    """A label for each token."""

    def __init__(self, config: MultipoleConfig):
        MultipolePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MultipoleModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


# Trainer knows by this list that labels are to be shifted, where it computes the loss (label smoothing).
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["multipole"] = MultipoleForCausalLM.__name__


__all__ = [
    "MultipoleForCausalLM",
    "MultipoleForMaskedLM",
    "MultipoleForSequenceClassification",
    "MultipoleForTokenClassification",
    "MultipoleModel",
    "MultipolePreTrainedModel",
]

"""The multipole transformer: one block, one backbone, four heads. Causal or bidirectional by its configuration."""

import itertools
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_multipole import MultipoleConfig
from .kinds import KINDS
from .model_inputs import last_tokens, prepare, refuse_cut_weights
from .multipole_cache import keeps_state, take_number
from .private import shift_labels_of
from .rotary import MultipoleRotaryEmbedding, depends_on_length, is_rotated_anew, rotate

logger = logging.get_logger(__name__)


class MultipoleRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
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


class _RotatedSummary:
    """Summaries of keys that have no position yet, rotated at the centres of their segments."""

    def __init__(self, summary, centres: list[tuple[torch.Tensor, torch.Tensor]]):
        self.summary, self.centres = summary, centres

    def __call__(self, tokens, validity, levels, everything, kernels=False, token_masses=None):
        tokens, summaries, counts = self.summary(tokens, validity, levels, everything, kernels=kernels, token_masses=token_masses)
        return tokens, [rotate(x, cos.to(x.dtype), sin.to(x.dtype)) for x, (cos, sin) in zip(summaries, self.centres)], counts


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, -1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


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
        part = KINDS[self.layer_type].part
        if part is not None:
            self.far_field = part(config)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.number = take_number(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: object,
        implementation: str,
        past_key_values: Cache | None = None,
        centres: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        rotary: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        query, plain, key = rotate(query, cos, sin), key, rotate(key, cos, sin)

        multipole = implementation in ("multipole", "multipole_linear")
        unrotated = multipole and self.config.rotate_summaries
        state = False
        if past_key_values is not None:
            state = multipole and keeps_state(past_key_values, self.layer_idx, kwargs.get("output_attentions"))
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
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(out.flatten(2)), weights


class MultipoleBlock(GradientCheckpointingLayer):
    def __init__(self, config: MultipoleConfig, layer_idx: int):
        super().__init__()
        attention = KINDS[config.layer_types[layer_idx]].layer or MultipoleAttention
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
        output_attentions = kwargs.setdefault("output_attentions", self.config.output_attentions)
        bounds = kwargs.get("cu_seq_lens_q")
        inputs = prepare(self, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, output_attentions, bounds)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, inputs.position_ids)
        centres = None if inputs.centres is None else [self.rotary_emb(hidden_states, x) for x in inputs.centres]
        # Not a slice: that makes a new list of modules, and runs whatever the process does when modules are put together.
        for layer, implementation in zip(itertools.islice(self.layers, self.config.num_hidden_layers), inputs.implementations):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=inputs.masks[implementation],
                implementation=implementation,
                past_key_values=inputs.past_key_values,
                centres=centres,
                rotary=self.rotate_at,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=inputs.past_key_values if use_cache else None)

    def rotate_at(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x ``(..., head_dim)`` rotated by positions, which need not be integers."""
        return rotate(x, *self.rotary_emb(x, positions))

    def __setstate__(self, state):
        super().__setstate__(state)
        self.number = take_number(self)

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
        # Whether assisted generation is refused: where no token can be taken back, or candidates would change the angles of the tokens
        # before them. The class itself says False, as those read it that have no model yet.
        sums = config.tensor_method == "polynomial" and "tensor_attention" in config.layer_types
        self._is_stateful = sums or depends_on_length(config)
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

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs):
        """See :meth:`transformers.GenerationMixin.prepare_inputs_for_generation`, which reads from the names of the arguments that a
        prompt may be embeddings. Where the keys in the cache would have other angles in the longer text, it is read anew.
        """
        new, all_tokens = kwargs.get("next_sequence_length"), input_ids.shape[1]
        if depends_on_length(self.config) and past_key_values is not None and new == all_tokens - past_key_values.get_seq_length():
            length = all_tokens if attention_mask is None else int(attention_mask.sum(1).max())
            if is_rotated_anew(self.config, past_key_values, length, new):
                logger.warning_once(
                    f"rope_type {self.config.rope_parameters['rope_type']!r} turns all keys as the text grows, so that it is read anew: "
                    "'dynamic' does so with each further token, 'longrope' once; 'yarn' never"
                )
                past_key_values.reset()
                kwargs["next_sequence_length"] = None
        given = {"past_key_values": past_key_values, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        return super().prepare_inputs_for_generation(input_ids, **given, **kwargs)

    def generate(self, *args, **kwargs):
        """See :meth:`transformers.GenerationMixin.generate`."""
        if not self.config.is_causal:
            raise ValueError("generation needs a causal model, but this one is bidirectional (is_causal=False)")
        given = kwargs.get("generation_config") or self.generation_config
        if given.is_assistant and kwargs.get("attention_mask") is None and kwargs.get("input_ids") is not None:
            # The model that is assisted drops a mask of ones. From none, pad tokens of its text would be taken for padding.
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        if kwargs.get("output_attentions", given.output_attentions):
            refuse_cut_weights(self.config, given, kwargs)
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


class MultipoleForSequenceClassification(MultipolePreTrainedModel):
    """A label for each row, read at its last real token."""

    def __init__(self, config: MultipoleConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MultipoleModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """labels: ``(batch,)`` classes, or numbers for a regression, ``(batch, num_labels)`` of which is several of either.

        The last real token of a row is the last one of its ``attention_mask``. Without a mask it is the last one that is not
        ``pad_token_id``, or with ``inputs_embeds`` the last.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        last = last_tokens(logits, attention_mask, input_ids, self.config.pad_token_id)
        pooled = logits[torch.arange(len(last), device=last.device), last]
        loss = None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled, config=self.config, num_items_in_batch=count)
            if count is not None and self.config.problem_type != "single_label_classification":
                # The others are means over the labels of this part of the batch.
                loss = loss * (labels.numel() / count)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MultipoleForTokenClassification(MultipolePreTrainedModel):
    """A label for each token."""

    def __init__(self, config: MultipoleConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MultipoleModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
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
        **kwargs,
    ) -> TokenClassifierOutput:
        """labels: ``(batch, n)`` classes, -100 where no loss is counted."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=kwargs.get("num_items_in_batch"))
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


shift_labels_of("multipole", MultipoleForCausalLM.__name__)


__all__ = [
    "MultipoleForCausalLM",
    "MultipoleForMaskedLM",
    "MultipoleForSequenceClassification",
    "MultipoleForTokenClassification",
    "MultipoleModel",
    "MultipolePreTrainedModel",
]

"""The multipole models, used the way Transformers' users use models."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)
from transformers.modeling_utils import AttentionInterface

from hf_multipole import (
    MultipoleForCausalLM,
    MultipoleForMaskedLM,
    MultipoleForSequenceClassification,
    MultipoleForTokenClassification,
    MultipoleModel,
)
from hf_multipole.modeling.learned import FarField
from hf_multipole.modeling.options import MultipoleOptions
from hf_multipole.reference import multipole_attention_reference
from tests.helpers.tiny_models import (
    AUTO_CLASSES,
    BLOCK,
    CLOSE,
    EXACT,
    HYBRID,
    RANK,
    TOKENS,
    build,
    pad,
    positions,
    same_weights,
    tiny_config,
    tokens,
)

# Rotary angles are float32, as everywhere in Transformers.
SHIFTED = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def ids():
    return tokens()


@pytest.fixture
def spy(monkeypatch):
    """Arguments of every call of an attention function, as (module, query, key, value, keyword arguments)."""

    def install(name):
        calls, function = [], AttentionInterface._global_mapping[name]

        def record(module, query, key, value, mask, **kwargs):
            calls.append((module, query, key, value, kwargs))
            return function(module, query, key, value, mask, **kwargs)

        monkeypatch.setitem(AttentionInterface._global_mapping, name, record)
        return calls

    return install


def reference_of(call, causal=True, **options):
    """Outputs and weights that the definition gives for a recorded call of a multipole layer."""
    module, query, key, value, kwargs = call
    config = module.config
    return multipole_attention_reference(
        query,
        key,
        value,
        block_size=config.block_size,
        rank=config.rank,
        key_summary=module.far_field.key_summary,
        value_summary=module.far_field.value_summary,
        far_keys=kwargs.get("far_keys"),
        causal=causal,
        size_weighting=config.size_weighting,
        far_bias=module.far_field.far_bias,
        max_levels=module.far_field.max_levels,
        return_weights=True,
        **options,
    )


# Losses, inputs and outputs


def test_the_models_of_this_file_see_the_far_field(ids):
    """Otherwise most of the tests below could not fail."""
    model = build()
    logits = model(ids).logits
    for change in ("tokens", "merge", "far_bias"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name.endswith(change):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        far = (other(ids).logits - logits).abs()
        assert far[:, :EXACT].max() == 0
        assert far[:, 3 * BLOCK :].max() > 1e-4


@pytest.mark.parametrize("through", ["tokens", "embeddings"])
def test_causal_loss(ids, through):
    model = build()
    labels = ids.clone()
    labels[0, 10:20] = -100
    inputs = {"input_ids": ids} if through == "tokens" else {"inputs_embeds": model.get_input_embeddings()(ids)}
    output = model(**inputs, labels=labels)
    logits = output.logits[:, :-1].log_softmax(-1)
    picked = logits.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    expected = -picked[labels[:, 1:] >= 0].mean()
    # Transformers computes losses in float32.
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=1e-5)
    assert model(ids).loss is None


def test_masked_loss_is_not_shifted(ids):
    model = build(MultipoleForMaskedLM, is_causal=False)
    labels = torch.where(torch.rand(ids.shape) < 0.2, ids, -100)
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=1e-5)


def test_classification_losses(ids):
    model = build(MultipoleForSequenceClassification, num_labels=3)
    output = model(ids, labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 2]))
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=1e-5)

    model = build(MultipoleForTokenClassification, num_labels=3)
    labels = ids % 3
    output = model(ids, labels=labels)
    assert output.logits.shape == (2, TOKENS, 3)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_direction(ids, causal):
    """A causal model lets no future token through, and every past one; a bidirectional one lets all of them through."""
    model = build(MultipoleModel, is_causal=causal)
    embeddings = model.get_input_embeddings()(ids[:1]).detach().requires_grad_()
    t = 50
    model(inputs_embeds=embeddings).last_hidden_state[0, t].sum().backward()
    reached = embeddings.grad[0].abs().sum(-1) > 0
    assert reached[: t + 1].all()
    assert reached[t + 1 :].all() if not causal else not reached[t + 1 :].any()


@pytest.mark.parametrize("cls", list(AUTO_CLASSES.values()))
def test_inputs_embeds(ids, cls):
    model = build(cls, num_labels=3)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings)[0], model(ids)[0], atol=0, rtol=0)


@pytest.mark.parametrize("cls", list(AUTO_CLASSES.values()))
@pytest.mark.parametrize("kind", ["argument", "config"])
def test_output_hidden_states(ids, cls, kind):
    model = build(cls, num_labels=3, output_hidden_states=kind == "config")
    output = model(ids, output_hidden_states=True) if kind == "argument" else model(ids)
    states = output.hidden_states
    assert len(states) == 3 and all(state.shape == (2, TOKENS, 32) for state in states)
    torch.testing.assert_close(states[0], model.get_input_embeddings()(ids))
    backbone = model if cls is MultipoleModel else model.model
    torch.testing.assert_close(states[-1], backbone(ids).last_hidden_state)
    torch.testing.assert_close(states[1], backbone.layers[0](states[0], **layer_inputs(backbone, states[0])))


def layer_inputs(backbone, embeddings):
    """What the backbone gives to a layer, recorded from its last one."""
    seen = {}
    handle = backbone.layers[-1].register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    backbone(inputs_embeds=embeddings, use_cache=False)
    handle.remove()
    return seen


def test_tuple_output(ids):
    model = build()
    output = model(ids, return_dict=False, labels=ids)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[1], model(ids).logits)


def test_logits_to_keep(ids):
    model = build()
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:], **CLOSE)


def test_a_bidirectional_model_has_no_next_token_loss(ids):
    with pytest.raises(ValueError, match="is_causal=False.*MultipoleForMaskedLM"):
        build(is_causal=False)(ids, labels=ids)


def test_a_cache_is_kept_only_where_it_can_be_used(ids):
    model = build()
    assert model(ids).past_key_values.get_seq_length() == TOKENS
    assert model(ids, use_cache=False).past_key_values is None
    assert build(use_cache=False)(ids).past_key_values is None
    assert model.train()(ids).past_key_values is None


# Attention weights


@pytest.mark.parametrize("asked", ["argument", "config", "from_pretrained"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
def test_attention_weights_are_the_definitions(spy, tmp_path, ids, asked, causal):
    model = build(is_causal=causal, layer_types=HYBRID)
    expected_logits = model(ids).logits
    if asked == "config":
        model = same_weights(model, is_causal=causal, layer_types=HYBRID, output_attentions=True)
    elif asked == "from_pretrained":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True)
    assert model.config._attn_implementation == "multipole"

    calls = spy("multipole")
    output = model(ids, **{"output_attentions": True} if asked == "argument" else {})
    torch.testing.assert_close(output.logits, expected_logits, **CLOSE)
    assert len(output.attentions) == 3 and len(calls) == 2
    for call, weights in zip(calls, (output.attentions[0], output.attentions[2])):
        _, expected = reference_of(call, causal)
        assert weights.shape == expected.shape == (2, 4, TOKENS, TOKENS + RANK * (10 + 5 + 3))
        torch.testing.assert_close(weights, expected, **CLOSE)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert (weights[..., TOKENS:].sum(-1)[..., -1] > 0.05).any()

    # The full-attention layer between them: plain weights.
    exact = output.attentions[1]
    assert exact.shape == (2, 4, TOKENS, TOKENS)
    torch.testing.assert_close(exact.sum(-1), torch.ones_like(exact[..., 0]))
    assert (exact.triu(1).abs().max() == 0) == causal


@pytest.mark.parametrize(("n", "left", "right"), [(80, 13, 29), (EXACT, 5, 6), (5, 1, 4)], ids=["far", "no far level", "less than a block"])
def test_attention_weights_of_padded_rows(spy, n, left, right):
    ids, mask = tokens(rows=3, n=n), torch.ones(3, n, dtype=torch.long)
    mask[1, :left], mask[2, -right:] = 0, 0
    model = build()
    calls = spy("multipole")
    output = model(ids, attention_mask=mask, output_attentions=True)
    for call, weights in zip(calls, output.attentions):
        _, expected = reference_of(call, attention_mask=mask)
        torch.testing.assert_close(weights[..., :n], expected[..., :n], **CLOSE)
        assert weights[1, :, left:, :left].abs().max() == 0
        # The reference numbers the groups of each row's own document, the model those of the longest row.
        far, expected_far = (x[..., n:].sort(-1, descending=True).values for x in (weights, expected))
        torch.testing.assert_close(far, expected_far, **CLOSE)
        assert (far > 1e-3).any() == (n > EXACT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("left", [0, 5])
@pytest.mark.slow
def test_rotated_summaries_are_the_definitions(spy, causal, left):
    """rotate_summaries: keys are summarised without their positions, and rotated at their segment's centre."""
    n = 96  # whole groups in all levels
    ids, mask = pad(tokens(n=n), left=left)
    # The position of the first token must not matter, and that of padding neither.
    position_ids = 40 + positions(mask)
    model = build(is_causal=causal, rotate_summaries=True, max_position_embeddings=512)
    calls = spy("multipole")
    output = model(ids, attention_mask=mask, position_ids=position_ids, output_attentions=True)

    def rotate(x, position):
        half = x.shape[-1] // 2
        angles = position.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        left, right = x.chunk(2, -1)
        return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], -1)

    def rotate_summary(key, first, width):
        return rotate(key, torch.arange(width).double().view(RANK, -1).mean(1) + first + 40)

    for call, weights in zip(calls, output.attentions):
        torch.testing.assert_close(rotate(call[4]["far_keys"], position_ids[0]), call[2], **SHIFTED)
        out, expected = reference_of(call, causal, attention_mask=mask, rotate_summary=rotate_summary)
        torch.testing.assert_close(weights[:, :, left:, : n + left], expected[:, :, left:, : n + left], **SHIFTED)
        far = weights[..., n + left :]
        torch.testing.assert_close(far[:, :, left:], expected[:, :, left:, n + left :][..., : far.shape[-1]], **SHIFTED)
        torch.testing.assert_close(far[:, :, left:].sum(-1), expected[:, :, left:, n + left :].sum(-1), **SHIFTED)


def test_attention_weights_of_exact_implementations(ids):
    model = build()
    weights = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        weights[implementation] = torch.stack(model(ids, output_attentions=True).attentions)
        assert weights[implementation].shape == (2, 2, 4, TOKENS, TOKENS)
    torch.testing.assert_close(weights["sdpa"], weights["eager"], atol=0, rtol=0)


def test_attention_weights_while_generating(ids):
    model = build()
    output = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=-1, output_attentions=True, return_dict_in_generate=True)
    full = model(output.sequences[:, :-1], output_attentions=True).attentions
    for layer, weights in enumerate(output.attentions[-1]):
        torch.testing.assert_close(weights, full[layer][:, :, -1:], **CLOSE)


# Implementations and kinds of layers


def test_default_implementation():
    assert build().config._attn_implementation == "multipole"
    assert build(output_attentions=True).config._attn_implementation == "multipole"
    assert AutoModelForCausalLM.from_config(tiny_config()).config._attn_implementation == "multipole"
    assert AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="sdpa").config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="not supported"):
        MultipoleModel(tiny_config(attn_implementation="no_such_attention"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("layer_types", [["multipole_attention"] * 2, HYBRID])
def test_exact_implementations_run_the_same_weights(tmp_path, causal, padded, layer_types):
    model = build(is_causal=causal, layer_types=layer_types)
    model.save_pretrained(tmp_path)
    exact = [AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name).eval() for name in ("sdpa", "eager")]
    for n, multipole_is_exact in ((EXACT, True), (TOKENS, False)):
        ids, mask = tokens(n=n), torch.ones(2, n, dtype=torch.long)
        if padded:
            mask[1, slice(5) if padded == "left" else slice(-5, None)] = 0
        inputs = {"input_ids": ids, "attention_mask": mask if padded else None, "position_ids": positions(mask) if padded else None}
        real = mask.bool()
        sdpa, eager = (other(**inputs).logits[real] for other in exact)
        torch.testing.assert_close(sdpa, eager, **CLOSE)
        difference = (model(**inputs).logits[real] - sdpa).abs().max()
        assert difference < 1e-10 if multipole_is_exact else difference > 1e-3


def test_switching_the_implementation(ids):
    model = build()
    multipole = model(ids).logits
    model.set_attn_implementation("sdpa")
    exact = model(ids).logits
    assert (exact - multipole).abs().max() > 1e-3
    model.set_attn_implementation("multipole")
    torch.testing.assert_close(model(ids).logits, multipole, atol=0, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_full_attention_layers_are_always_exact(ids, causal):
    """With the same weights, a model of full-attention layers is the multipole model run by "sdpa"."""
    model = build(is_causal=causal, attn_implementation="sdpa")
    full = MultipoleForCausalLM(tiny_config(is_causal=causal, layer_types=["full_attention"] * 2)).double().eval()
    report = full.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys and all("summary" in key or "far_bias" in key for key in report.unexpected_keys)
    assert full.config._attn_implementation == "multipole"
    torch.testing.assert_close(full(ids).logits, model(ids).logits, **CLOSE)


def test_hybrid_layers(spy, ids):
    """Each layer runs the kind of attention that the configuration says, and has parameters of no other."""
    model = build(layer_types=HYBRID)
    kinds = {"multipole": spy("multipole"), "sdpa": spy("sdpa")}
    model(ids)
    assert [call[0].layer_idx for call in kinds["multipole"]] == [0, 2]
    assert [call[0].layer_idx for call in kinds["sdpa"]] == [1]
    assert [hasattr(layer.self_attn, "far_field") for layer in model.model.layers] == [True, False, True]


# Lengths


def test_direct_summaries_have_a_greatest_length():
    model = build(summary="direct", max_position_embeddings=64)
    assert model(tokens(n=64)).logits.isfinite().all()
    with pytest.raises(ValueError, match="at most 64 tokens.*summary='hierarchical'"):
        model(tokens(n=65))


@pytest.mark.parametrize("far_bias_init", [-1.0, None])
@pytest.mark.slow
def test_rows_longer_than_those_of_training(spy, far_bias_init):
    """Hierarchical summaries have no limit. Levels that training never had take no part: in far longer rows, and in generation on them,
    attention reaches as far as in training.
    """
    model = build(max_position_embeddings=64, far_bias_init=far_bias_init)
    assert all(layer.self_attn.far_field.max_levels == 2 for layer in model.model.layers)
    ids = tokens(n=280)
    calls = spy("multipole")
    output = model(ids, output_attentions=True)
    for call, weights in zip(calls, output.attentions):
        torch.testing.assert_close(weights, reference_of(call)[1], **CLOSE)
    out = model(ids[:, :279], use_cache=True)
    torch.testing.assert_close(model(ids[:, 279:], past_key_values=out.past_key_values).logits, output.logits[:, 279:], **CLOSE)
    # What is farther away makes no difference (whole groups of all levels are cut off).
    rest = model(ids[:, 128:], position_ids=torch.arange(128, 280)[None]).logits
    torch.testing.assert_close(rest[:, -20:], output.logits[:, -20:], **CLOSE)


def test_a_far_bias_that_serves_all_further_levels():
    """Where no length is known, all levels are trained."""
    far_field = FarField(MultipoleOptions(BLOCK, RANK, far_bias_init=-1.0), 4, 2, 8, None)
    assert far_field.max_levels is None and far_field.far_bias.shape == (4, 1)

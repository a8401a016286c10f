"""Tensor layers in the multipole models: the definition, bounded entries, masks, and what does not fit together."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import AttentionInterface

from hf_multipole import MultipoleConfig, MultipoleForCausalLM, MultipoleForSequenceClassification, MultipoleModel, tensor_attention
from hf_multipole.modeling.tensor_layer import BoundedRMSNorm, TensorAttention
from hf_multipole.reference import tensor_attention_reference
from tests.helpers.tiny_models import CLOSE, build, pad, tiny_config, tokens

TENSOR = ["tensor_attention"] * 2
MIXED = ["multipole_attention", "tensor_attention", "full_attention"]
EXACT_KINDS = [
    {"tensor_window": [3, 9]},
    {"tensor_window": [None, 2], "tensor_score_dim": 4},
    {"tensor_order": 2, "tensor_entry_bound": 1.3},
    {"tensor_order": 4, "tensor_window": [2, 3, 4], "attention_bias": True},
]
POLYNOMIAL = {"tensor_method": "polynomial", "tensor_score_dim": 3, "tensor_entry_bound": 0.8}
KINDS = [*EXACT_KINDS, POLYNOMIAL]


@pytest.fixture
def ids():
    return tokens()


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# The definition


def layer(**options) -> TensorAttention:
    """The attention of one layer, with random parameters and an identity in place of its last projection."""
    attention = build(MultipoleModel, layer_types=["tensor_attention"], **options).layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight.copy_(torch.eye(32))
        # Scores and products of values of order 1.
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj):
            proj.weight.mul_(2)
    if attention.o_proj.bias is not None:
        torch.nn.init.zeros_(attention.o_proj.bias)
    return attention


def tensors_of(attention, x):
    """Query, keys and values by their definition, from the parameters alone."""
    config = attention.config

    def project(proj, *sizes):
        out = x @ proj.weight.T + (0 if proj.bias is None else proj.bias)
        return out.view(*x.shape[:2], *sizes).movedim(1, -2)

    def bounded(x, norm):
        if config.tensor_entry_bound is None:
            return x
        rms = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return config.tensor_entry_bound * torch.tanh(norm.weight.view(x.shape[1:-2] + (1, -1)) * x / rms)

    indices, score_dim = config.tensor_order - 1, config.tensor_score_dim
    query = bounded(project(attention.q_proj, 4, score_dim), attention.q_norm)
    keys = bounded(project(attention.k_proj, indices, 2, score_dim), attention.k_norm)
    return query, list(keys.unbind(1)), list(project(attention.v_proj, indices, 2, 8).unbind(1))


def mask_of(attention, x, attention_mask=None, segment_ids=None):
    options = dict(attention_mask=attention_mask, segment_ids=segment_ids, config=attention.config)
    causal = causal_mask_function if attention.is_causal else bidirectional_mask_function
    sizes = dict(batch_size=len(x), q_length=x.shape[1], kv_length=x.shape[1])
    return ALL_MASK_ATTENTION_FUNCTIONS["tensor"](**sizes, mask_function=causal, **options)


def rows(kind, n):
    mask = torch.ones(2, n, dtype=torch.long)
    if kind == "padded":
        mask[0, :4], mask[1, -3:] = 0, 0
        return {"attention_mask": mask}
    return {} if kind == "whole" else {"segment_ids": torch.tensor([[0] * 5 + [1] * (n - 5), [3] * (n - 1) + [4]])}


@pytest.mark.parametrize("options", EXACT_KINDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_the_layer_is_the_definition(options, causal, kind):
    """Output, and the gradients of the input and of every parameter."""
    attention, n = layer(is_causal=causal, **options), 11
    x, inputs = torch.randn(2, n, 32, dtype=torch.float64, requires_grad=True), rows(kind, n)
    leaves = [x, *(p for name, p in attention.named_parameters() if not name.startswith("o_proj"))]
    out, weights = attention(x, mask_of(attention, x, **inputs), "tensor")
    expected = tensor_attention_reference(*tensors_of(attention, x), causal=causal, window=options.get("tensor_window"), **inputs)
    expected = expected.transpose(1, 2).flatten(2)
    assert weights is None and expected.abs().max() > 0.1
    torch.testing.assert_close(out, expected, **CLOSE)
    upstream = torch.randn_like(out)
    actual, wanted = (torch.autograd.grad(y, leaves, upstream) for y in (out, expected))
    for one, other in zip(actual, wanted):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["whole", "padded"])
@pytest.mark.parametrize("degree", [1, 3, None])
def test_the_polynomial_is_within_its_certificate(causal, kind, degree):
    attention, n = layer(is_causal=causal, tensor_degree=degree, **POLYNOMIAL), 11
    x, inputs = torch.randn(2, n, 32, dtype=torch.float64), rows(kind, n)
    query, keys, values = tensors_of(attention, x)
    expected = tensor_attention_reference(query, keys, values, causal=causal, **inputs)
    bounded = dict(method="polynomial", causal=causal, degree=degree, entry_bound=POLYNOMIAL["tensor_entry_bound"], **inputs)
    _, certificate = tensor_attention(query, keys, values, return_certificate=True, **bounded)
    out = attention(x, mask_of(attention, x, **inputs), "tensor")[0].unflatten(2, (4, 8)).transpose(1, 2)
    error = (out - expected).abs()
    assert (error <= certificate.error).all()
    assert error.max() > 1e-6  # it is the polynomial that ran


# Bounded entries


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [0.1, 0.7, 1.0, 1.3, 3])
def test_no_entry_exceeds_the_bound(dtype, bound):
    norm = BoundedRMSNorm(4, 8, bound, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(4, 1, 8) * torch.tensor([1e-3, 1, 10, 1e4]).view(4, 1, 1))
    x = torch.randn(5, 4, 200, 8) * 10 ** torch.linspace(-4, 4, 200)[:, None]
    out = norm.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()
    largest = out.double().abs().max().item()
    assert bound * (1 - 4 * torch.finfo(dtype).eps) <= largest <= bound
    one_sided = norm(torch.eye(8).repeat(4, 1, 1)[None].to(dtype) * 1e4)
    assert one_sided.double().abs().max() <= bound


def test_training_does_not_leave_the_bound(ids):
    """However far the gains go."""
    model = build(dtype=torch.float32, layer_types=TENSOR, **POLYNOMIAL)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids, labels=ids).loss.isfinite()


# Models


@pytest.mark.parametrize("options", KINDS)
def test_every_parameter_is_trained(ids, options):
    model = build(layer_types=MIXED, **options).train()
    model(ids, labels=ids).loss.backward()
    trained = gradients(model)
    assert {name for name, _ in model.named_parameters() if "layers.1." in name} <= set(trained)
    assert all(gradient.isfinite().all() for gradient in trained.values())
    assert all(gradient.abs().max() > 0 for name, gradient in trained.items() if "layers.1." in name)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_direction(ids, options, causal):
    """A causal model lets no future token through; a bidirectional one lets tokens of both sides through."""
    model = build(MultipoleModel, is_causal=causal, layer_types=TENSOR, **options)
    embeddings = model.get_input_embeddings()(ids[:1, :30]).detach().requires_grad_()
    model(inputs_embeds=embeddings).last_hidden_state[0, 15].sum().backward()
    reached = embeddings.grad[0].abs().sum(-1) > 0
    assert reached[14:16].all()
    assert not reached[16:].any() if causal else reached[16]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("cls", [MultipoleForCausalLM, MultipoleForSequenceClassification])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_row_alone_is_the_row_in_a_batch(options, cls, side, causal):
    model = build(cls, is_causal=causal, layer_types=MIXED, num_labels=3, **options)
    together_of = [tokens(rows=1, n=n, seed=n) for n in (25, 14, 1)]
    padded = [pad(row, **{side: 25 - row.shape[1]}) for row in together_of]
    ids, mask = (torch.cat(parts) for parts in zip(*padded))
    if cls is MultipoleForSequenceClassification:
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    together = model(ids, attention_mask=mask)[0]
    assert together.isfinite().all()
    for row, alone in enumerate(together_of):
        got = together[row] if cls is MultipoleForSequenceClassification else together[row, mask[row].bool()]
        torch.testing.assert_close(got, model(alone)[0][0], **CLOSE)


@pytest.mark.parametrize("options", [EXACT_KINDS[0], POLYNOMIAL])
def test_what_stands_in_padding_does_not_matter(ids, options):
    model = build(MultipoleModel, layer_types=TENSOR, **options)
    ids, mask = pad(ids, left=9, right=4)
    embeddings = model.get_input_embeddings()(ids)
    plain = model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state[mask.bool()]
    wild = embeddings.masked_fill(mask[..., None] == 0, torch.nan)
    torch.testing.assert_close(model(inputs_embeds=wild, attention_mask=mask).last_hidden_state[mask.bool()], plain, atol=0, rtol=0)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("layer_types", [TENSOR, MIXED])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_documents_alone(options, layer_types, causal):
    model = build(MultipoleModel, is_causal=causal, layer_types=layer_types, **options)
    lengths = (3, 12, 1, 9)
    ids = tokens(rows=2, n=sum(lengths))
    alone = torch.cat([model(part).last_hidden_state for part in ids.split(lengths, 1)], 1)
    assert (model(ids).last_hidden_state - alone).abs().max() > 1e-3
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    torch.testing.assert_close(model(ids, position_ids=position_ids).last_hidden_state, alone, **CLOSE)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.testing.assert_close(model(ids[:1], cu_seq_lens_q=bounds).last_hidden_state, alone[:1], **CLOSE)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(ids, options, use_reentrant):
    model = build(layer_types=MIXED, **options, **({} if options is POLYNOMIAL else {"attention_dropout": 0.3})).train()
    ids, mask = pad(ids[:, :20], left=3)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@pytest.mark.parametrize("options", [EXACT_KINDS[0], EXACT_KINDS[2], POLYNOMIAL])
def test_bfloat16_and_autocast(ids, options):
    """Rounding costs a tensor model no more than four times what it costs a model of the same size with exact attention: every
    product has one factor more, on both sides of the softmax.
    """
    errors = {}
    for kind in (TENSOR, ["full_attention"] * 2):
        model = build(dtype=torch.float32, layer_types=kind, **options)
        exact = model(ids, labels=ids)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids, labels=ids)
        mixed.loss.backward()
        assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients(model).values())
        model = model.bfloat16()
        half = model(ids, labels=ids)
        half.loss.backward()
        assert half.logits.dtype == torch.bfloat16 and all(gradient.isfinite().all() for gradient in gradients(model).values())
        errors[kind[0]] = [(output.logits.float() - exact.logits).square().mean().sqrt().item() for output in (mixed, half)]
    for tensor, full in zip(errors["tensor_attention"], errors["full_attention"]):
        assert 0 < tensor < 4 * full


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.slow
def test_compile(ids, training):
    model = build(MultipoleForCausalLM, layer_types=["tensor_attention"], tensor_window=[3, 9]).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        with torch.set_grad_enabled(training):
            logits = run(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        if training:
            logits.square().mean().backward()
        results.append((logits.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


# Checkpoints


@pytest.mark.parametrize("options", KINDS)
def test_save_and_load(ids, tmp_path, options):
    model = build(dtype=torch.float32, layer_types=MIXED, **options)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for name in ("order", "method", "window", "degree", "entry_bound", "score_dim"):
        assert getattr(loaded.config, f"tensor_{name}") == getattr(model.config, f"tensor_{name}")
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_gains_that_a_checkpoint_lacks_start_at_one(tmp_path):
    build(layer_types=MIXED).save_pretrained(tmp_path)
    model, report = MultipoleForCausalLM.from_pretrained(tmp_path, tensor_entry_bound=0.5, output_loading_info=True)
    assert len(report["missing_keys"]) == 2
    attention = model.model.layers[1].self_attn
    assert (attention.q_norm.weight == 1).all() and (attention.k_norm.weight == 1).all()


def test_the_same_weights_by_both_methods(tmp_path, ids):
    """A trained polynomial model can be run exactly; a higher degree comes closer to that."""
    model = build(layer_types=TENSOR, tensor_degree=2, **POLYNOMIAL)
    model.save_pretrained(tmp_path)
    exact = MultipoleForCausalLM.from_pretrained(tmp_path, tensor_method="exact", tensor_degree=None, dtype=torch.float64)
    finer = MultipoleForCausalLM.from_pretrained(tmp_path, tensor_degree=6, dtype=torch.float64)
    expected = exact.eval()(ids).logits
    coarse, fine = ((other.eval()(ids).logits - expected).abs().max() for other in (model, finer))
    assert 0 < fine < coarse / 100


# Which implementation runs


def test_hybrid_layers(monkeypatch, ids):
    model, ran = build(layer_types=MIXED), []
    for name in ("multipole", "tensor", "sdpa"):
        function = AttentionInterface._global_mapping[name]

        def record(module, *args, _name=name, _function=function, **kwargs):
            ran.append((module.layer_idx, _name))
            return _function(module, *args, **kwargs)

        monkeypatch.setitem(AttentionInterface._global_mapping, name, record)
    model(ids)
    assert ran == [(0, "multipole"), (1, "tensor"), (2, "sdpa")]
    ran.clear()
    model.set_attn_implementation("sdpa")
    model(ids)
    assert ran == [(0, "sdpa"), (1, "tensor"), (2, "sdpa")]


def test_the_name_of_the_implementation(ids):
    """ "tensor" is what tensor layers run anyway; in own models the kind of the layer decides."""
    model = build(layer_types=["tensor_attention", "full_attention"])
    named = MultipoleForCausalLM._from_config(model.config, attn_implementation="tensor").double().eval()
    named.load_state_dict(model.state_dict())
    torch.testing.assert_close(named(ids).logits, model(ids).logits, atol=0, rtol=0)
    with pytest.raises(ValueError, match="attn_implementation='tensor' is for layers with further keys and values"):
        build(attn_implementation="tensor")(ids)
    with pytest.raises(ValueError, match="attn_implementation='tensor' is for layers with further keys and values"):
        build(layer_types=MIXED, attn_implementation="tensor")(ids)


def test_a_stock_model_has_no_tensor_attention(ids):
    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    model = LlamaForCausalLM(copy.deepcopy(config)).eval()
    model.set_attn_implementation("tensor")
    for inputs in ({}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match="attn_implementation='tensor' is for layers .* which this model does not have: use"):
            model(ids, **inputs)


def test_there_are_no_weights_to_return(ids):
    with pytest.raises(ValueError, match="output_attentions is not supported by tensor layers"):
        build(layer_types=MIXED)(ids, output_attentions=True)


# Configuration


def test_defaults():
    config = MultipoleConfig(hidden_size=96, num_attention_heads=4)
    assert config.tensor_order == 3 and config.tensor_method == "exact" and config.tensor_window is None
    assert config.tensor_score_dim == 24 and config.tensor_entry_bound is None and config.tensor_degree is None
    config = MultipoleConfig(tensor_method="polynomial", layer_types=TENSOR, num_hidden_layers=2)
    assert config.tensor_score_dim == 8 and config.tensor_entry_bound == 0.7
    attention = build(MultipoleModel, layer_types=TENSOR, tensor_method="polynomial").layers[0].self_attn
    approximation = attention.approximation(torch.float32)
    assert len(approximation.coefficients) == 5 and approximation.delta < 1e-3 and approximation.entry_bound == 0.7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_order": 1}, "tensor_order is 1, but must be at least 2"),
        ({"tensor_method": "taylor"}, "tensor_method is 'taylor', but must be 'exact' or 'polynomial'"),
        ({"tensor_window": [4]}, r"tensor_window is \[4\], but must have one width, or None, for each of the 2 keys"),
        ({"tensor_window": [4, 0]}, "tensor_window has width 0, but widths must be positive"),
        ({"tensor_window": [4, 4], "tensor_method": "polynomial"}, "tensor_window belongs to method='exact'"),
        ({"tensor_degree": 3}, "tensor_degree belongs to method='polynomial'"),
        ({"tensor_degree": 25, "tensor_method": "polynomial"}, "tensor_degree is 25, but must be an integer from 0 to 24"),
        ({"tensor_entry_bound": 0.0}, "tensor_entry_bound is 0.0, but must be a positive number"),
        ({"tensor_score_dim": 0}, "tensor_score_dim is 0, but must be positive"),
        ({"tensor_entry_bound": 3.0, "tensor_method": "polynomial"}, "scores may reach .*: take a smaller tensor_entry_bound"),
        ({"tensor_entry_bound": 2, "tensor_degree": 1, "tensor_method": "polynomial"}, "degree 1 says nothing .*: take a smaller"),
        ({"tensor_score_dim": 64, "tensor_degree": 9, "tensor_method": "polynomial"}, "degree 9 has .* features .*: take a smaller"),
        ({"attention_dropout": 0.1, "tensor_method": "polynomial"}, "attention_dropout is 0.1, but tensor_method='polynomial' has no"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(Exception, match=message) as caught:
        tiny_config(layer_types=TENSOR, **fields)
    assert isinstance(caught.value.__cause__ or caught.value, (ValueError, TypeError))

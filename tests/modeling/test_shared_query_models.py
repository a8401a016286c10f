"""The O(n) form in models: layers of our own, attn_implementation="multipole_linear" and conversion. tests/test_cache_multipole.py has its
generation state among the others.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache
from transformers.modeling_utils import AttentionInterface

from hf_multipole import MultipoleCache, MultipoleForCausalLM, MultipoleForMaskedLM, convert, revert
from hf_multipole.modeling import attention_functions
from hf_multipole.modeling.learned import FarField
from hf_multipole.reference import multipole_attention_reference
from tests.helpers import stock_models as stock
from tests.helpers.stock_models import DECODERS, ENCODERS, auto_class_of
from tests.helpers.tiny_models import BLOCK, CLOSE, RANK, TOKENS, build, pad, randomise, tiny_config, tokens

LINEAR = ["multipole_linear_attention"] * 2
EVERY = ["multipole_linear_attention", "multipole_attention", "full_attention", "tensor_attention"]
GREEDY = dict(max_new_tokens=30, do_sample=False, eos_token_id=-1, pad_token_id=0)


def record_calls(monkeypatch):
    """The calls of the attention function: query, key, value, the module and the output."""
    calls = []

    def record(module, query, key, value, mask, **kwargs):
        out = attention_functions.multipole_linear_attention_forward(module, query, key, value, mask, **kwargs)
        calls.append((query, key, value, module, out[0].transpose(1, 2)))
        return out

    monkeypatch.setitem(AttentionInterface._global_mapping, "multipole_linear", record)
    return calls


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.slow
def test_own_layers_run_the_definition(monkeypatch, causal, side):
    """With learned summaries, those of queries included."""
    model = build(MultipoleForCausalLM if causal else MultipoleForMaskedLM, is_causal=causal, layer_types=LINEAR)
    calls = record_calls(monkeypatch)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    if side:
        mask[1, slice(11) if side == "left" else slice(-11, None)] = 0
    model(tokens(), attention_mask=mask if side else None, use_cache=False)
    assert len(calls) == 2
    for query, key, value, module, out in calls:
        far_field = module.far_field
        assert (far_field.query_summary is None) == causal
        expected = multipole_attention_reference(
            query,
            key,
            value,
            block_size=BLOCK,
            rank=RANK,
            causal=causal,
            attention_mask=mask,
            key_summary=far_field.key_summary,
            value_summary=far_field.value_summary,
            query_summary=far_field.query_summary,
            far_bias=far_field.far_bias,
            downsample_queries=True,
        )
        torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_stock_layers_run_the_definition(monkeypatch, direction):
    causal = direction == "causal"
    config = DECODERS["llama"] if causal else ENCODERS["bert"]
    model = stock.build(config, AutoModelForCausalLM if causal else AutoModelForMaskedLM, "multipole_linear")
    calls = record_calls(monkeypatch)
    model(stock.tokens(), attention_mask=torch.ones_like(stock.tokens()))
    assert len(calls) == 2
    for query, key, value, _, out in calls:
        options = dict(block_size=stock.BLOCK, rank=stock.RANK, causal=causal, sink_tokens=4 * causal, downsample_queries=True)
        torch.testing.assert_close(out, multipole_attention_reference(query, key, value, **options), **CLOSE)


def test_the_kind_of_the_layer_decides():
    """Whichever of the two names the model runs with; exact attention when asked for."""
    ids = tokens()
    outs = {}
    for implementation in (None, "multipole", "multipole_linear", "sdpa"):
        for layer in ("multipole_attention", "multipole_linear_attention"):
            options = {} if implementation is None else {"attn_implementation": implementation}
            outs[implementation, layer] = build(layer_types=[layer] * 2, **options)(ids, use_cache=False).logits
    for layer in ("multipole_attention", "multipole_linear_attention"):
        for implementation in ("multipole", "multipole_linear"):
            assert torch.equal(outs[implementation, layer], outs[None, layer])
    assert torch.equal(outs["sdpa", "multipole_attention"], outs["sdpa", "multipole_linear_attention"])
    others = [outs[None, "multipole_attention"], outs[None, "multipole_linear_attention"], outs["sdpa", "multipole_attention"]]
    for i in range(3):
        assert (others[i] - others[i - 1]).abs().max() > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_and_packing(causal, side):
    model = build(MultipoleForCausalLM if causal else MultipoleForMaskedLM, is_causal=causal, layer_types=LINEAR)
    alone = model(tokens()[:, :40]).logits
    ids, mask = pad(tokens()[:, :40], **{side: 9})
    real = slice(9, None) if side == "left" else slice(40)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, real], alone, **CLOSE)
    positions = torch.cat([torch.arange(40), torch.arange(TOKENS - 40)])[None]
    packed = model(tokens(), position_ids=positions).logits
    torch.testing.assert_close(packed[:, :40], alone, **CLOSE)
    torch.testing.assert_close(packed[:, 40:], model(tokens()[:, 40:]).logits, **CLOSE)


@pytest.mark.parametrize("rotate_summaries", [True, False])
def test_a_hybrid_of_every_kind(rotate_summaries, tmp_path):
    """Trains all of its parameters, writes as without a cache, and comes back from a checkpoint."""
    model = build(layer_types=EVERY, rotate_summaries=rotate_summaries, tensor_window=[8, 8])
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = MultipoleForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.layer_types == EVERY
    out = model.generate(tokens(n=30), **GREEDY)
    torch.testing.assert_close(out, model.generate(tokens(n=30), use_cache=False, **GREEDY))
    # Rotary angles are not saved: in a model that was made float64 they had more digits.
    torch.testing.assert_close(loaded(out).logits, model(out).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [2 * BLOCK, TOKENS])
@pytest.mark.parametrize("summary", ["hierarchical", "direct"])
def test_query_summaries(summary, n, tmp_path):
    """They start as means, are trained (with gradients in short rows, too, for parallel training), saved and loaded."""
    model = MultipoleForMaskedLM(tiny_config(is_causal=False, layer_types=LINEAR, summary=summary)).double()
    mean = MultipoleForMaskedLM(tiny_config(is_causal=False, layer_types=LINEAR, summary="mean")).double().eval()
    mean.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model.eval()(tokens()).logits, mean(tokens()).logits, **CLOSE)
    learned = [parameter for name, parameter in model.named_parameters() if "query_summary" in name]
    assert learned
    model.train()(tokens(n=n), labels=tokens(n=n)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in learned) == (n > 2 * BLOCK)
    randomise(model).eval().save_pretrained(tmp_path)
    loaded = MultipoleForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        model = build(layer_types=LINEAR).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(results[1], results[0], **CLOSE)


# Generation with stock models


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.slow
def test_stock_generation_on_a_state(name, tmp_path):
    """What a stock model writes without a cache; old queries are not in a cache of keys and values, which is said."""
    model = stock.build(DECODERS[name], implementation="multipole_linear")
    prompt, mask = stock.tokens(n=40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    expected = model.generate(prompt, use_cache=False, **GREEDY)
    cache = MultipoleCache(config=model.config)
    torch.testing.assert_close(model.generate(prompt, past_key_values=cache, **GREEDY), expected)
    with pytest.raises(ValueError, match="downsample_queries needs the queries of all 41 tokens.*MultipoleCache"):
        model.generate(prompt, **GREEDY)
    # Rows of unequal length; the state is saved and loaded.
    cache = MultipoleCache(config=model.config)
    padded = model.generate(prompt, attention_mask=mask, past_key_values=cache, **GREEDY)
    torch.testing.assert_close(padded[0], expected[0])
    alone = model.generate(prompt[1:, 13:], use_cache=False, **GREEDY)
    torch.testing.assert_close(padded[1, 40:], alone[0, 27:])
    cache.bind(model)
    cache.save(tmp_path / "state")
    loaded = MultipoleCache.load(tmp_path / "state", model)
    more = {"attention_mask": torch.cat([mask, torch.ones(2, 31, dtype=torch.long)], 1)}
    with torch.no_grad():
        logits = [model(stock.tokens(n=2), past_key_values=c, **more).logits for c in (cache, loaded)]
    assert torch.equal(*logits)
    # Not for the other form.
    other = copy.deepcopy(model)
    other.set_attn_implementation("multipole")
    with pytest.raises(ValueError, match="kind of layer"):
        other(stock.tokens(n=1), past_key_values=loaded, attention_mask=torch.cat([more["attention_mask"], mask[:, -1:]], 1))


def test_own_generation_with_a_cache_of_keys():
    model = build(layer_types=LINEAR)
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match="MultipoleCache"):
        model(tokens()[:, :1], past_key_values=cache)


def test_a_cache_of_another_kind_of_layer():
    linear, other = build(layer_types=LINEAR), build()
    for filled, asked in ((linear, other), (other, linear)):
        cache = filled(tokens(), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="filled by another model"):
            asked(tokens()[:, :1], past_key_values=cache)


def test_attention_weights_are_refused():
    for model, ids in ((build(layer_types=LINEAR), tokens()), (stock.build(DECODERS["llama"], implementation="multipole_linear"), None)):
        with pytest.raises(ValueError, match="output_attentions is not supported"):
            model(stock.tokens() if ids is None else ids, output_attentions=True, use_cache=False)


def test_a_static_cache_is_refused_clearly():
    with pytest.raises(ValueError, match="no static cache.*[Ll]eave out"):
        build(layer_types=LINEAR).generate(tokens(), max_new_tokens=2, cache_implementation="static")


# Conversion


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "modernbert"])
def test_conversion(name, tmp_path):
    auto_class, ids = auto_class_of(name), stock.tokens()
    model = stock.build((DECODERS | ENCODERS)[name], auto_class, "multipole_linear")
    means = model(ids).logits
    convert(model, "multipole_linear")
    torch.testing.assert_close(model(ids).logits, means, **CLOSE)
    far_fields = [module for module in model.modules() if isinstance(module, FarField)]
    assert far_fields and all((far_field.query_summary is None) == (name in DECODERS) for far_field in far_fields)
    for far_field in far_fields:
        randomise(far_field)
    out = model(ids).logits
    assert (out - means).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "first")
    loaded = auto_class.from_pretrained(tmp_path / "first", dtype=torch.float64).eval()
    assert loaded.config._attn_implementation == "multipole_linear"
    torch.testing.assert_close(loaded(ids).logits, out, atol=1e-4, rtol=1e-4)
    # Run in another way by choice, it remains what it is.
    exact = auto_class.from_pretrained(tmp_path / "first", dtype=torch.float64, attn_implementation="eager")
    exact.save_pretrained(tmp_path / "second")
    again = auto_class.from_pretrained(tmp_path / "second", dtype=torch.float64).eval()
    assert again.config._attn_implementation == "multipole_linear"
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert not any(isinstance(module, FarField) for module in revert(model).modules())

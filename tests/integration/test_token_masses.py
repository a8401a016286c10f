"""Sinks and saliency in models: what they change, what is learned, saved and taken away, and which tokens a model keeps."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.modeling_utils import AttentionInterface

from hf_multipole import MultipoleConfig, convert, multipole_attention, revert, token_masses
from hf_multipole.modeling.configuration_multipole import multipole_options
from hf_multipole.modeling.learned import log_masses
from hf_multipole.modeling.options import MultipoleOptions, default_of, fields_of
from hf_multipole.reference import multipole_attention_reference
from tests.helpers import stock_models as stock
from tests.helpers.tiny_models import BLOCK, CLOSE, RANK, build, tokens


def saliencies(model) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("saliency")]


@pytest.mark.parametrize("summary", ["hierarchical", "direct", "mean"])
def test_masses_start_at_one(summary):
    """So that the model computes what it does without, to the bit."""
    torch.manual_seed(0)
    with_masses = build(summary=summary, saliency=True)
    for parameter in saliencies(with_masses):
        torch.nn.init.zeros_(parameter)
    without = build(summary=summary)
    without.load_state_dict({name: x for name, x in with_masses.state_dict().items() if not name.endswith("saliency")})
    assert torch.equal(*(model(tokens(), use_cache=False).logits for model in (with_masses, without)))


@pytest.mark.parametrize("layer_type", ["multipole_attention", "multipole_linear_attention"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_masses_are_learned(layer_type, is_causal):
    model = build(saliency=True, is_causal=is_causal, layer_types=[layer_type] * 2)
    model(tokens(), use_cache=False).logits.square().mean().backward()
    for parameter in saliencies(model):
        assert parameter.grad.abs().sum() > 0


def test_a_stock_layer_has_sinks(monkeypatch):
    """Four where it is causal, none where it is not, and as many as are asked for."""
    for config, causal in ((stock.DECODERS["llama"], True), (stock.ENCODERS["bert"], False)):
        for stated in (None, 0, 2):
            config = copy.deepcopy(config)
            config.multipole = {"block_size": BLOCK, "rank": RANK} | ({} if stated is None else {"sink_tokens": stated})
            model = stock.build(config, AutoModelForCausalLM if causal else AutoModelForMaskedLM)
            for q, k, v, out in recorded(monkeypatch, model, stock.tokens()):
                sinks = (4 if causal else 0) if stated is None else stated
                expected = multipole_attention_reference(q, k, v, block_size=BLOCK, rank=RANK, causal=causal, sink_tokens=sinks)
                torch.testing.assert_close(out, expected, **CLOSE)


def recorded(monkeypatch, model, ids) -> list[tuple]:
    """Queries, keys, values and outputs of the attention function in a forward."""
    calls, function = [], AttentionInterface._global_mapping["multipole"]

    def record(module, query, key, value, mask, **kwargs):
        out = function(module, query, key, value, mask, **kwargs)
        calls.append((query, key, value, out[0].transpose(1, 2)))
        return out

    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "multipole", record)
        model(ids, attention_mask=torch.ones_like(ids), **({"use_cache": False} if model.can_generate() else {}))
    return calls


@pytest.mark.parametrize("is_causal", [True, False])
def test_an_own_layer_runs_the_definition(monkeypatch, is_causal):
    model = build(saliency=True, sink_tokens=3, is_causal=is_causal)
    masses = list(token_masses(model, input_ids=tokens()).values())
    calls = recorded(monkeypatch, model, tokens())
    for (q, k, v, out), mass, layer in zip(calls, masses, model.model.layers):
        far_field = layer.self_attn.far_field
        logarithms = 8 * torch.tanh(torch.einsum("bhnd,hd->bhn", v, far_field.saliency) / 8)
        torch.testing.assert_close(mass, logarithms.exp(), **CLOSE)
        assert (mass - 1).abs().max() > 0.1
        summaries = dict(key_summary=far_field.key_summary, value_summary=far_field.value_summary, far_bias=far_field.far_bias)
        options = dict(block_size=BLOCK, rank=RANK, causal=is_causal, sink_tokens=3, log_masses=logarithms)
        torch.testing.assert_close(out, multipole_attention_reference(q, k, v, **options, **summaries), **CLOSE)
    assert len(calls) == len(masses) == 2


def test_masses_are_bounded():
    saliency, keys = torch.full((1, 2), 1e6), torch.tensor([[[[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]]])
    assert log_masses(keys, saliency).flatten().tolist() == [8.0, -8.0, 0.0]


def test_a_model_without_masses_has_none_to_show():
    with pytest.raises(ValueError, match="no masses of tokens: make it, or convert it, with saliency=True"):
        token_masses(build(), input_ids=tokens())


@pytest.mark.parametrize("summary", ["hierarchical", "mean"])
def test_conversion(tmp_path, summary):
    """Starts as without masses, to the bit; they train, are saved and loaded, and are taken away again."""
    ids = stock.tokens()
    plain = convert(stock.build(stock.DECODERS["llama"]), summary=summary)
    model = convert(stock.build(stock.DECODERS["llama"]), summary=summary, saliency=True)
    assert torch.equal(*(x(ids, use_cache=False).logits for x in (model, plain)))
    optimizer = torch.optim.SGD(saliencies(model), lr=100.0)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    assert len(saliencies(model)) == 2 and (model(ids).logits - plain(ids).logits).abs().max() > 1e-6
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **CLOSE)
    stock_model = revert(loaded)
    assert not saliencies(stock_model) and not hasattr(stock_model.config, "multipole")


# What was saved before there were sinks and masses


def test_an_own_configuration_without_them(tmp_path):
    build(sink_tokens=3, saliency=True).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stated = json.loads(path.read_text())
    assert stated["sink_tokens"] == 3 and stated["saliency"] is True
    path.write_text(json.dumps({name: x for name, x in stated.items() if name not in ("sink_tokens", "saliency")}))
    config = MultipoleConfig.from_pretrained(tmp_path)
    assert (config.sink_tokens, config.saliency) == (0, False)


def test_a_conversion_without_them():
    """It states all options that there were; a configuration in which somebody states some has the defaults of today for the others."""
    config = copy.deepcopy(stock.DECODERS["llama"])
    complete = {name: default_of(f, "stock") for name, f in fields_of("stock", MultipoleOptions).items()}
    for stated, sinks in (
        (complete, 4),
        ({name: x for name, x in complete.items() if name not in ("sink_tokens", "saliency")}, 0),
        ({}, 4),
    ):
        config.multipole = stated
        assert multipole_options(config).sinks(causal=True) == sinks, stated


@pytest.mark.parametrize("wrong", [-1, 2.0, True, "4"])
def test_wrong_numbers_of_sinks(wrong):
    x = torch.ones(1, 1, 8, 4)
    with pytest.raises(ValueError, match="sink_tokens is .*, but must be an integer of at least 0"):
        multipole_attention(x, x, x, sink_tokens=wrong)
    with pytest.raises(ValueError, match="sink_tokens"):
        convert(stock.build(stock.DECODERS["llama"]), sink_tokens=wrong)


def test_wrong_masses():
    x = torch.ones(1, 2, 8, 4)
    for wrong, error, message in (
        (torch.ones(1, 2, 7), ValueError, r"log_masses has shape \(1, 2, 7\), but must be \(batch, kv_heads, n\) = \(1, 2, 8\)"),
        (torch.ones(1, 2, 8).long(), TypeError, "log_masses must be a floating-point tensor .*, but is dtype torch.int64"),
        (1.0, TypeError, "log_masses must be a floating-point tensor .*, but is float"),
    ):
        with pytest.raises(error, match=message):
            multipole_attention(x, x, x, log_masses=wrong)

"""The table of the kinds of layers: what it says is what models of each kind are made of."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_multipole.modeling.configuration_multipole import LAYER_TYPES
from hf_multipole.modeling.kinds import KINDS, layer_implementation
from hf_multipole.modeling.model_inputs import prepare
from hf_multipole.modeling.modeling_multipole import MultipoleAttention
from tests.helpers.tiny_models import CLOSE, build, tiny_config, tokens

OURS = [name for name, kind in KINDS.items() if kind.implementation is not None]


@pytest.fixture
def ids():
    return tokens()


def test_every_kind_has_a_name_in_the_configuration():
    assert set(KINDS) == set(LAYER_TYPES)


@pytest.mark.parametrize("name", OURS)
def test_transformers_knows_it(name):
    kind = KINDS[name]
    assert AttentionInterface()[kind.implementation] is kind.attention
    assert AttentionMaskInterface()[kind.implementation] is kind.mask
    assert len([other for other in KINDS.values() if other.implementation == kind.implementation]) == 1


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_is_made_of_what_the_table_says(name, monkeypatch, ids):
    kind, calls = KINDS[name], []

    def spied(module, *args, **kwargs):
        calls.append(module)
        return kind.attention(module, *args, **kwargs)

    model = build(layer_types=[name] * 2)
    for layer in model.model.layers:
        assert isinstance(layer.self_attn, kind.layer or MultipoleAttention)
        assert hasattr(layer.self_attn, "far_field") == (kind.part is not None)
    assert [type(layer) for layer in DynamicCache(config=model.config).layers] == [kind.cache or DynamicLayer] * 2
    if kind.implementation is not None:
        monkeypatch.setitem(AttentionInterface._global_mapping, kind.implementation, spied)
    model(ids)
    assert calls == ([] if kind.implementation is None else [layer.self_attn for layer in model.model.layers])


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_changes_no_logits(name, ids):
    model = build(layer_types=[name, name])
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([30, 1, 20, ids.shape[1] - 51], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_static_caches(name):
    if KINDS[name].static_cache is None:
        assert len(StaticCache(config=tiny_config(layer_types=[name]), max_cache_len=8).layers) == 1
    else:
        with pytest.raises(ValueError, match="(?i)static cache.*leave out cache_implementation='static'"):
            StaticCache(config=tiny_config(layer_types=[name]), max_cache_len=8)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_exact_attention_asked_for_by_name(name, asked, ids):
    kind, model = KINDS[name], build(layer_types=[name])
    named = build(layer_types=[name], attn_implementation=asked)
    exact = kind.implementation is None or kind.may_be_exact
    assert (layer_implementation(named.config, name, False) == asked) == exact
    same = torch.allclose(named(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)
    assert same == (not kind.may_be_exact)


def test_kinds_with_one_mask_function_share_the_mask(ids):
    model = build(layer_types=list(KINDS)).model
    masks = prepare(model, model.embed_tokens(ids), torch.ones_like(ids), None, None, False, False, None).masks
    assert masks["multipole"] is masks["multipole_linear"] and set(masks) == {"multipole", "multipole_linear", "tensor", "sdpa"}

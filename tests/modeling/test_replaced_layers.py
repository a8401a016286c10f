"""Models whose linear layers were replaced by packed ones, or whose weights are somewhere else: they generate as any other."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

from hf_multipole import MultipoleCache
from tests.helpers.cache_runs import run
from tests.helpers.packed_layers import pack, quantize
from tests.helpers.tiny_models import CLOSE, TOKENS, build, tokens

KINDS = [
    {},
    {"rotate_summaries": True},
    {"summary": "direct"},
    {"layer_types": ["multipole_linear_attention", "full_attention"]},
    {"layer_types": ["tensor_attention", "multipole_attention"], "tensor_window": [3, 9]},
]
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1}


def check_generates(model):
    """Whatever pieces a text comes in, the logits are those of one pass; and generate writes the same with a state as without."""
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for cache in (None, MultipoleCache(config=model.config)):
        torch.testing.assert_close(run(model, ids, [40, 1, 1, 33], cache=cache)[0], expected, **CLOSE)
    plain = model.generate(ids[:, :30], use_cache=False, **GREEDY)
    torch.testing.assert_close(model.generate(ids[:, :30], **GREEDY), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_layers(kind):
    model = build(**kind)
    packed = pack(model)
    check_generates(packed)
    assert not torch.equal(packed(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_quantization(kind):
    """What is quantised besides the weights depends on all tokens of a call: steps are as good as one pass, and not the same."""
    model, ids = build(dtype=torch.float32, **kind), tokens()
    quantized = quantize(model)
    with torch.no_grad():
        exact, one = model(ids, use_cache=False).logits, quantized(ids, use_cache=False).logits
    steps = run(quantized, ids, [40] + [1] * 35)[0]
    one, steps = ((x - exact).square().mean().sqrt() for x in (one, steps))
    assert 0 < steps < 2 * one
    assert quantized.generate(ids[:, :30], **GREEDY).shape == (2, 50)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.slow
def test_offloaded_weights(where, kind, tmp_path):
    model = build(**kind)
    expected = model.generate(tokens()[:, :30], **GREEDY)
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    check_generates(model)
    torch.testing.assert_close(model.generate(tokens()[:, :30], **GREEDY), expected)


def test_a_device_map_with_embeddings_on_the_disk(tmp_path):
    model = build(tie_word_embeddings=False)
    expected = model.generate(tokens()[:, :30], **GREEDY)
    model.save_pretrained(tmp_path / "model")
    parts = ["model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {"model.embed_tokens": "disk"} | dict.fromkeys(parts, "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float64
    )
    dispatched = dispatch_model(copy.deepcopy(model), device_map, offload_dir=tmp_path / "dispatched")
    for other in (loaded.eval(), dispatched):
        assert other.model.embed_tokens.weight.is_meta
        check_generates(other)
        torch.testing.assert_close(other.generate(tokens()[:, :30], **GREEDY), expected)
    cache = MultipoleCache(config=loaded.config)
    _, cache = run(loaded, tokens(), [TOKENS], cache=cache)
    with pytest.raises(ValueError, match="embed_tokens.weight is offloaded: states of a model are saved and loaded while all"):
        cache.save(tmp_path / "state")
    whole = MultipoleCache(config=model.config)
    run(model, tokens(), [TOKENS], cache=whole)
    whole.save(tmp_path / "state")
    with pytest.raises(ValueError, match="embed_tokens.weight is offloaded"):
        MultipoleCache.load(tmp_path / "state", loaded)

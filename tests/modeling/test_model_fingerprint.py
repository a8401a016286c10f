"""A saved state belongs to what a model computes: to its weights, however they are packed, and to the adapters that are active."""

import copy
import hashlib
import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_multipole import MultipoleCache
from hf_multipole.modeling.model_fingerprint import fingerprint
from tests.helpers.cache_runs import run
from tests.helpers.packed_layers import pack, quantize
from tests.helpers.tiny_models import CLOSE, build, randomise, tokens

READ = 40


def stock(dtype=torch.float64, **_):
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**sizes, multipole={"block_size": 8, "rank": 2}, pad_token_id=0)
    torch.manual_seed(0)
    return randomise(LlamaForCausalLM._from_config(config, attn_implementation="multipole")).to(dtype).eval()


def save(model, path):
    """A state of what ``model`` reads; returns the logits of what comes next."""
    cache = MultipoleCache(config=model.config)
    run(model, tokens(), [READ], cache=cache)
    cache.bind(model)
    cache.save(path)
    return run(model, tokens(), [10], cache=cache)[0]


def check_goes_on(model, path, expected):
    torch.testing.assert_close(run(model, tokens(), [10], cache=MultipoleCache.load(path, model))[0], expected, atol=0, rtol=0)


def check_refused(model, path):
    with pytest.raises(ValueError, match="state of another model: weights, adapters, dtype or configuration differ; read the text again"):
        MultipoleCache.load(path, model)


def adapted(model, name="first", seed=1):
    """With a LoRA adapter of this name, that does something."""
    torch.manual_seed(seed)
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, options)
    else:
        model = peft.get_peft_model(copy.deepcopy(model), options, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, x in model.named_parameters():
            if f".{name}." in parameter:
                x.add_(torch.randn(x.shape, generator=generator) * 0.3)
    return model.to(torch.float64).eval()


@pytest.mark.parametrize("make", [build, stock])
def test_adapters(make, tmp_path):
    """The one that was active when the text was read, and no other, whatever others are loaded beside it."""
    path, base = tmp_path / "state", make()
    model = adapted(adapted(base), "second", seed=2)
    model.set_adapter("first")
    expected = save(model, path)
    check_goes_on(model, path, expected)
    check_goes_on(adapted(base), path, expected)
    model.set_adapter("second")
    check_refused(model, path)
    check_refused(base, path)
    check_refused(adapted(base, seed=3), path)
    model.set_adapter("first")
    with model.disable_adapter():
        check_refused(model, path)
        without = save(model, tmp_path / "without")
        assert not torch.equal(without, expected)
        model.set_adapter("second")
        check_goes_on(model, tmp_path / "without", without)
    check_refused(model, tmp_path / "without")
    model.set_adapter("first")
    check_goes_on(model, path, expected)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("first", 2.0)
    check_refused(model, path)


@pytest.mark.parametrize("change", [pack, quantize])
@pytest.mark.parametrize("make", [build, stock])
def test_packed_weights(make, change, tmp_path):
    base = make(dtype=torch.float32)
    path, model = tmp_path / "state", change(base)
    expected = save(model, path)
    check_goes_on(change(base), path, expected)
    check_refused(base, path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight[3, 5] += 0.1
    check_refused(change(other), path)
    with torch.no_grad():
        other.load_state_dict(base.state_dict())
        other.model.layers[1].self_attn.v_proj.weight.mul_(2)  # the same integers, with other scales
    check_refused(change(other), path)


def test_what_does_not_count(tmp_path):
    """The head, the gradient, what was computed before: they change nothing of what a state holds."""
    model = build()
    expected = save(model, tmp_path / "state")
    with torch.no_grad():
        model.set_output_embeddings(nn.Linear(32, 50, bias=False, dtype=torch.float64))
    before, _ = run(model, tokens(), [10], cache=MultipoleCache.load(tmp_path / "state", model))
    assert before.shape == expected.shape
    model.requires_grad_(False)
    check_goes_on(model, tmp_path / "state", before)


def test_every_tensor_counts():
    """Of what a model saves, beside its head: a change of any of them is another model."""
    for model in (build(tie_word_embeddings=False), pack(build(layer_types=["tensor_attention", "multipole_attention"]))):
        first, found = fingerprint(model), set()
        state = {name: x for name, x in model.state_dict().items() if not name.startswith("lm_head")}
        with torch.no_grad():
            for x in state.values():
                before = x.clone()
                x.view(-1)[-1] += 1
                found.add(fingerprint(model))
                x.copy_(before)
        assert fingerprint(model) == first and first not in found and len(found) == len(state)


def test_the_fingerprint_of_a_plain_model_is_that_of_its_parameters(tmp_path):
    """So that files that are there stay good: the configuration, then name, shape, dtype and bytes of each parameter."""
    model = build().model
    skipped = "dropout _token_id output_ initializer_range far_bias_init use_cache return_dict version architectures auto_map dtype".split()
    skipped += ["id2label", "label2id", "problem_type", "tie_word_embeddings"]
    skipped += ["sink_tokens", "saliency"]  # which came later, where they are not set
    fields = {name: x for name, x in model.config.to_dict().items() if not any(part in f"{name}_" for part in skipped)}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, x in model.named_parameters():
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode() + x.detach().numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()
    found = set()
    for sinks in (0, 3, None):
        model.config.sink_tokens = sinks
        found.add(fingerprint(model))
    assert len(found) == 3


def test_a_file_of_before(tmp_path):
    """A file of format 3, put together by hand: one tensor for each ring, one for the keys of exact layers, and the rest as JSON."""
    model, ids = build(layer_types=["multipole_attention", "full_attention", "tensor_attention"], tensor_window=[3, 9]), tokens()
    cache = MultipoleCache(config=model.config, rollback=8)
    run(model, ids, [READ], cache=cache)
    state, exact, window = cache.layers[0].state, cache.layers[1], cache.layers[2]
    rows = [{"length": READ, "begin": 0, "longest": READ, "position": READ}] * 2
    sizes = {"block_size": 8, "rank": 2, "spare": 1, "ring": 24, "groups": 4, "max_levels": state.max_levels, "direct": False}
    layers = [sizes | {"seen": READ, "rows": rows}, {"seen": READ}, {"seen": READ, "window": 9, "entry_bound": None, "counts": []}]
    tensors = {"0.keys": state.keys.slots, "0.values": state.values.slots, "1.keys": exact.keys, "1.values": exact.values}
    tensors |= {"2.keys": window.keys.contiguous(), "2.values": window.values.contiguous()}
    metadata = {"format": "hf_multipole state 3", "model": fingerprint(model), "layers": json.dumps(layers)}
    save_file(tensors, tmp_path / "state", metadata)
    assert window.keys.shape[2] == 9 - 1 + 8
    expected, _ = run(model, ids, [1, 9], cache=cache)
    loaded = MultipoleCache.load(tmp_path / "state", model)
    torch.testing.assert_close(run(model, ids, [1, 9], cache=loaded)[0], expected, atol=0, rtol=0)
    torch.testing.assert_close(expected, model(ids, use_cache=False).logits[:, READ : READ + 10], **CLOSE)
    save_file(tensors, tmp_path / "state", metadata | {"format": "hf_multipole state 2"})
    with pytest.raises(ValueError, match="not a state file of this version: its format is 'hf_multipole state 2'"):
        MultipoleCache.load(tmp_path / "state", model)

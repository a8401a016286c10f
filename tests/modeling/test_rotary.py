"""Kinds of rotary positions whose frequencies depend on the length of a text: with a cache as without, or refused."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_multipole import MultipoleCache
from hf_multipole.modeling.rotary import MultipoleRotaryEmbedding
from tests.helpers.cache_runs import run
from tests.helpers.tiny_models import BLOCK, CLOSE, build, pad, tiny_config, tokens

LIMIT = 5 * BLOCK
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 8.0, 16.0], "original_max_position_embeddings": LIMIT}
ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    "longrope": {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0} | LONG,
}
LAYERS = [
    ["multipole_attention"] * 2,
    ["multipole_linear_attention", "full_attention"],
    ["full_attention", "multipole_attention"],
    ["tensor_attention", "multipole_attention"],
]
GREEDY = {"do_sample": False, "eos_token_id": None}
READ_ANEW = "other angles when the text grows from {} to {} tokens: read the whole text at once into a new cache, or pass use_cache=False"


def model_of(rope, layers=LAYERS[0], **options):
    options |= {"max_position_embeddings": LIMIT if rope == "dynamic" else 4 * LIMIT}
    return build(layer_types=layers, rope_parameters=ROPES[rope], **options)


def full(model, ids, mask=None):
    """One pass of a model that has run nothing before."""
    with torch.no_grad():
        return copy.deepcopy(model)(ids, attention_mask=mask, use_cache=False).logits


@pytest.fixture(params=ROPES)
def rope(request):
    return request.param


def test_angles_are_those_of_transformers(rope):
    """Of texts on either side of the limit and at it, and whatever was run before."""
    config = tiny_config(rope_parameters=ROPES[rope], max_position_embeddings=LIMIT if rope == "dynamic" else 4 * LIMIT)
    ours, x = MultipoleRotaryEmbedding(config), torch.zeros(1)
    fields = dict(hidden_size=32, num_attention_heads=4, rope_parameters=ROPES[rope])
    found = []
    for n in (LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT, 3 * LIMIT, LIMIT + 1, 2 * LIMIT, LIMIT, 5):
        theirs = LlamaRotaryEmbedding(LlamaConfig(max_position_embeddings=config.max_position_embeddings, **fields))
        position_ids = torch.arange(n)[None]
        found.append(ours(x, position_ids)[0][0, 5 - 1])
        for one, other in zip(ours(x, position_ids), theirs(x, position_ids)):
            assert_close(one, other, atol=0, rtol=0)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2]) and torch.equal(found[2], found[5])


def test_a_pass_does_not_depend_on_those_before(rope):
    model = model_of(rope)
    short, longer = tokens(n=LIMIT + 9), tokens(n=3 * LIMIT)
    expected = full(model, short)
    full_in_place = [model(ids, use_cache=False).logits for ids in (short, longer, short)]
    assert_close(full_in_place[0], expected, atol=0, rtol=0)
    assert_close(full_in_place[2], expected, atol=0, rtol=0)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.slow
def test_generation_across_the_limit(rope, layers):
    """The tokens that passes without a cache write, before the limit and after it, for rows of unequal length as well."""
    model, prompt = model_of(rope, layers), tokens(n=LIMIT - 6)
    options = GREEDY | {"max_new_tokens": 14}
    plain = model.generate(prompt, use_cache=False, **options)
    for cache in ({}, {"past_key_values": MultipoleCache(config=model.config)}):
        assert_close(model.generate(prompt, **options, **cache), plain)
    ids, mask = (torch.cat(parts) for parts in zip(pad(prompt[:1]), pad(prompt[1:, 9:], left=9)))
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert_close(model.generate(ids, attention_mask=mask, **options), plain)
    options |= {"attention_mask": mask, "num_beams": 3}
    assert_close(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_speculative_decoding_is_refused(rope):
    """What a model writes would depend on how many candidates it was shown."""
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model_of(rope).generate(tokens(rows=1, n=9), prompt_lookup_num_tokens=3, **GREEDY)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("kind", [DynamicCache, MultipoleCache])
def test_a_cache_is_right_or_refused(rope, layers, kind):
    model, ids = model_of(rope, layers), tokens(n=LIMIT + 9)
    _, cache = run(model, ids, [LIMIT - 3, 1, 2], cache=kind(config=model.config))
    assert_close(run(model, ids, [LIMIT], cache=kind(config=model.config))[0], full(model, ids[:, :LIMIT]), **CLOSE)
    for new in (1, 9):
        with pytest.raises(ValueError, match=READ_ANEW.format(LIMIT, LIMIT + new)):
            run(model, ids, [new], cache=cache)
    cache.crop(-4)
    assert_close(run(model, ids, [4], cache=cache)[0], full(model, ids[:, :LIMIT])[:, -4:], **CLOSE)

    _, cache = run(model, ids, [LIMIT + 3], cache=kind(config=model.config))
    cache.crop(-4)
    with pytest.raises(ValueError, match="other angles"):
        run(model, ids, [1], cache=cache)
    if rope == "longrope":  # one change, which is behind it
        assert_close(run(model, ids, [2, 1, 7], cache=cache)[0], full(model, ids)[:, LIMIT - 1 :], **CLOSE)


def test_a_saved_state_across_the_limit(rope, tmp_path):
    """It remembers its angles; generate reads the text anew where they would change."""
    model, ids = model_of(rope), tokens(n=LIMIT + 9)
    _, cache = run(model, ids, [LIMIT + 3], cache=MultipoleCache(config=model.config))
    cache.crop(-4)
    cache.save(tmp_path / "state")
    loaded = MultipoleCache.load(tmp_path / "state", model)
    with pytest.raises(ValueError, match="other angles"):
        run(model, ids, [1], cache=loaded)
    options = GREEDY | {"max_new_tokens": 5}
    assert_close(model.generate(ids, past_key_values=loaded, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.slow
def test_compiled_steps(rope):
    torch._dynamo.reset()
    model, ids = model_of(rope), tokens(n=LIMIT + 1)
    expected = full(model, ids[:, :LIMIT])
    _, cache = run(model, ids, [LIMIT - 3])
    compiled = torch.compile(model, backend="eager")
    assert_close(run(compiled, ids, [1, 1, 1], cache=cache)[0], expected[:, -3:], **CLOSE)
    with pytest.raises(ValueError, match="other angles"):
        run(compiled, ids, [1], cache=cache)
    torch._dynamo.reset()

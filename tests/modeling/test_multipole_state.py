"""The generation state: the logits of one full forward pass, in whatever pieces a text comes, in memory that does not grow."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_multipole import MultipoleCache
from hf_multipole.modeling.state_attention import StepBias
from tests.helpers.cache_runs import KINDS, LINEAR, run, states
from tests.helpers.tiny_models import BLOCK, CLOSE, HYBRID, RANK, TOKENS, build, same_weights, tokens

# Equality with the full forward


@st.composite
def splits(draw, total):
    """Pieces of a text: single tokens, short ones, long ones."""
    left, out = total, []
    while left:
        piece = min(left, draw(st.one_of(st.just(1), st.integers(1, 2 * BLOCK + 1), st.integers(1, total))))
        repeat = draw(st.integers(1, 12)) if piece == 1 else 1
        out += [piece] * min(repeat, left // piece)
        left = total - sum(out)
    return out


@given(data=st.data(), kind=st.sampled_from(KINDS), block_size=st.sampled_from([1, 2, 8]), padded=st.booleans())
@pytest.mark.slow
def test_any_split_gives_the_full_forward(data, kind, block_size, padded):
    total = data.draw(st.integers(1, 80))
    model = build(block_size=block_size, rank=min(RANK, block_size), **kind)
    ids = tokens(rows=3, n=total, seed=data.draw(st.integers(0, 99)))
    left = [0, *(data.draw(st.integers(0, total)) for _ in range(2))] if padded else [0] * 3
    mask = torch.stack([torch.arange(total) >= count for count in left]).long()
    logits, cache = run(model, ids, data.draw(splits(total)), mask if padded else None)
    with torch.no_grad():
        for row, count in enumerate(left):
            if count < total:
                alone = model(ids[row : row + 1, count:], use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, count:], alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_low_precision_is_as_good_as_the_full_forward(kind, dtype):
    """Both round the same tokens; what the state keeps is float32. So its error is that of the full forward, give or take one
    rounding of the logits and the luck of which way the others go: a factor of 2 on the root mean square."""
    exact = build(dtype=torch.float64, **kind)
    model = same_weights(exact, **kind).to(dtype)
    exact.load_state_dict(model.state_dict())
    ids = tokens(n=120)
    with torch.no_grad():
        true = exact(ids).logits
        full = (model(ids, use_cache=False).logits - true).square().mean().sqrt()
    pieces = (run(model, ids, [50, 7] + [1] * 63)[0] - true).square().mean().sqrt()
    assert pieces <= 2 * full + torch.finfo(dtype).eps * true.square().mean().sqrt()


@pytest.mark.parametrize("chunks", [[1] * 150, [90, 60], [40] + [1] * 20 + [90]])
@pytest.mark.parametrize(
    "kind", [{}, {"summary": "mean"}, {"rotate_summaries": True}, {"layer_types": LINEAR[:1]}, {"far_bias_init": None}], ids=str
)
@pytest.mark.parametrize(("trained", "levels"), [(2 * BLOCK, 0), (8 * BLOCK, 2), (None, 4)])
@pytest.mark.slow
def test_beyond_the_trained_length(trained, levels, kind, chunks):
    """No level was trained, or two of four; or it is not known, and levels are added as the rows grow."""
    model = build(**{"num_hidden_layers": 1, "max_position_embeddings": trained or 8 * BLOCK} | kind)
    for layer in model.model.layers:
        layer.self_attn.far_field.max_length = trained
    ids = tokens(n=150)
    logits, cache = run(model, ids, chunks)
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits, **CLOSE)
    assert all(state.levels == levels for state in states(cache))
    # Rows of different lengths outgrow the levels at different times.
    mask = torch.ones(3, 150, dtype=torch.long)
    mask[1, :45], mask[2, :85] = 0, 0
    logits, _ = run(model, tokens(rows=3, n=150), chunks, mask)
    for row, left in enumerate((0, 45, 85)):
        alone = model(tokens(rows=3, n=150)[row : row + 1, left:], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, left:], alone, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rotate_summaries", [True, False])
def test_exact_implementations_keep_all_keys(implementation, rotate_summaries):
    model = build(rotate_summaries=rotate_summaries, attn_implementation=implementation)
    logits, cache = run(model, tokens(), [40, 1, 1, 33])
    torch.testing.assert_close(logits, model(tokens(), use_cache=False).logits, **CLOSE)
    assert not states(cache) and all(layer.keys.shape[2] == TOKENS for layer in cache.layers)


def test_hybrids():
    model = build(layer_types=HYBRID)
    logits, cache = run(model, tokens(), [40, 1, 1, 33])
    torch.testing.assert_close(logits, model(tokens(), use_cache=False).logits, **CLOSE)
    assert len(states(cache)) == 2 and cache.layers[1].keys.shape[2] == TOKENS


def test_caches_of_other_kinds_keep_all_keys():
    """DynamicCache() without a configuration knows of no state, and the weights of all past tokens need all keys."""
    model = build(rotate_summaries=True)
    full = model(tokens(), use_cache=False, output_attentions=True)
    logits, cache = run(model, tokens(), [40, 1, 34], cache=DynamicCache())
    torch.testing.assert_close(logits, full.logits, **CLOSE)
    with torch.no_grad():
        cache = model(tokens()[:, :40], output_attentions=True).past_key_values
        out = model(tokens()[:, 40:], past_key_values=cache, output_attentions=True)
    torch.testing.assert_close(out.logits, full.logits[:, 40:], **CLOSE)
    torch.testing.assert_close(out.attentions[1], full.attentions[1][:, :, 40:], **CLOSE)


def test_gradients_of_a_pass_that_fills_a_cache():
    model = build()
    grads = []
    for use_cache in (True, False):
        model.zero_grad()
        model(tokens(), use_cache=use_cache).logits.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)
    # The last token reaches its own keys, as in a longer pass; what came before it stays as it is.
    with torch.no_grad():
        cache = model(tokens()[:, :-1]).past_key_values
    model.zero_grad()
    model(tokens()[:, -1:], past_key_values=cache).logits.square().sum().backward()
    assert model.model.layers[0].self_attn.v_proj.weight.grad.abs().max() > 0


# Size


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "max_position_embeddings" not in kind])
@pytest.mark.slow
def test_the_size_does_not_grow(kind):
    model = build(**{"num_hidden_layers": 1, "max_position_embeddings": 1024} | kind)
    sizes = []
    cache = MultipoleCache(config=model.config)
    for _ in range(3):
        run(model, tokens(n=cache.get_seq_length() + 300), [200] + [1] * 100, cache=cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1
    state = states(cache)[0]
    # 64 tokens can be taken back: 8 blocks beside the two that are seen, and 8 groups beside the three of each of 6 levels.
    slots = kind.get("sink_tokens", 0) + (2 + 8) * BLOCK + 6 * (3 + 8) * RANK
    assert state.keys.slots.shape[2] == state.values.slots.shape[2] == slots


@pytest.mark.parametrize("trained", [1024, 4 * BLOCK])
def test_what_a_token_sees_is_worked_out_once_a_block(monkeypatch, trained):
    """On rows that are longer than those of training, too; and anew for another far bias."""
    found = []
    monkeypatch.setattr(StepBias, "_visible", lambda *args, original=StepBias._visible: found.append(1) or original(*args))
    model = build(max_position_embeddings=trained)
    ids = tokens(n=150)
    _, cache = run(model, ids, [10 * BLOCK])
    run(model, ids, [1] * 2 * BLOCK, cache=cache)
    assert len(found) == 2 * len(states(cache))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.far_field.far_bias.add_(1)
    _, other = run(model, ids, [12 * BLOCK])
    for layer, fresh in zip(states(cache), states(other)):
        for name, x in layer.tensors().items():
            x.copy_(fresh.tensors()[name])
    torch.testing.assert_close(run(model, ids, [1] * 4, cache=cache)[0], run(model, ids, [1] * 4, cache=other)[0], **CLOSE)


def test_a_prompt_in_inference_mode_and_steps_outside():
    model = build()
    with torch.inference_mode():
        cache = model(tokens()[:, :41]).past_key_values
        model(tokens()[:, 41:42], past_key_values=cache)
        cache = copy.deepcopy(cache)
    logits, _ = run(model, tokens(), [1] * 33, cache=cache)
    torch.testing.assert_close(logits, model(tokens(), use_cache=False).logits[:, 42:], **CLOSE)


# Going back


@pytest.mark.parametrize("kind", [*KINDS, {"layer_types": HYBRID}])
@pytest.mark.parametrize("rollback", [1, 20, 64])
@pytest.mark.parametrize("length", [80, 130])
@pytest.mark.slow
def test_taking_tokens_back(kind, rollback, length):
    """And going on with others: what was made of the old ones must not be seen."""
    model = build(**kind)
    text = tokens(n=length)
    cache = MultipoleCache(config=model.config, rollback=rollback)
    _, cache = run(model, text, [length], cache=cache)
    kept = -(-rollback // BLOCK) * BLOCK
    for i, (back, again) in enumerate(((1, [1]), (3, [1, 4]), (kept, [kept]), (kept // 2, [1] * (kept // 2)), (2, [1, 1, 33]))):
        cache.crop(-back)
        length = cache.get_seq_length()
        text = torch.cat([text[:, :length], tokens(n=sum(again), seed=i + 7)], 1)
        logits, cache = run(model, text, again, cache=cache)
        torch.testing.assert_close(logits, model(text, use_cache=False).logits[:, length:], **CLOSE)


def test_taking_back_padded_rows():
    model = build()
    ids, mask = tokens(), torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :70] = 0
    logits, cache = run(model, ids, [72, 1, 1], mask)
    cache.crop(-7)  # two columns more than the second row has tokens
    again, cache = run(model, ids, [3, 1, 1, 3], mask, cache)
    torch.testing.assert_close(again[0], model(ids[:1], use_cache=False).logits[0, 67:], **CLOSE)
    torch.testing.assert_close(again[1, 3:], model(ids[1:, 70:], use_cache=False).logits[0], **CLOSE)


def test_taking_back_too_much():
    model = build()
    cache = MultipoleCache(config=model.config, rollback=BLOCK)
    ids = tokens(n=100)
    run(model, ids, [90], cache=cache)
    with pytest.raises(ValueError, match=rf"can take back {BLOCK} more tokens, but 9 .*rollback=9"):
        cache.crop(-9)
    cache.crop(-5)
    with pytest.raises(ValueError, match="can take back 3 more tokens, but 4"):
        cache.crop(-4)
    with pytest.raises(ValueError, match="has seen 85 tokens"):
        cache.crop(-86)
    logits, _ = run(model, ids, [15], cache=cache)
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, 85:], **CLOSE)
    # A short text is there as a whole.
    _, short = run(model, ids, [2 * BLOCK])
    short.crop(-2 * BLOCK)
    assert short.get_seq_length() == 0


@pytest.mark.parametrize("rollback", [0, -1, 1.5, True])
def test_a_rollback_that_is_no_number_of_tokens(rollback):
    with pytest.raises(ValueError, match="rollback is"):
        MultipoleCache(config=build().config, rollback=rollback)

"""The generation state: the logits of one full forward pass, in whatever pieces a text comes."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from hf_multipole import MultipoleCache, extend_context
from hf_multipole.modeling.multipole_state import MultipoleState
from tests.helpers.cache_runs import FULL_FIRST, KINDS, LINEAR, run, states
from tests.helpers.tiny_models import BLOCK, CLOSE, HYBRID, RANK, TOKENS, build, randomise, same_weights, tokens

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
    "kind", [{}, {"summary": "mean"}, {"rotate_summaries": True}, {"layer_types": LINEAR}, {"far_bias_init": None}], ids=str
)
@pytest.mark.parametrize(("trained", "levels"), [(2 * BLOCK, 0), (8 * BLOCK, 2), (None, 4)])
def test_beyond_the_trained_length(trained, levels, kind, chunks):
    """No level was trained, or two of four; or it is not known, and levels are added as the rows grow."""
    model = build(max_position_embeddings=trained or 8 * BLOCK, **kind)
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
def test_the_size_does_not_grow(kind):
    model = build(max_position_embeddings=1024, **kind)
    sizes = []
    cache = MultipoleCache(config=model.config)
    for _ in range(3):
        run(model, tokens(n=cache.get_seq_length() + 300), [200] + [1] * 100, cache=cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1
    state = states(cache)[0]
    # 64 tokens can be taken back: 8 blocks beside the two that are seen, and 8 groups beside the three of each of 6 levels.
    slots = (2 + 8) * BLOCK + 6 * (3 + 8) * RANK
    assert state.keys.slots.shape[2] == state.values.slots.shape[2] == slots


@pytest.mark.parametrize("trained", [1024, 4 * BLOCK])
def test_what_a_token_sees_is_worked_out_once_a_block(monkeypatch, trained):
    """On rows that are longer than those of training, too; and anew for another far bias."""
    found = []
    monkeypatch.setattr(MultipoleState, "_visible", lambda *args, original=MultipoleState._visible: found.append(1) or original(*args))
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


# Rows of the batch


def test_rows_are_reordered_repeated_and_selected():
    model = build()
    ids = tokens(rows=3, n=90)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    ):
        full, cache = run(model, ids, [60, 1], mask)
        change(cache)
        rest, _ = run(model, ids[rows], [1, 20, 1, 7], mask[rows], cache)
        expected, _ = run(model, ids, [61, 29], mask)
        torch.testing.assert_close(rest, expected[rows, 61:], **CLOSE)


def test_copies_are_independent():
    model = build()
    _, cache = run(model, tokens(), [50])
    other = copy.deepcopy(cache)
    first, _ = run(model, tokens(), [1] * 25, cache=cache)
    second, _ = run(model, tokens(), [1] * 25, cache=other)
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_reset():
    model = build()
    logits, cache = run(model, tokens(), [50, 25])
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(run(model, tokens(), [50, 25], cache=cache)[0], logits, atol=0, rtol=0)


# Saving


@pytest.mark.parametrize("kind", [*KINDS, {"layer_types": HYBRID}])
def test_a_saved_state_goes_on(kind, tmp_path):
    model = build(**kind)
    ids, mask = tokens(n=120), torch.ones(2, 120, dtype=torch.long)
    mask[1, :9] = 0
    cache = MultipoleCache(config=model.config, rollback=10)
    run(model, ids, [70, 1, 1], mask, cache)
    cache.save(tmp_path / "state.safetensors")
    expected, _ = run(model, ids, [1] * 30, mask, cache)
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    for _ in range(2):  # asked more than once
        loaded = MultipoleCache.load(tmp_path / "state.safetensors", model)
        assert loaded.get_seq_length() == 72 and loaded.nbytes == sum(x.nbytes for x in _saved(tmp_path / "state.safetensors").values())
        torch.testing.assert_close(run(model, ids, [1] * 30, mask, loaded)[0], expected, atol=0, rtol=0)
        loaded.crop(-5)
    # A question about what was read.
    text, mask = torch.cat([ids[:, :72], ids[:, :4]], 1), mask[:, :76]
    options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=-1)
    loaded = MultipoleCache.load(tmp_path / "state.safetensors", model)
    torch.testing.assert_close(model.generate(text, past_key_values=loaded, **options), model.generate(text, **options))


def _saved(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def test_states_of_other_models_and_damaged_files_are_refused(tmp_path):
    model, path = build(), tmp_path / "state.safetensors"
    _, cache = run(model, tokens(), [40], cache=MultipoleCache(config=model.config))
    cache.save(path)
    with pytest.raises(FileNotFoundError, match="no state file"):
        MultipoleCache.load(tmp_path / "nothing", model)
    for other in (
        randomise(copy.deepcopy(model), seed=9),
        copy.deepcopy(model).float(),
        build(rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
    ):
        with pytest.raises(ValueError, match="state of another model"):
            MultipoleCache.load(path, other)
    content = path.read_bytes()
    for damaged in (content[:-100], content[:5], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged, or not a state file"):
            MultipoleCache.load(path, model)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a state file of this version"):
        MultipoleCache.load(path, model)
    with pytest.raises(ValueError, match="nothing to save"):
        MultipoleCache(config=model.config).save(path)


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    model, path = build(), tmp_path / "state.safetensors"
    _, cache = run(model, tokens(), [40], cache=MultipoleCache(config=model.config))
    cache.save(path)
    before = path.read_bytes()

    def full_disk(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("hf_multipole.modeling.multipole_cache.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        cache.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# Bad input: one clear error, and the state as it was


@pytest.fixture(params=[HYBRID, FULL_FIRST], ids=["multipole first", "full first"])
def filled(request):
    model = build(layer_types=request.param)
    ids, mask = tokens(n=80), torch.ones(2, 80, dtype=torch.long)
    mask[1, :5] = 0
    _, cache = run(model, ids, [60], mask, MultipoleCache(config=model.config, rollback=BLOCK))
    yield model, ids, mask, cache
    rest, _ = run(model, ids, [20], mask, cache)
    expected, _ = run(model, ids, [80], mask)
    torch.testing.assert_close(rest, expected[:, 60:], **CLOSE)


def check_refused(filled, message, ids=None, model=None, error=ValueError, **inputs):
    owner, all_ids, mask, cache = filled
    inputs = {"attention_mask": mask[:, :62]} | inputs
    with pytest.raises(error, match=message), torch.no_grad():
        (model or owner)(all_ids[:, 60:62] if ids is None else ids, past_key_values=cache, **inputs)


def test_another_batch_size(filled):
    check_refused(filled, "batch of 2 rows, but the input has 1", ids=filled[1][:1, 60:62], attention_mask=filled[2][:1, :62])


def test_positions_that_do_not_go_on(filled):
    check_refused(filled, "position_ids go backwards: row 0 continues at 7", position_ids=torch.tensor([[7, 8], [55, 56]]))
    check_refused(filled, "position_ids leave a gap: row 1 continues at 57", position_ids=torch.tensor([[60, 61], [57, 58]]))


def test_packed_rows_have_no_cache():
    model = build()
    position_ids = torch.cat([torch.arange(40), torch.arange(35)])[None]
    with pytest.raises(ValueError, match="position_ids of row 0 do not go up by one"):
        model(tokens(), position_ids=position_ids, past_key_values=MultipoleCache(config=model.config))
    assert model(tokens(), position_ids=position_ids).past_key_values is None
    with pytest.raises(ValueError, match="rotate_summaries needs position_ids that go up by one"):
        build(rotate_summaries=True)(tokens(), position_ids=position_ids, attention_mask=torch.ones(2, TOKENS, dtype=torch.long))


def test_cropping_too_far(filled):
    with pytest.raises(ValueError, match="can take back 8 more tokens"):
        filled[3].crop(-30)


def test_a_cache_of_what_is_no_configuration():
    with pytest.raises(ValueError, match="config=model.config.*is a MultipoleForCausalLM"):
        MultipoleCache(build())


def test_exact_attention_on_a_state(filled):
    model = filled[0]
    model.set_attn_implementation("sdpa")
    check_refused(filled, "has dropped the older keys")
    model.set_attn_implementation("multipole")


def test_a_model_of_other_layers(filled):
    owner, _, _, cache = filled
    cache._model = None  # as if it were an ordinary DynamicCache
    check_refused(filled, "made for a model of . layers, but this one has 4", model=build(layer_types=["multipole_attention"] * 4))
    cache._model = None
    check_refused(filled, "filled by another model: its block_size", model=build(layer_types=owner.config.layer_types, block_size=4))
    cache._model = None
    check_refused(filled, "filled by another model: it holds", model=build(layer_types=owner.config.layer_types, head_dim=4))
    cache._model = None


@pytest.mark.parametrize("columns", [slice(0, 5), slice(0, 4), slice(0, 8)])
def test_a_mask_that_contradicts_the_state(filled, columns):
    mask = torch.ones(2, 62, dtype=torch.long)
    mask[1, columns] = 0
    if columns == slice(0, 5):
        mask[0, 0] = 0
    check_refused(filled, "attention_mask contradicts the cache", attention_mask=mask)


def test_a_mask_that_is_left_out(filled):
    check_refused(filled, "attention_mask contradicts the cache: row 1 began with 5", attention_mask=None)


def test_a_mask_of_the_wrong_length(filled):
    check_refused(filled, "attention_mask has shape", attention_mask=filled[2][:, :61])


def test_padding_within_a_row(filled):
    mask = filled[2][:, :62].clone()
    mask[0, 60] = 0
    check_refused(filled, "padding between the tokens of the cache and the new ones in row 0", attention_mask=mask)


def test_weights_of_dropped_tokens(filled):
    check_refused(filled, "has dropped the older keys", output_attentions=True)


def test_dropout_in_generation():
    model = build(attention_dropout=0.1)
    _, cache = run(model, tokens(), [40])
    with pytest.raises(ValueError, match="no dropout.*eval"):
        model.train()(tokens()[:, 40:], past_key_values=cache)


@pytest.mark.parametrize("chunks", [[79], [20, 20, 39], [40] + [1] * 39])
@pytest.mark.parametrize("left", [0, 3])
def test_padding_after_the_tokens(chunks, left):
    """A right-padded batch can be read, in pieces as well, but such a row cannot be continued."""
    model = build()
    ids, mask = tokens(n=79), torch.ones(2, 79, dtype=torch.long)
    mask[1, 20:], mask[1, :left] = 0, 0
    logits, cache = run(model, ids, chunks, mask)
    torch.testing.assert_close(logits[1, left:20], model(ids[1:, left:20], use_cache=False).logits[0], **CLOSE)
    torch.testing.assert_close(logits[0], model(ids[:1], use_cache=False).logits[0], **CLOSE)
    with pytest.raises(ValueError, match="padding between the tokens of the cache"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1))


def test_an_interrupted_call(monkeypatch):
    """Nothing was taken in by the layer that failed; layers that are out of step are noticed."""
    model = build()
    _, cache = run(model, tokens(), [40])
    attend, calls = MultipoleState._attend_rows, []

    def fail(self, *arguments):
        calls.append(1)
        if len(calls) == failing:
            raise MemoryError
        return attend(self, *arguments)

    monkeypatch.setattr(MultipoleState, "_attend_rows", fail)
    failing = 1
    with pytest.raises(MemoryError):
        run(model, tokens(), [35], cache=cache)
    logits, _ = run(model, tokens(), [3, 2], cache=cache)
    torch.testing.assert_close(logits, model(tokens(), use_cache=False).logits[:, 40:45], **CLOSE)
    calls.clear()
    failing = 2
    with pytest.raises(MemoryError):
        run(model, tokens(), [30], cache=cache)
    with pytest.raises(ValueError, match="an earlier call was interrupted"):
        model(tokens()[:, :3], past_key_values=cache)


def test_another_model():
    model = build()
    _, cache = run(model, tokens(), [40])
    for other in (build(head_dim=4), build(num_key_value_heads=4), build(dtype=torch.float32), build(block_size=4)):
        with pytest.raises(ValueError, match="filled by another model"):
            run(other, tokens(), [1], cache=cache)
    # The same sizes, but other weights: a MultipoleCache knows its model, and so does its copy, but not one that went through pickle.
    _, cache = run(model, tokens(), [40], cache=MultipoleCache(config=model.config))
    for known in (cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match="filled by another model"):
            run(copy.deepcopy(model), tokens(), [1], cache=known)
    run(copy.deepcopy(model), tokens(), [1], cache=pickle.loads(pickle.dumps(cache)))
    logits, _ = run(model, tokens(), [35], cache=cache)
    torch.testing.assert_close(logits, model(tokens(), use_cache=False).logits[:, 40:], **CLOSE)


@pytest.mark.parametrize("kind", [{}, {"layer_types": LINEAR}], ids=str)
def test_a_model_that_was_extended(kind):
    """What the farther levels hold was dropped; and a state may have more levels than another model has."""
    ids = tokens(n=150)
    for before, after in ((8 * BLOCK, 200), (2 * BLOCK, 8 * BLOCK)):
        model = build(max_position_embeddings=before, **kind)
        _, cache = run(model, ids, [100])
        other = extend_context(copy.deepcopy(model), after)
        _, longer = run(other, ids, [100])
        for used, held in ((other, cache), (model, longer)):
            with pytest.raises(ValueError, match="begun with another context"):
                run(used, ids, [1], cache=held)
        logits, _ = run(model, ids, [1, 49], cache=cache)
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, 100:], **CLOSE)


def test_direct_summaries_beyond_their_length():
    model = build(summary="direct", max_position_embeddings=64)
    ids = tokens(n=130)
    _, cache = run(model, ids, [60])
    with pytest.raises(ValueError, match="at most 64 tokens"):
        run(model, ids, [70], cache=cache)
    logits, _ = run(model, ids, [4], cache=cache)
    torch.testing.assert_close(logits, model(ids[:, :64], use_cache=False).logits[:, 60:], **CLOSE)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        run(model, ids, [1] * 66, cache=cache)


def test_a_bidirectional_model_has_no_cache():
    model = build(is_causal=False)
    assert model(tokens(), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values.*is_causal=False.*use_cache=False"):
        model(tokens(), past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="bidirectional.*is_causal=False"):
        model.generate(tokens(), max_new_tokens=2)


def test_a_cache_is_kept_only_where_it_can_be_used():
    model = build()
    assert model(tokens()).past_key_values.get_seq_length() == TOKENS
    assert model(tokens(), use_cache=False).past_key_values is None
    assert build(use_cache=False)(tokens()).past_key_values is None
    assert model.train()(tokens()).past_key_values is None


def test_the_saved_description_is_json(tmp_path):
    model = build()
    _, cache = run(model, tokens(), [40], cache=MultipoleCache(config=model.config))
    cache.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        layers = json.loads(file.metadata()["layers"])
    assert [[row["length"] for row in layer["rows"]] for layer in layers] == [[40, 40]] * 2

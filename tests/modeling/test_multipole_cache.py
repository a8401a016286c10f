"""The cache of multipole attention: its rows, saved states, and what it refuses."""

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from hf_multipole import MultipoleCache, extend_context
from hf_multipole.modeling.multipole_state import MultipoleState
from tests.helpers.cache_runs import FULL_FIRST, KINDS, LINEAR, run
from tests.helpers.tiny_models import BLOCK, CLOSE, HYBRID, TOKENS, build, randomise, tokens

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
@pytest.mark.slow
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


@pytest.mark.parametrize("kind", [{}, {"layer_types": LINEAR}, {"summary": "direct"}], ids=str)
def test_a_state_saved_before_there_were_sinks_goes_on(kind, tmp_path, monkeypatch):
    model, path = build(**kind), tmp_path / "state.safetensors"
    _, cache = run(model, tokens(), [40], cache=MultipoleCache(config=model.config))
    fields = {name: x for name, x in model.config.to_dict().items() if name not in ("sink_tokens", "saliency")}
    with monkeypatch.context() as patch:
        patch.setattr(type(model.config), "to_dict", lambda self: fields)
        cache.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {"format": "hf_multipole state 3"}
    layers = [
        {name: x for name, x in layer.items() if name not in ("sinks", "sink_tokens", "salient")}
        for layer in json.loads(metadata["layers"])
    ]
    save_file(_saved(path), path, metadata | {"layers": json.dumps(layers)})
    expected, _ = run(model, tokens(), [1] * 35, cache=cache)
    torch.testing.assert_close(run(model, tokens(), [1] * 35, cache=MultipoleCache.load(path, model))[0], expected, atol=0, rtol=0)


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
    with pytest.raises(ValueError, match="position_ids start anew within a row"):
        model(tokens(), position_ids=position_ids, past_key_values=MultipoleCache(config=model.config))
    assert model(tokens(), position_ids=position_ids).past_key_values is None
    # A mask that hides nothing says nothing.
    rotated, mask = build(rotate_summaries=True), torch.ones(2, TOKENS, dtype=torch.long)
    masked = rotated(tokens(), position_ids=position_ids, attention_mask=mask)
    assert masked.past_key_values is None and torch.equal(masked.logits, rotated(tokens(), position_ids=position_ids).logits)


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


@pytest.mark.parametrize("own", [{}, {"sink_tokens": 3}, {"saliency": True}], ids=str)
@pytest.mark.parametrize("other", [{}, {"sink_tokens": 4}, {"saliency": True, "sink_tokens": 3}], ids=str)
def test_a_model_of_other_sinks_or_masses(own, other):
    model = build(**own)
    _, cache = run(model, tokens(), [40])
    if own != other:
        with pytest.raises(ValueError, match="filled by another model: it has . sinks and .*masses of tokens, but this model has . sinks"):
            run(build(**other), tokens(), [1], cache=cache)
    logits, _ = run(model, tokens(), [1, 34], cache=cache)
    torch.testing.assert_close(logits, model(tokens(), use_cache=False).logits[:, 40:], **CLOSE)


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

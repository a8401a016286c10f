"""The generation state of tensor layers: the logits of one full forward pass, in whatever pieces a text comes, and generation."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_multipole import MultipoleCache
from hf_multipole.modeling.tensor_cache import TensorLayer
from tests.helpers.tiny_models import CLOSE, build, pad, randomise, tokens

TENSOR = ["tensor_attention"] * 2
HYBRID = ["multipole_attention", "tensor_attention", "full_attention"]
POLYNOMIAL = {"tensor_method": "polynomial", "tensor_score_dim": 3, "tensor_entry_bound": 0.8}
WINDOW = {"tensor_window": [3, 9]}
KINDS = [
    {"tensor_order": 3},
    WINDOW,
    {"tensor_window": [1, 1], "tensor_order": 3},
    {"tensor_window": [2, None]},
    {"tensor_order": 4, "tensor_window": [2, 5, 3]},
    POLYNOMIAL,
    POLYNOMIAL | {"tensor_order": 2},
    POLYNOMIAL | {"tensor_order": 4, "tensor_degree": 2},
]
N = 30


@pytest.fixture
def short(monkeypatch):
    """A layer that drops tokens at once, so that short texts show it."""
    monkeypatch.setattr(TensorLayer, "rollback", 2)


def run(model, ids, chunks, mask=None, cache=None):
    """Logits of a text that comes in pieces, and the cache."""
    done, logits = 0 if cache is None else cache.get_seq_length(), []
    with torch.no_grad():
        for chunk in chunks:
            part = slice(done, done + chunk)
            done += chunk
            inputs = {} if mask is None else {"attention_mask": mask[:, :done]}
            out = model(ids[:, part], past_key_values=cache, use_cache=True, **inputs)
            cache = out.past_key_values
            assert cache.get_seq_length() == done
            logits.append(out.logits)
    return torch.cat(logits, 1), cache


def full(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def generate(model, prompt, count=20, **options):
    return model.generate(prompt, max_new_tokens=count, **{"do_sample": False, "eos_token_id": None} | options)


# Equality with the full forward


@st.composite
def splits(draw, total):
    left, out = total, []
    while left:
        out.append(draw(st.integers(1, left)))
        left -= out[-1]
    return out


@settings(max_examples=40)
@given(data=st.data(), kind=st.sampled_from(KINDS), layers=st.sampled_from([TENSOR[:1], HYBRID]), padded=st.booleans())
@pytest.mark.slow
def test_any_split_gives_the_full_forward(data, kind, layers, padded):
    model, ids, mask = build(layer_types=layers, **kind), tokens(rows=3, n=N), None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :7], mask[1, :N] = 0, 0
    chunks = data.draw(splits(N))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorLayer, "rollback", 2)
        logits, _ = run(model, ids, chunks, mask)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(logits[real], full(model, ids, mask)[real], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token(kind, short):
    """Rows of unequal length, padded on the left, after a prompt that one row has not begun in."""
    model, ids = build(layer_types=TENSOR, **kind), tokens(rows=3, n=N)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :14] = 0, 0
    logits, cache = run(model, ids, [12] + [1] * (N - 12), mask)
    torch.testing.assert_close(logits[mask.bool()], full(model, ids, mask)[mask.bool()], **CLOSE)
    assert all(type(layer) is TensorLayer for layer in cache.layers)


@pytest.mark.parametrize("kind", [WINDOW, POLYNOMIAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_the_full_forward(kind, dtype):
    model, ids = build(layer_types=TENSOR, **kind), tokens(n=N)
    exact, lower = full(model, ids), copy.deepcopy(model).to(dtype)
    one, steps = ((x.double() - exact).square().mean().sqrt() for x in (full(lower, ids), run(lower, ids, [10] + [1] * 20)[0]))
    assert 0 < steps < 2 * one


@pytest.mark.parametrize("kind", [{}, WINDOW, POLYNOMIAL])
def test_autocast(kind):
    """Steps within it, on a cache that was filled outside, are as good as a full forward within it."""
    model, ids = build(layer_types=TENSOR, dtype=torch.float32, **kind), tokens(n=N)
    exact, (_, cache) = full(model, ids), run(model, ids, [10])
    with torch.autocast("cpu", torch.bfloat16):
        one, steps = full(model, ids), run(model, ids, [1] * 20, cache=cache)[0]
    one, steps = ((x[:, -20:] - exact[:, -20:]).square().mean().sqrt() for x in (one, steps))
    assert 0 < steps < 2 * one


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_other_kinds_keep_all_keys(kind):
    model, ids = build(layer_types=TENSOR, **kind), tokens(n=N)
    logits, cache = run(model, ids, [11, 1, 1, 17], cache=DynamicCache())
    torch.testing.assert_close(logits, full(model, ids), **CLOSE)
    assert cache.layers[0].keys.shape[2] == N


@pytest.mark.parametrize("kind", [WINDOW, POLYNOMIAL])
def test_the_size_does_not_grow(kind):
    model = build(layer_types=TENSOR, **kind)
    cache, sizes = MultipoleCache(config=model.config), []
    for _ in range(3):
        _, cache = run(model, torch.cat([tokens(n=100)] * 3, 1), [90], cache=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1] == sizes[2] > 0
    largest = {tuple(x.shape) for layer in cache.layers for x in layer.kept.tensors().values()}
    # Of keys and values: two indices of two heads; the window and what can be taken back. Of sums: C(3 + degree, degree) features.
    degree = len(model.model.layers[0].self_attn.approximation(torch.float64).coefficients) - 1 if kind is POLYNOMIAL else None
    features = (degree + 3) * (degree + 2) * (degree + 1) // 6 if degree else None
    assert largest == ({(2, 4, 9 - 1 + 64, 8)} if degree is None else {(2, 2, 2, features, 9)})


@pytest.mark.parametrize("kind", [WINDOW, POLYNOMIAL])
def test_a_prompt_in_inference_mode_and_steps_outside(kind):
    model, ids = build(layer_types=HYBRID, **kind), tokens(n=N)
    with torch.inference_mode():
        cache = model(ids[:, :20], use_cache=True).past_key_values
    step = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(step, full(model, ids)[:, 20:], **CLOSE)
    step.sum().backward()


@pytest.mark.parametrize("kind", [WINDOW, POLYNOMIAL])
def test_gradients_of_a_pass_that_fills_a_cache(kind):
    model, ids = build(layer_types=TENSOR, **kind), tokens(n=N)
    found = []
    for use_cache in (True, False):
        model.zero_grad()
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1], **CLOSE)


# What generate does with a cache


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_reordered_repeated_and_selected(kind, short):
    model, ids = build(layer_types=TENSOR, **kind), tokens(rows=3, n=N)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    for change, index in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([0, 2])), [0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        _, cache = run(model, ids, [20], mask)
        change(cache)
        other, kept = ids[index], mask[index]
        torch.testing.assert_close(run(model, other, [4, 6], kept, cache)[0], full(model, other, kept)[:, 20:], **CLOSE)


@pytest.mark.parametrize("kind", [WINDOW, POLYNOMIAL])
def test_copies_and_reset(kind):
    model, ids = build(layer_types=TENSOR, **kind), tokens(n=N)
    _, cache = run(model, ids, [20])
    others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected = full(model, ids)
    for other in (cache, *others):
        torch.testing.assert_close(run(model, ids, [10], cache=other)[0], expected[:, 20:], **CLOSE)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(run(model, ids, [N], cache=cache)[0], expected, **CLOSE)


@pytest.mark.parametrize("kind", [{}, WINDOW, {"tensor_window": [1, 1]}])
def test_taking_tokens_back(kind):
    model, ids = build(layer_types=HYBRID, **kind), tokens(n=100)
    expected = full(model, ids)
    cache = MultipoleCache(config=model.config, rollback=8)
    _, cache = run(model, ids, [60], cache=cache)
    cache.crop(-8)
    assert cache.get_seq_length() == 52
    torch.testing.assert_close(run(model, ids, [1, 47], cache=cache)[0], expected[:, 52:], **CLOSE)


def test_taking_back_too_much():
    model, ids = build(layer_types=TENSOR, **WINDOW), tokens(n=60)
    cache = MultipoleCache(config=model.config, rollback=8)
    _, cache = run(model, ids, [40], cache=cache)
    with pytest.raises(ValueError, match="can take back 8 more tokens, but 9 were asked for.*rollback=9"):
        cache.crop(-9)
    cache.crop(-5)
    with pytest.raises(ValueError, match="can take back 3 more tokens, but 4"):
        cache.crop(-4)
    torch.testing.assert_close(run(model, ids, [25], cache=cache)[0], full(model, ids)[:, 35:], **CLOSE)


@pytest.mark.parametrize("layers", [TENSOR, ["multipole_attention", "full_attention", "tensor_attention"]])
def test_sums_take_no_token_back(layers):
    """And the layers before keep theirs, too."""
    model, ids = build(layer_types=layers, **POLYNOMIAL), tokens(n=N)
    _, cache = run(model, ids, [20], cache=MultipoleCache(config=model.config))
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="tensor_method='polynomial' keeps sums, from which no token can be taken back"):
        cache.crop(-1)
    cache.crop(0)
    torch.testing.assert_close(run(model, ids, [10], cache=cache)[0], full(model, ids)[:, 20:], **CLOSE)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, ids, prompt_lookup_num_tokens=3)


# generate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [TENSOR, HYBRID])
@pytest.mark.slow
def test_greedy_generation(kind, layers, short):
    model, prompt = build(layer_types=layers, **kind), tokens(n=15)
    out = generate(model, prompt)
    torch.testing.assert_close(out[:, 15:], full(model, out)[:, 14:-1].argmax(-1))

    # Rows of unequal length, padded on the left.
    ids, mask = (torch.cat(parts) for parts in zip(pad(prompt[:1]), pad(prompt[1:, 6:], left=6)))
    batch = generate(model, ids, attention_mask=mask)
    torch.testing.assert_close(batch[0], out[0])
    torch.testing.assert_close(batch[1, 15:], generate(model, prompt[1:, 6:])[0, 9:])


@pytest.mark.parametrize("kind", [{}, WINDOW, POLYNOMIAL])
@pytest.mark.slow
def test_beam_search_and_sampling(kind, short):
    model, prompt = build(layer_types=HYBRID, **kind), tokens(n=15)
    beams = dict(num_beams=4, length_penalty=0.0, return_dict_in_generate=True, output_scores=True)
    out = generate(model, prompt, **beams)
    score = full(model, out.sequences)[:, 14:-1].log_softmax(-1).gather(2, out.sequences[:, 15:, None]).sum((1, 2))
    # Transformers computes scores in float32.
    torch.testing.assert_close(out.sequences_scores.double(), score, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out.sequences, generate(model, prompt, use_cache=False, **beams).sequences)

    outs = []
    for use_cache in (True, False):
        torch.manual_seed(2)
        options = dict(do_sample=True, top_k=20, temperature=0.9, num_return_sequences=3)
        outs.append(generate(model, prompt, use_cache=use_cache, **options))
    torch.testing.assert_close(outs[0], outs[1])


@pytest.mark.parametrize("kind", [{}, WINDOW])
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}, {"prefill_chunk_size": 7}])
def test_other_ways_of_generating(options, kind):
    model, prompt, options = build(layer_types=HYBRID, **kind), tokens(rows=1, n=15), dict(options)
    if options.pop("assistant", False):
        options["assistant_model"] = randomise(copy.deepcopy(model), seed=4)
    torch.testing.assert_close(generate(model, prompt, **options), generate(model, prompt))


def test_the_prompt_of_sums_in_pieces():
    model, prompt = build(layer_types=HYBRID, **POLYNOMIAL), tokens(n=15)
    torch.testing.assert_close(generate(model, prompt, prefill_chunk_size=7), generate(model, prompt))


def test_going_on_from_a_returned_cache():
    model, prompt = build(layer_types=HYBRID, **POLYNOMIAL), tokens(n=15)
    first = generate(model, prompt, 8, return_dict_in_generate=True)
    again = generate(model, first.sequences, 12, past_key_values=first.past_key_values)
    torch.testing.assert_close(again, generate(model, prompt, 20))


@pytest.mark.parametrize("kind", [WINDOW, POLYNOMIAL])
def test_an_offloaded_cache(kind):
    model, prompt = build(layer_types=HYBRID, **kind), tokens(n=15)
    _, cache = run(model, prompt, [15])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    nxt = torch.cat([prompt, prompt[:, :1]], 1)
    torch.testing.assert_close(run(model, nxt, [1], cache=cache)[0], full(model, nxt)[:, 15:], **CLOSE)


@pytest.mark.parametrize("kind", [WINDOW, POLYNOMIAL])
@pytest.mark.parametrize("layers", [TENSOR[:1], HYBRID[:2]])
@pytest.mark.slow
def test_compiled_steps(kind, layers):
    """Tensor layers run outside of the compiled code, and what comes out is the same."""
    model, ids = build(layer_types=layers, **kind), tokens(n=N)
    expected = full(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    _, cache = run(model, ids, [20])
    torch.testing.assert_close(run(compiled, ids, [1, 1, 1], cache=cache)[0], expected[:, 20:23], **CLOSE)


# Files


@pytest.mark.parametrize("kind", [{}, WINDOW, {"tensor_window": [2, None]}])
def test_a_saved_window_goes_on(tmp_path, kind):
    model, ids = build(layer_types=HYBRID, **kind), tokens(n=100)
    cache = MultipoleCache(config=model.config, rollback=8)
    _, cache = run(model, ids, [80], cache=cache)
    cache.save(tmp_path / "state.safetensors")
    loaded = MultipoleCache.load(tmp_path / "state.safetensors", model)
    assert loaded.get_seq_length() == 80
    for one in (cache, loaded):
        one.crop(-3)
    torch.testing.assert_close(run(model, ids, [1, 22], cache=loaded)[0], full(model, ids)[:, 77:], **CLOSE)


def test_saved_sums_go_on(tmp_path):
    model, ids = build(layer_types=["tensor_attention", "full_attention"], **POLYNOMIAL), tokens(n=N)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    _, cache = run(model, ids, [20], mask, MultipoleCache(config=model.config))
    cache.save(tmp_path / "state.safetensors")
    loaded = MultipoleCache.load(tmp_path / "state.safetensors", model)
    torch.testing.assert_close(run(model, ids, [1, 9], mask, loaded)[0], full(model, ids, mask)[:, 20:], **CLOSE)
    loaded = MultipoleCache.load(tmp_path / "state.safetensors", model)
    with pytest.raises(ValueError, match=r"its rows have \[20, 20\] tokens before the new ones, but \[13, 20\] were read"):
        model(ids[:, 20:], past_key_values=loaded)


# What does not fit


def refused(model, ids, cache, message, **inputs):
    """One clear error, after which the cache is as it was."""
    seen = cache.get_seq_length()
    before = full(model, ids)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        (inputs.pop("other", model))(**{"input_ids": ids[:, seen : seen + 1]} | inputs, past_key_values=cache)
    assert cache.get_seq_length() == seen
    torch.testing.assert_close(run(model, ids, [ids.shape[1] - seen], cache=cache)[0], before[:, seen:], **CLOSE)


@pytest.fixture(params=[WINDOW, POLYNOMIAL], ids=["window", "polynomial"])
def filled(request):
    model, ids = build(layer_types=TENSOR, **request.param), tokens(n=N)
    return model, ids, run(model, ids, [20])[1]


def test_a_hole_in_the_mask(filled):
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, 18:20] = 0
    refused(*filled, "attention_mask has a hole in row 1", attention_mask=mask)


def test_a_mask_that_contradicts_the_sums():
    model, ids = build(layer_types=TENSOR, **POLYNOMIAL), tokens(n=N)
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, :3] = 0
    message = r"attention_mask contradicts the cache: its rows have \[20, 17\] tokens before the new ones, but \[20, 20\] were read"
    refused(model, ids, run(model, ids, [20])[1], message, attention_mask=mask)
    _, cache = run(model, ids, [20], torch.cat([mask[:, :20], mask[:, :10] * 0 + 1], 1))
    with pytest.raises(ValueError, match=r"its rows have \[20, 20\] tokens before the new ones, but \[20, 17\] were read"):
        model(ids[:, 20:], past_key_values=cache)


def test_packed_rows_have_no_cache(filled):
    refused(*filled, "position_ids start anew within a row", input_ids=filled[1][:, :3], position_ids=torch.tensor([[0, 1, 0]]))


@pytest.mark.parametrize("kind", [WINDOW, POLYNOMIAL])
def test_another_batch_size(kind):
    """Noticed before the layer before has taken anything in."""
    model, ids = build(layer_types=["full_attention", "tensor_attention"], **kind), tokens(n=N)
    refused(model, ids, run(model, ids, [20])[1], "filled by another model, or other rows: it holds", input_ids=ids[:1, 20:21])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_types": ["multipole_attention"] * 2}, "the cache was filled by another model: its layer_types differ"),
        ({"layer_types": TENSOR, "tensor_order": 4}, "the cache was filled by another model, or other rows"),
    ],
)
def test_another_model(filled, options, message):
    method = {name: x for name, x in POLYNOMIAL.items() if filled[0].config.tensor_method == "polynomial"}
    refused(*filled, message, other=build(**method | options))


@pytest.mark.parametrize(("first", "second"), [(WINDOW, POLYNOMIAL), (POLYNOMIAL, WINDOW)])
def test_another_method(first, second):
    model, ids = build(layer_types=TENSOR, **first), tokens(n=N)
    refused(model, ids, run(model, ids, [20])[1], "the cache was filled with tensor_method=", other=build(layer_types=TENSOR, **second))


@pytest.mark.parametrize("other", [{"tensor_window": [3, 10]}, {}])
def test_another_window(other, short):
    """Tokens that a wider window would see are gone."""
    model, ids = build(layer_types=TENSOR, **WINDOW), tokens(n=N)
    _, cache = run(model, ids, [20])
    refused(model, ids, cache, "the cache keeps a window of 9 tokens, but (10|all) are asked", other=build(layer_types=TENSOR, **other))


def test_another_bound():
    model, ids = build(layer_types=TENSOR, **POLYNOMIAL), tokens(n=N)
    other = build(layer_types=TENSOR, **POLYNOMIAL | {"tensor_entry_bound": 0.7})
    refused(model, ids, run(model, ids, [20])[1], r"entry bound\) .* 0.8\), but is given .* 0.7\)", other=other)


def test_a_static_cache_is_refused_clearly():
    with pytest.raises(ValueError, match="tensor attention has no static cache: leave out cache_implementation"):
        generate(build(layer_types=TENSOR), tokens(n=5), cache_implementation="static")


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_polynomial_has_no_dropout(use_cache):
    model, ids = build(layer_types=TENSOR, **POLYNOMIAL), tokens(n=N)
    cache = run(model, ids, [20])[1] if use_cache else None
    model.config.attention_dropout = 0.5
    with pytest.raises(ValueError, match="dropout_p belongs to method='exact'"):
        model.train()(ids[:, 20:], past_key_values=cache)

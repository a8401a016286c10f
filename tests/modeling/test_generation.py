"""generate, streaming, compiled steps: on the generation state as without it."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StoppingCriteria, TextStreamer

from hf_multipole import MultipoleCache, MultipoleForCausalLM
from tests.helpers.cache_runs import FULL_FIRST, KINDS, run, states
from tests.helpers.tiny_models import CLOSE, HYBRID, build, pad, randomise, tokens


@pytest.mark.parametrize("options", [{}, {"rotate_summaries": True}, {"layer_types": HYBRID}, {"summary": "direct"}])
@pytest.mark.slow
def test_greedy_generation(options):
    model = build(**options)
    prompt = tokens(n=30)
    out = model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=-1)
    assert out.shape == (2, 70)
    with torch.no_grad():
        logits = model(out, use_cache=False).logits
        torch.testing.assert_close(out[:, 30:], logits[:, 29:-1].argmax(-1))
    assert len(out[0, 30:].unique()) > 2  # not a model that says one thing only

    # Rows of unequal length, padded on the left.
    short = prompt[1:, 13:]
    ids, mask = (torch.cat(parts) for parts in zip(pad(prompt[:1]), pad(short, left=13)))
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, eos_token_id=-1)
    torch.testing.assert_close(batch[0], out[0])
    torch.testing.assert_close(batch[1, 30:], model.generate(short, max_new_tokens=40, do_sample=False, eos_token_id=-1)[0, 17:])


def test_beam_search():
    """The score of the best beam is the probability that full forward passes give it: the cache followed its beam."""
    model = build()
    prompt = tokens(n=30)
    options = dict(max_new_tokens=25, do_sample=False, eos_token_id=-1, return_dict_in_generate=True, output_scores=True)
    out = model.generate(prompt, num_beams=4, length_penalty=0.0, **options)
    with torch.no_grad():
        logits = model(out.sequences).logits[:, 29:-1].log_softmax(-1)
    score = logits.gather(2, out.sequences[:, 30:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores.double(), score, atol=1e-4, rtol=1e-5)
    uncached = model.generate(prompt, num_beams=4, length_penalty=0.0, use_cache=False, **options)
    torch.testing.assert_close(out.sequences, uncached.sequences)


@pytest.mark.parametrize("count", [1, 3])
def test_sampling(count):
    model = build()
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(2)
        options = dict(max_new_tokens=25, do_sample=True, top_k=20, temperature=0.9, eos_token_id=-1, num_return_sequences=count)
        outs.append(model.generate(tokens(n=30), use_cache=use_cache, **options))
    assert len(outs[0]) == 2 * count
    torch.testing.assert_close(outs[0], outs[1])


@pytest.mark.parametrize("kind", [*KINDS, {"layer_types": HYBRID}])
@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}, {"prefill_chunk_size": 7}, {"assistant_early_exit": 1}]
)
@pytest.mark.slow
def test_other_ways_of_generating(options, kind):
    """Speculative decoding takes tokens back; the prompt may come in pieces."""
    model, options = build(**kind), dict(options)
    if options.pop("assistant", False):
        options["assistant_model"] = randomise(copy.deepcopy(model), seed=4)
    prompt = tokens(rows=1, n=30)
    plain = model.generate(prompt, max_new_tokens=25, do_sample=False, eos_token_id=-1)
    torch.testing.assert_close(model.generate(prompt, max_new_tokens=25, do_sample=False, eos_token_id=-1, **options), plain)


@pytest.mark.parametrize("stock", [False, True])
def test_the_pad_token_in_a_text_whose_generation_is_assisted(stock):
    """A mask of ones says that it is a token like any other, but does not reach the model that assists."""
    if stock:
        sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
        config = LlamaConfig(**sizes, eos_token_id=2)
        model, assistant = (randomise(AutoModelForCausalLM.from_config(config, attn_implementation="multipole"), s) for s in (0, 4))
    else:
        model = build()
        assistant = randomise(copy.deepcopy(model), seed=4)
    prompt = tokens(rows=1, n=30)
    prompt[0, 7] = model.config.pad_token_id
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    plain = model.generate(prompt, **options)
    if stock:
        with pytest.raises(ValueError, match="pad_token_id=eos_token_id where another model assists"):
            model.generate(prompt, assistant_model=assistant, **options)
        options["pad_token_id"] = model.config.eos_token_id
    torch.testing.assert_close(model.generate(prompt, assistant_model=assistant, **options), plain)


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, {"assistant": True}])
def test_weights_of_assisted_generation(how):
    """Transformers cuts them to the columns of the tokens. Exact layers have no others."""
    model, how = build(), dict(how)
    if how.pop("assistant", False):
        how["assistant_model"] = model
    options = how | dict(max_new_tokens=4, do_sample=False, eos_token_id=-1, output_attentions=True, return_dict_in_generate=True)
    prompt = tokens(rows=1, n=30)
    with pytest.raises(ValueError, match="output_attentions is not supported in assisted generation"):
        model.generate(prompt, **options)
    model.set_attn_implementation("eager")
    for layers in model.generate(prompt, **options).attentions:
        for weights in layers:
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_the_class_says_that_generation_may_be_assisted():
    """As Transformers' tests ask it, which have no model yet; a model that takes no token back says so itself."""
    assert MultipoleForCausalLM._is_stateful is False and build()._is_stateful is False
    assert build(layer_types=["tensor_attention"], tensor_method="polynomial", tensor_score_dim=3, tensor_entry_bound=0.8)._is_stateful


def test_embeddings_as_the_prompt():
    model = build()
    prompt = tokens(n=30)
    out = model.generate(inputs_embeds=model.get_input_embeddings()(prompt), max_new_tokens=20, do_sample=False, eos_token_id=-1)
    torch.testing.assert_close(out, model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=-1)[:, 30:])


def test_going_on_from_a_returned_cache():
    model = build()
    options = dict(do_sample=False, eos_token_id=-1)
    whole = model.generate(tokens(n=30), max_new_tokens=40, **options)
    first = model.generate(tokens(n=30), max_new_tokens=15, return_dict_in_generate=True, **options)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=25, **options)
    torch.testing.assert_close(second, whole)


class Words:
    """A tokenizer for TextStreamer: one word a token."""

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids)


def test_streaming_and_stopping(capsys):
    class AfterFive(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            return torch.full((len(ids),), ids.shape[1] >= 35)

    model = build()
    out = model.generate(
        tokens(rows=1, n=30),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=-1,
        streamer=TextStreamer(Words(), skip_prompt=True),
        stopping_criteria=[AfterFive()],
    )
    assert out.shape[1] == 35
    assert capsys.readouterr().out.split() == [str(i) for i in out[0, 30:].tolist()]


def test_a_static_cache_is_refused_clearly():
    with pytest.raises(ValueError, match="no static cache.*[Ll]eave out"):
        build().generate(tokens(), max_new_tokens=2, cache_implementation="static")


def test_an_offloaded_cache():
    model = build(layer_types=HYBRID)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=-1)
    cache = DynamicCache(config=model.config)
    plain = model.generate(tokens(), **options)
    torch.testing.assert_close(model.generate(tokens(), past_key_values=cache, **options), plain)


@pytest.mark.parametrize("kind", [{}, {"rotate_summaries": True}, {"summary": "direct"}, {"layer_types": FULL_FIRST}, KINDS[-1]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.slow
def test_compiled_steps_are_not_compiled_again(masked, kind):
    """The shapes of the state are fixed: after the first steps, nothing is compiled again as the text grows."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = build(**{"num_hidden_layers": 1} | kind)
    ids = tokens(n=150)
    full = model(ids, use_cache=False).logits
    mask = torch.ones_like(ids) if masked else None
    _, first = run(model, ids, [40], mask)
    _, second = run(model, ids, [40], mask)  # a cache of its own, as in every call of generate
    counter = CompileCounter()
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    run(model, ids, [1] * 3, mask, first)
    before = counter.frame_count
    logits, _ = run(model, ids, [1] * 110, mask, second)
    torch.testing.assert_close(logits, full[:, 40:], **CLOSE)
    # Full attention sees ever more keys: compiled once more, for any number of them.
    assert 0 < before <= counter.frame_count <= before + ("full_attention" in kind.get("layer_types", ()))
    with pytest.raises(ValueError, match="position_ids go backwards"), torch.no_grad():
        model(ids[:, :1], past_key_values=second, position_ids=torch.tensor([[3], [3]]))
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_generation(tmp_path):
    """The prompt is not a step on a state: it is attended to outside of the compiled code."""
    torch._dynamo.reset()
    model = build()
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=-1)
    plain = model.generate(tokens(n=30), **options)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    cache = MultipoleCache(config=model.config)
    torch.testing.assert_close(model.generate(tokens(n=30), past_key_values=cache, **options), plain)
    cache.save(tmp_path / "state")  # it knows its model
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_steps_change_every_layer():
    """Also a layer whose output nobody asked for; and with gradients enabled, a step gives those of the eager one."""
    torch._dynamo.reset()
    model = build()
    _, cache = run(model, tokens(), [40])
    compiled = torch.compile(lambda x: model(x, past_key_values=cache, output_hidden_states=True).hidden_states[1], backend="aot_eager")
    with torch.no_grad():
        for i in range(40, 45):
            compiled(tokens()[:, i : i + 1])
    assert [state.seen for state in states(cache)] == [45, 45]
    other = copy.deepcopy(model)
    _, second = run(other, tokens(), [45])
    other.forward = torch.compile(other.forward, backend="aot_eager")
    losses = [m(tokens()[:, 45:46], past_key_values=c).logits.square().sum() for m, c in ((model, cache), (other, second))]
    for loss in losses:
        loss.backward()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)
    torch._dynamo.reset()

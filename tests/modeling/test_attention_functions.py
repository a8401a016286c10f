"""attn_implementation="multipole" on models of Transformers that know nothing of it."""

import copy
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    StaticCache,
    T5Config,
    ViTConfig,
    ViTModel,
)
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import (
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
)
from transformers.modeling_utils import AttentionInterface

from hf_multipole import MultipoleCache
from hf_multipole.modeling import attention_functions, kinds
from hf_multipole.reference import multipole_attention_reference
from tests.helpers.stock_models import BLOCK, CLOSE, DECODERS, ENCODERS, GROUPED, IMAGES, OPTIONS, RANK, SIZES, N, build, tokens


@pytest.fixture
def ids():
    return tokens()


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, ids):
    """Exact on short rows; on long ones every past token has influence and no future one has."""
    # "sdpa" has no soft cap, and "eager" takes its softmax in float32.
    exact, close = ("eager", {"atol": 1e-5, "rtol": 1e-5}) if name == "gemma2" else ("sdpa", CLOSE)
    model, sdpa = build(DECODERS[name]), build(DECODERS[name], implementation=exact)
    short = ids[:, : 2 * BLOCK]
    torch.testing.assert_close(model(short).logits, sdpa(short).logits, **close)
    assert (model(ids).logits - sdpa(ids).logits).abs().max() > 1e-4

    embeddings = model.get_input_embeddings()(ids[:1]).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[0, 50].sum().backward()
    reached = embeddings.grad[0].abs().sum(-1) > 0
    assert reached[:51].all() and not reached[51:].any()


@pytest.mark.parametrize("window", [5, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_with_a_window_stay_exact(ids, window, side):
    """All layers of Mistral have one: what "sdpa" gives, with padding, and on the cache that Transformers makes for them."""
    config = MistralConfig(**GROUPED, sliding_window=window)
    mask = torch.ones_like(ids)
    mask[1, slice(11) if side == "left" else slice(-11, None)] = 0
    model, sdpa = build(config), build(config, implementation="sdpa")
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[mask.bool()], sdpa(ids, attention_mask=mask).logits[mask.bool()], **CLOSE
    )
    if side == "left":
        options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
        expected = sdpa.generate(ids, **options)
        torch.testing.assert_close(model.generate(ids, **options), expected)
        torch.testing.assert_close(model.generate(ids, past_key_values=MultipoleCache(config=model.config), **options), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, ids):
    """Exact on short rows; on long ones every token has influence on every other, and padding on none."""
    model, sdpa = (build(ENCODERS[name], AutoModelForMaskedLM, implementation) for implementation in ("multipole", "sdpa"))
    short = ids[:, : 2 * BLOCK]
    torch.testing.assert_close(model(short).logits, sdpa(short).logits, **CLOSE)
    assert (model(ids).logits - sdpa(ids).logits).abs().max() > 1e-4
    embeddings = model.get_input_embeddings()(ids[:1]).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[0, 50].sum().backward()
    assert (embeddings.grad[0].abs().sum(-1) > 0).all()

    padded = torch.cat([ids, torch.full((2, 9), 7)], 1)
    mask = torch.ones_like(padded)
    mask[:, N:] = 0
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :N], model(ids).logits, **CLOSE)


def test_an_encoder_of_images():
    """It passes no mask at all: every patch sees every other."""
    for image, exact in ((12, True), (32, False)):  # 9 and 64 patches, and the class token
        config = ViTConfig(**IMAGES | {"image_size": image}, **OPTIONS)
        torch.manual_seed(0)
        model = ViTModel._from_config(copy.deepcopy(config), attn_implementation="multipole").double().eval()
        sdpa = ViTModel._from_config(copy.deepcopy(config), attn_implementation="sdpa").double().eval()
        sdpa.load_state_dict(model.state_dict())
        pixels = torch.randn(2, 3, image, image, dtype=torch.float64, requires_grad=True)
        out, expected = model(pixels).last_hidden_state, sdpa(pixels).last_hidden_state
        assert ((out - expected).abs().max() < 1e-11) == exact
        out[0, 1, 0].backward()
        assert (pixels.grad[0].abs().sum(0) > 0).all()


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.slow
def test_stock_layers_run_the_definition(monkeypatch, ids, side, direction):
    if direction == "causal":
        model = build(DECODERS["llama"])
    else:
        model = build(BertConfig(**SIZES, max_position_embeddings=256, **OPTIONS), AutoModelForMaskedLM)
    calls = []

    def record(module, query, key, value, mask, **kwargs):
        out = attention_functions.multipole_attention_forward(module, query, key, value, mask, **kwargs)
        calls.append((query, key, value, kwargs["scaling"], out[0]))
        return out

    monkeypatch.setitem(AttentionInterface._global_mapping, "multipole", record)
    mask = torch.ones_like(ids)
    if side:
        mask[1, slice(11) if side == "left" else slice(-11, None)] = 0
    model(ids, attention_mask=mask if side else None)
    assert len(calls) == 2
    causal = direction == "causal"
    sizes = dict(block_size=BLOCK, rank=RANK, causal=causal, sink_tokens=4 * causal)
    for query, key, value, scale, out in calls:
        expected = multipole_attention_reference(query, key, value, attention_mask=mask, scale=scale, **sizes)
        assert out.is_contiguous()
        torch.testing.assert_close(out.transpose(1, 2), expected, **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence(name, side, ids):
    model = build(DECODERS[name])
    padding = torch.full((2, 9), 7)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], 1)
    real = slice(9, None) if side == "left" else slice(N)
    mask = torch.zeros_like(padded)
    mask[:, real] = 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=position_ids).logits[:, real]
    torch.testing.assert_close(got, model(ids).logits, **CLOSE)
    # The mask is heard: without it, padding has influence in a row that has it before its tokens.
    if side == "left" and name in ("llama", "gpt2"):
        counted = torch.arange(padded.shape[1])[None] if name == "llama" else None  # rotary angles are a matter of distances
        assert (model(padded, position_ids=counted, use_cache=True).logits[:, real] - got).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.slow
def test_generation(name):
    """Cached steps are the full forward pass, also in a batch of unequal rows."""
    model = build(DECODERS[name])
    prompt = tokens(n=30)
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=-1, pad_token_id=0)
    out = model.generate(prompt, **options)
    torch.testing.assert_close(out[:, 30:], model(out).logits[:, 29:-1].argmax(-1))
    torch.testing.assert_close(
        model.generate(prompt, num_beams=3, **options), model.generate(prompt, num_beams=3, use_cache=False, **options)
    )

    short, mask = prompt.clone(), torch.ones_like(prompt)
    short[1, :13], mask[1, :13] = 0, 0
    batch = model.generate(short, attention_mask=mask, **options)
    torch.testing.assert_close(batch[0], out[0])
    torch.testing.assert_close(batch[1, 30:], model.generate(prompt[1:, 13:], **options)[0, 17:])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.slow
def test_generation_on_a_state(name, tmp_path):
    """With a MultipoleCache a stock model writes the same as with all keys."""
    model = build(DECODERS[name])
    prompt = tokens(n=40)
    mask = torch.ones_like(prompt)
    mask[1, :13] = 0
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}):
        options = dict(max_new_tokens=30, eos_token_id=-1, pad_token_id=0, attention_mask=mask, do_sample=False) | options
        outs = []
        for cache in (None, MultipoleCache(config=model.config)):
            torch.manual_seed(0)
            outs.append(model.generate(prompt, past_key_values=cache, **options))
        torch.testing.assert_close(outs[1], outs[0])
        states = [layer.state for layer in cache.layers if hasattr(layer, "state")]
        assert states and all(state.seen == 69 and state.keys.slots.shape[2] < 300 for state in states)
    with pytest.raises(ValueError, match="call cache.bind"):
        cache.save(tmp_path / "state")
    cache.bind(model)
    cache.save(tmp_path / "state")
    loaded = MultipoleCache.load(tmp_path / "state", model)
    assert [layer.get_seq_length() for layer in loaded.layers] == [69, 69]
    with torch.no_grad():
        after = [model(tokens(n=2), past_key_values=c, attention_mask=torch.cat([mask, mask[:, :31]], 1)).logits for c in (cache, loaded)]
    torch.testing.assert_close(after[1], after[0], atol=0, rtol=0)
    with pytest.raises(ValueError, match="filled by another model"):
        cache.bind(build(DECODERS["llama"]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_packed_rows(name, ids):
    """Positions that start anew mark documents, which do not see each other: as Transformers does without a mask or a cache."""
    model = build(DECODERS[name])
    lengths = [1, 30, 2 * BLOCK, 28]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    for options in ({}, {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 30, "max_length_k": 30}):
        packed = model(ids[:1], position_ids=positions, use_cache=False, **options).logits
        alone = [model(part, use_cache=False).logits for part in ids[:1].split(lengths, 1)]
        torch.testing.assert_close(packed, torch.cat(alone, 1), **CLOSE)
    two = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(two[:1], packed, **CLOSE)
    # With a cache or a mask, Transformers takes the row for one document.
    for options in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match="position_ids start anew within a row.*use_cache=False"):
            model(ids, position_ids=positions, **options)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert", "modernbert"])
def test_layers_can_be_left_exact(name, side, ids):
    """With no multipole layer among them, all give what eager attention gives; with some, something between."""
    config = copy.deepcopy((DECODERS | ENCODERS)[name])
    auto_class = AutoModelForCausalLM if name in DECODERS else AutoModelForMaskedLM
    mask = torch.ones_like(ids)
    if side:
        mask[1, slice(11) if side == "left" else slice(-11, None)] = 0
    outs = {}
    for layers in ([0], [1], [0, 1], None):
        config.multipole = OPTIONS["multipole"] | {"layers": layers}
        outs[str(layers)] = build(config, auto_class)(ids, attention_mask=mask if side else None).logits[mask.bool()]
    eager = build(config, auto_class, "eager")
    eager = torch.cat([eager(row[real.bool()][None]).logits[0] for row, real in zip(ids, mask)])
    torch.testing.assert_close(outs["[0, 1]"], outs["None"], atol=0, rtol=0)
    windowed = {"gemma2": "[0]", "modernbert": "[1]"}.get(name)  # the layer that is exact anyway
    for layers, out in outs.items():
        assert (layers == windowed) == bool((out - eager).abs().max() < 1e-5), layers
    if windowed is None:
        assert (outs["[0]"] - outs["[1]"]).abs().max() > 1e-5


def test_generation_with_exact_layers():
    """Their keys are all kept in a MultipoleCache, those of the others are not."""
    config = copy.deepcopy(DECODERS["llama"])
    config.multipole = OPTIONS["multipole"] | {"layers": [1]}
    model, prompt = build(config), tokens(n=40)
    cache = MultipoleCache(config=model.config)
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=-1, pad_token_id=0)
    torch.testing.assert_close(model.generate(prompt, past_key_values=cache, **options), model.generate(prompt, **options))
    assert [hasattr(layer, "state") for layer in cache.layers] == [False, True]
    assert cache.layers[0].keys.shape[2] == 69


def test_attention_weights(ids):
    model = build(DECODERS["llama"])
    for weights in model(ids, output_attentions=True).attentions:
        assert weights.shape == (2, 4, N, N + RANK * (10 + 5 + 3))
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not model(ids).attentions


@pytest.mark.slow
def test_training(ids):
    """Gradient checkpointing and torch.compile change nothing."""
    results = []
    for variant in ("plain", "checkpointing", "compile"):
        model = build(DECODERS["llama"]).train()
        if variant == "checkpointing":
            model.gradient_checkpointing_enable()
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if variant == "compile" else model
        # With a mask: when it compiles a model without one, Transformers takes all rows for packed.
        loss = run(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    torch.testing.assert_close(results[2], results[0], **CLOSE)


def test_options_have_an_effect(ids):
    outputs = []
    for options in ({}, {"block_size": 8}, {"block_size": 8, "rank": 2}, {"block_size": 8, "rank": 2, "size_weighting": False}):
        outputs.append(build(LlamaConfig(**GROUPED, multipole=options))(ids).logits)
    # Without options: blocks of 64, in which 75 tokens are few.
    torch.testing.assert_close(outputs[0], build(LlamaConfig(**GROUPED), implementation="sdpa")(ids).logits, **CLOSE)
    for i, first in enumerate(outputs):
        for second in outputs[i + 1 :]:
            assert (first - second).abs().max() > 1e-5


def test_softcap_and_scale():
    """Features that only some models ask for, through the attention function itself."""
    module = torch.nn.Module()
    module.config = DECODERS["llama"]
    q, k, v = (torch.randn(1, heads, N, 8, dtype=torch.float64) * 3 for heads in (4, 2, 2))
    mask = attention_functions.multipole_mask(batch_size=1, q_length=N, kv_length=N, config=module.config)
    out, weights = attention_functions.multipole_attention_forward(module, q, k, v, mask, scaling=0.7, softcap=2.0)
    expected = multipole_attention_reference(q, k, v, block_size=BLOCK, rank=RANK, sink_tokens=4, scale=0.7, softcap=2.0)
    torch.testing.assert_close(out.transpose(1, 2), expected, **CLOSE)
    assert weights is None


SMALL = dict(vocab_size=50, d_model=32, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
T5 = T5Config(**SMALL, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
BART = BartConfig(
    **SMALL,
    bos_token_id=1,
    **{f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in [("layers", 1), ("attention_heads", 4), ("ffn_dim", 32)]},
)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True), "cross-attention.*'sdpa'"),
        (LlamaConfig(**GROUPED, multipole={"block_siz": 8}), "config.multipole has 'block_siz'.*'block_size', 'rank'"),
        (LlamaConfig(**GROUPED, multipole={"block_size": 8, "rank": 3}), "rank 3 does not divide block_size 8"),
        (LlamaConfig(**GROUPED, multipole={"layers": [2]}), r"layers is \[2\].*from 0 to 1"),
        (LlamaConfig(**GROUPED, multipole={"layers": []}), "layers is .*a list of layer numbers"),
        (LlamaConfig(**GROUPED, multipole=8), "config.multipole is 8, but must be a dict"),
        (LlamaConfig(**GROUPED, multipole={"size_weighting": "yes"}), "size_weighting is 'yes'"),
        (LlamaConfig(**GROUPED, multipole={"summary": "sum"}), "summary is 'sum', but must be one of"),
        (LlamaConfig(**GROUPED, multipole={"far_bias_init": "low"}), "far_bias_init is 'low'"),
        (BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4), "attention mask itself.*'sdpa' or 'eager'"),
    ],
    ids=["gpt2", "option", "rank", "layer", "no layer", "kind", "weighting", "summary", "bias", "own attention"],
)
def test_refused_decoders(ids, config, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(config)(ids)


@pytest.mark.parametrize(("config", "message"), [(T5, "cross-attention.*'sdpa'"), (BART, "cross-attention.*'sdpa'")], ids=["t5", "bart"])
def test_refused_encoder_decoders(ids, config, message):
    model = build(config, AutoModelForSeq2SeqLM)
    for decoder_ids in (ids, ids[:, :20]):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ids, decoder_input_ids=decoder_ids)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 30, N])}, "position_ids that start anew.*its own row"),
        ({"attention_mask": torch.ones(2, 1, N, N)}, r"a mask of shape \(2, 1, 75, 75\)"),
        ({"position_bias": torch.zeros(1, 4, N, N)}, "position_bias.*'eager' or 'sdpa'"),
        ({"sliding_window": 16}, "sliding_window.*'sdpa'"),
        ({"s_aux": torch.zeros(4)}, "s_aux.*'eager' or 'sdpa'"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_refused_inputs(ids, inputs, message):
    model = build(DECODERS["llama"])
    with pytest.raises(ValueError, match=message):
        model(ids, use_cache=False, **inputs)


def test_sinks_are_refused_by_layers_with_a_window_too(ids):
    with pytest.raises(ValueError, match="s_aux.*'eager' or 'sdpa'"):
        build(MistralConfig(**GROUPED, sliding_window=16))(ids, s_aux=torch.zeros(4))


def test_is_causal_is_honoured(ids):
    """Transformers' switch for bidirectional decoders: as an argument, or in the configuration."""
    model = build(DECODERS["llama"])
    other = build(LlamaConfig(**GROUPED, **OPTIONS, is_causal=False))
    both = model(ids, is_causal=False, use_cache=False).logits
    torch.testing.assert_close(both, other(ids, use_cache=False).logits, **CLOSE)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 50
    assert (other(changed, use_cache=False).logits - both)[:, 0].abs().max() > 1e-6
    module = torch.nn.Module()
    module.config = model.config
    mask = attention_functions.multipole_mask(1, N, N, config=module.config)
    with pytest.raises(ValueError, match="is_causal=False contradicts the mask"):
        attention_functions.multipole_attention_forward(module, *(torch.randn(1, 2, N, 8) for _ in range(3)), mask, is_causal=False)


def test_a_mask_with_a_hole(ids):
    mask = torch.ones_like(ids)
    mask[0, 20] = 0
    with pytest.raises(ValueError, match="attention_mask has a hole in row 0"):
        build(DECODERS["llama"])(ids, attention_mask=mask)


def test_static_caches_are_refused(ids):
    """Their keys are longer than the tokens so far, and the queries are not the last of them."""
    model = build(DECODERS["llama"])
    for mask in (None, torch.ones_like(ids)):
        with pytest.raises(ValueError, match="static caches"):
            model(ids, attention_mask=mask, past_key_values=StaticCache(config=model.config, max_cache_len=128))
    with pytest.raises(ValueError, match="static caches"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_a_foreign_mask_is_refused():
    module = torch.nn.Module()
    module.config = DECODERS["llama"]
    q, k, v = (torch.randn(1, heads, N, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="needs the mask that its own mask function makes"):
        attention_functions.multipole_attention_forward(module, q, k, v, torch.zeros(1, 1, N, N))
    with pytest.raises(ValueError, match="another pattern .*window"):

        def window(*args):
            return True

        attention_functions.multipole_mask(batch_size=1, q_length=N, kv_length=N, mask_function=window, config=module.config)
    mask = attention_functions.multipole_mask(1, N, N, mask_function=causal_mask_function, config=module.config)
    with pytest.raises(ValueError, match="the mask is for 75 keys, but there are 60"):
        attention_functions.multipole_attention_forward(module, q, k[:, :, :60], v[:, :, :60], mask)
    # Without a mask: other tokens than its own are not for this attention.
    with pytest.raises(ValueError, match="cross-attention.*75 queries, 60 keys"):
        attention_functions.multipole_attention_forward(module, q, k[:, :, :60], v[:, :, :60], None)
    module.is_cross_attention = True
    with pytest.raises(ValueError, match="cross-attention"):
        attention_functions.multipole_attention_forward(module, q, k, v, None)


@pytest.mark.parametrize("pattern", ["image", "two"])
def test_other_patterns_are_refused(pattern):
    """Overlays of packed rows, such as the bidirectional parts of some multimodal models."""
    documents = torch.arange(N)[None] // 30
    packed = packed_sequence_mask_function(documents)
    mask = or_masks(causal_mask_function, packed) if pattern == "image" else and_masks(causal_mask_function, packed, packed)
    with pytest.raises(ValueError, match="another pattern"):
        attention_functions.multipole_mask(1, N, N, mask_function=mask, config=DECODERS["llama"])


def test_another_owner_of_the_name_is_refused(monkeypatch):
    def flash(module, query, key, value, mask, **kwargs): ...

    monkeypatch.setitem(AttentionInterface._global_mapping, "multipole", flash)
    with pytest.raises(ValueError, match="another package has registered .*flash as the attention implementation 'multipole'"):
        kinds.register()


def test_registering_again_changes_nothing(monkeypatch):
    before = AttentionInterface()["multipole"], AttentionMaskInterface()["multipole"]
    assert before == (attention_functions.multipole_attention_forward, attention_functions.multipole_mask)
    kinds.register()
    for mapping in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):
        for name in mapping:
            monkeypatch.setitem(mapping, name, mapping[name])
    # A second copy of the files, as a checkpoint may bring one: their registration is the last statement of kinds.
    package = types.ModuleType("a_copy")
    package.__path__ = [str(Path(kinds.__file__).parent)]
    monkeypatch.setitem(sys.modules, "a_copy", package)
    second = importlib.import_module("a_copy.kinds")
    assert second.multipole_attention_forward is not before[0]
    assert (AttentionInterface()["multipole"], AttentionMaskInterface()["multipole"]) == before

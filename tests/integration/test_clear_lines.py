"""What stock models and their clients ask for that cannot be: one line that says what to do, or, where nothing changes, a word of it."""

import copy
import pickle

import pytest
import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    FalconConfig,
    GitConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    TrOCRConfig,
    XGLMConfig,
)
from transformers.utils import logging

from hf_multipole import MultipoleCache
from hf_multipole.modeling.attention_masks import MultipoleMask
from tests.helpers import tiny_models
from tests.helpers.stock_models import CLOSE, GROUPED, OPTIONS, build, tokens

OWN_MASK = {
    "doge": DogeConfig(**GROUPED, keep_window_size=2048),
    "xglm": XGLMConfig(vocab_size=50, d_model=32, ffn_dim=32, num_layers=2, attention_heads=4),
    "trocr": TrOCRConfig(vocab_size=50, d_model=32, decoder_ffn_dim=32, decoder_layers=2, decoder_attention_heads=4),
}
IDS = dict(bos_token_id=1, eos_token_id=2)
OWN_TABLE = {
    "gptj": GPTJConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, **IDS),
    "gpt_neo": GPTNeoConfig(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], intermediate_size=32, **IDS
    ),
    "falcon": FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS),
    # Its images go through the interface, its text does not.
    "git": GitConfig(
        vision_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, image_size=32, patch_size=16),
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
    ),
}


@pytest.fixture
def ids():
    return tokens()


@pytest.fixture
def said(monkeypatch):
    """Everything that is warned of, once each."""
    lines = []
    monkeypatch.setattr(logging.logging.Logger, "warning_once", lambda self, line, *args: line in lines or lines.append(line))
    return lines


@pytest.mark.parametrize("name", OWN_MASK)
def test_models_that_work_with_their_mask(name, ids):
    with pytest.raises(ValueError, match="works with its attention mask itself.*use 'sdpa' or 'eager'"):
        build(OWN_MASK[name])(ids)


def test_a_mask_is_no_tensor():
    mask = MultipoleMask(True, 2, 8, 8, 4)
    for name in ("dtype", "shape", "size", "expand", "masked_fill"):
        assert not hasattr(mask, name)  # for those that ask
        with pytest.raises(ValueError, match="works with its attention mask itself"):
            getattr(mask, name)
    with pytest.raises(AttributeError, match="MultipoleMask has no attribute 'caussal'"):
        mask.caussal  # noqa: B018
    for copied in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert (copied.causal, copied.length) == (True, 8)


@pytest.mark.parametrize("implementation", ["multipole", "multipole_linear", "tensor"])
@pytest.mark.parametrize("name", OWN_TABLE)
def test_models_with_classes_for_each_implementation(name, implementation):
    for _ in range(2):
        with pytest.raises(ValueError, match=f"does not compute attention by .*{implementation!r} cannot run it; use 'eager' or 'sdpa'"):
            AutoModelForCausalLM.from_config(OWN_TABLE[name], attn_implementation=implementation)
    AutoModelForCausalLM.from_config(OWN_TABLE[name], attn_implementation="eager")


# Said once


def test_a_model_of_windows_is_exact_and_says_so(said, ids):
    windows = MistralConfig(**GROUPED, sliding_window=20, **OPTIONS)
    model = build(windows)
    out = model(ids).logits
    assert len(said) == 1 and "changes nothing" in said[0] and "sliding_window=None" in said[0] and "mistral" in said[0]
    torch.testing.assert_close(out, build(windows, implementation="sdpa")(ids).logits, **CLOSE)
    # What it says to do is done, and then nothing is said.
    said.clear()
    whole = MistralConfig(**GROUPED, sliding_window=None, **OPTIONS)
    assert (build(whole)(ids).logits - build(whole, implementation="sdpa")(ids).logits).abs().max() > 1e-6
    assert not [line for line in said if "changes nothing" in line]


@pytest.mark.parametrize("implementation", [None, "multipole"])
def test_options_that_are_not_used_are_told_of(said, tmp_path, implementation):
    model = build(LlamaConfig(**GROUPED, **OPTIONS))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    about = [line for line in said if "config.multipole has options" in line]
    assert loaded.config.multipole == OPTIONS["multipole"]
    assert len(about) == (implementation is None) and all("runs with 'sdpa'" in line and "='multipole'" in line for line in about)


def test_nothing_is_said_of_others(said):
    LlamaForCausalLM(LlamaConfig(**GROUPED))
    tiny_models.build(attn_implementation="sdpa")
    assert not said


# Generation


@pytest.mark.parametrize("given", [True, False])
def test_longrope_throws_its_cache_away(given):
    """Which only the O(n) form minds: it needs the queries that came before, or a state."""
    rope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, factor=4.0, rope_theta=1e4)
    config = Phi3Config(**GROUPED, original_max_position_embeddings=64, rope_parameters=rope, **OPTIONS)
    ids, options = tokens(rows=1, n=50), dict(max_new_tokens=20, do_sample=False, eos_token_id=-1)
    model = build(config, implementation="multipole_linear")
    cache = {"past_key_values": MultipoleCache(config=model.config)} if given else {}
    with pytest.raises(ValueError, match="longrope rotations throw their cache away.*use_cache=False, or with 'multipole'"):
        model.generate(ids, **options, **cache)
    for works in (model.generate(ids, use_cache=False, **options), build(config).generate(ids, **options)):
        assert works.shape == (1, 70)


@pytest.mark.parametrize("stock", [True, False])
def test_a_prompt_with_the_pad_token(stock):
    model = build(LlamaConfig(**GROUPED, **OPTIONS)) if stock else tiny_models.build()
    ids, options = tokens(n=40), dict(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    ids[0, 10] = model.config.pad_token_id
    with pytest.raises(ValueError, match=r"a hole in row 0.*attention_mask=torch.ones_like\(input_ids\)"):
        model.generate(ids, **options)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert written[0, :40].tolist() == ids[0].tolist()
    alone = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
    assert torch.equal(written[:1], alone)


def prefixed(model):
    options = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    return get_peft_model(model, options).double().eval()


@pytest.mark.parametrize("stock", [True, False])
def test_padding_behind_a_prefix(stock):
    model = prefixed(build(LlamaConfig(**GROUPED, **OPTIONS)) if stock else tiny_models.build())
    ids = tokens(n=40)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :6] = right[0, -6:] = 0
    with pytest.raises(ValueError, match="a hole in row 0.*Behind a prefix, .* that is the right side"):
        model(input_ids=ids, attention_mask=left)
    out = model(input_ids=ids, attention_mask=right).logits
    alone = model(input_ids=ids[:1, :-6], attention_mask=right[:1, :-6]).logits
    torch.testing.assert_close(out[:1, :-6], alone, **CLOSE)


def test_a_prefix_has_no_keys_without_positions():
    model = prefixed(tiny_models.build(rotate_summaries=True))
    ids = tokens(n=40)
    for call in (model, lambda input_ids: model.generate(input_ids=input_ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match="rotate_summaries=True needs those without positions.*prompt tuning"):
            call(input_ids=ids)
    # Its own caches have them.
    assert tiny_models.build(rotate_summaries=True).generate(ids, max_new_tokens=2, eos_token_id=-1).shape == (2, 42)

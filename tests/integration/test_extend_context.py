"""extend_context: rows that are longer than those of training take part only after it, and everything else stays."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, ByT5Tokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig

from hf_multipole import convert, extend_context
from hf_multipole.training.arguments import ModelArguments
from hf_multipole.training.models import build_model
from tests.helpers import stock_models as stock
from tests.helpers.stock_models import auto_class_of
from tests.helpers.tiny_models import CLOSE, build, tokens

SHORT, LONG = 64, 200  # tokens of 8 a block: two levels, and four
LINEAR = ["multipole_linear_attention"] * 2


def own(**options):
    return build(max_position_embeddings=SHORT, **options)


def llama(**options):
    config = copy.deepcopy(stock.DECODERS["llama"])
    config.max_position_embeddings = SHORT
    return convert(stock.build(config), **options)


def far_biases(model):
    return [parameter for name, parameter in model.named_parameters() if name.endswith("far_bias")]


def influence(model) -> float:
    """How much the fifth token of a long row, behind sinks, matters to the last one's logits (of one layer: no other relays it)."""
    ids = tokens(1, LONG)
    other = ids.clone()
    other[0, 4] = ids[0, 4] % 40 + 5
    with torch.no_grad():
        return (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max().item()


@pytest.mark.parametrize(
    "make", [own, llama, lambda: own(far_bias_init=None), lambda: own(summary="mean"), lambda: own(layer_types=LINEAR)]
)
def test_a_longer_context(make, tmp_path):
    model, short, long = make(), tokens(n=SHORT), tokens(n=LONG)
    before = model(short).logits
    assert extend_context(model, LONG) is model and model.config.max_position_embeddings == LONG
    torch.testing.assert_close(model(short).logits, before, **CLOSE)
    model(long, labels=long).loss.backward()
    for bias in far_biases(model):
        # The last level's, at first, and learned from then on.
        assert bias.shape[1] == 4 and (bias[:, 2:] == bias[:, 1:2]).all() and bias.grad.abs().min() > 0
    out = model(long[:, :-1], use_cache=True)
    expected = model(long).logits
    torch.testing.assert_close(model(long[:, -1:], past_key_values=out.past_key_values).logits, expected[:, -1:], **CLOSE)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(long).logits, expected, **CLOSE)


@pytest.mark.parametrize("far_bias_init", [0.0, None])
def test_what_is_farther_away(far_bias_init):
    model = own(num_hidden_layers=1, far_bias_init=far_bias_init)
    assert influence(model) == 0
    assert influence(extend_context(model, LONG)) > 1e-6


def test_stock_models_without_learned_parts():
    """Their configuration states the length of training, too."""
    config = copy.deepcopy(stock.DECODERS["llama"])
    config.max_position_embeddings, config.num_hidden_layers = SHORT, 1
    model = stock.build(config)
    assert influence(model) == 0
    assert influence(extend_context(model, LONG)) > 1e-6 and model.config.max_position_embeddings == LONG


def test_training_extends_what_it_starts_from(tmp_path):
    """Models with multipole attention, that is: with others it is not for us to decide."""
    own(vocab_size=384).save_pretrained(tmp_path / "own")
    config = copy.deepcopy(stock.DECODERS["llama"])
    config.max_position_embeddings, config.vocab_size = SHORT, 384
    stock.build(config).save_pretrained(tmp_path / "stock")
    for name, implementation, longer in (("own", None, LONG), ("stock", "multipole", LONG), ("stock", "sdpa", SHORT)):
        for context, stated in ((SHORT // 2, SHORT), (LONG, longer)):
            args = ModelArguments(model_name_or_path=str(tmp_path / name), attn_implementation=implementation)
            model = build_model(args, ByT5Tokenizer(), context, False)
            assert model.config.max_position_embeddings == stated, (name, implementation)


def rotated(**parameters):
    config = copy.deepcopy(stock.DECODERS["llama"])
    config.rope_parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": 64} | parameters
    return convert(stock.build(config))


def test_yarn():
    model = rotated(rope_type="yarn", factor=4.0)
    before = model(tokens()).logits
    torch.testing.assert_close(extend_context(model, 300)(tokens()).logits, before, **CLOSE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stock.build(stock.DECODERS["llama"], implementation="sdpa"), "LlamaForCausalLM has no multipole attention"),
        (lambda: stock.build(stock.DECODERS["gpt2"]), r"learned positions for 256 tokens \(transformer.wpe\)"),
        (lambda: own(layer_types=["full_attention"]), "MultipoleForCausalLM has no multipole attention"),
        (lambda: llama(summary="direct"), "direct summaries have weights for 64 tokens"),
        (lambda: own(summary="direct"), "direct summaries have weights for 64 tokens"),
        (lambda: convert(stock.build(stock.DECODERS["gpt2"])), r"learned positions for 256 tokens \(transformer.wpe\)"),
        (lambda: convert(stock.build(stock.ENCODERS["bert"], auto_class_of("bert"))), "learned positions for 256 tokens"),
        (lambda: rotated(rope_type="dynamic", factor=4.0), "angles that depend on max_position_embeddings .rope_type 'dynamic'"),
        (lambda: rotated(rope_type="yarn", factor=None), "angles that depend on max_position_embeddings .rope_type 'yarn'"),
        (lambda: build(max_position_embeddings=300), "MultipoleForCausalLM is for rows of 300 tokens already"),
    ],
)
def test_refused(make, message):
    model = make()
    state, stated = copy.deepcopy(model.state_dict()), model.config.max_position_embeddings
    with pytest.raises(ValueError, match=message):
        extend_context(model, 300)
    assert model.config.max_position_embeddings == stated and state.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_a_part_of_the_layers():
    """The length of those that are exact says nothing."""
    model = llama(layers=[1])
    model.config.max_position_embeddings = LONG
    extend_context(model, LONG)
    assert model.model.layers[1].self_attn.far_field.max_levels == 4


@pytest.mark.parametrize("implementation", ["multipole", {"text_config": "multipole"}], ids=str)
def test_the_text_of_a_composite_model(implementation):
    """Images have positions of their own, and no length."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=SHORT)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=4), text_config=text, image_token_index=49)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=implementation).double().eval()
    assert influence(model) == 0
    assert influence(extend_context(model, LONG)) > 1e-9 and model.config.text_config.max_position_embeddings == LONG
    assert not hasattr(model.config.vision_config, "max_position_embeddings")
    with pytest.raises(ValueError, match=f"for rows of {LONG} tokens already"):
        extend_context(model, LONG)


def test_adapters_are_added_afterwards():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["far_field"]))
    with pytest.raises(ValueError, match="in a wrapper, of PEFT for instance"):
        extend_context(model, LONG)

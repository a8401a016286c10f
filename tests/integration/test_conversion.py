"""convert and revert: stock models with learned summaries, saved, loaded, trained."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    ViTConfig,
)

from hf_multipole import MultipoleCache, MultipoleConfig, MultipoleForCausalLM, convert, revert
from hf_multipole.modeling.learned import FarField
from hf_multipole.modeling.summaries import DirectSummary, HierarchicalSummary, MeanSummary
from tests.helpers.conversion_runs import check_sharded, saved, trainer
from tests.helpers.processes import environment
from tests.helpers.stock_models import BLOCK, CLOSE, DECODERS, ENCODERS, GROUPED, IMAGES, OPTIONS, RANK, SIZES, auto_class_of, build, tokens

MODELS = DECODERS | ENCODERS


@pytest.fixture
def ids():
    return tokens()


def learned(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".far_field." in name}


def far_fields(model):
    return [module for module in model.modules() if isinstance(module, FarField)]


def change(model):
    """As if trained: summaries far from the mean."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in learned(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * 0.3)
    return model


def converted(name="llama", **options):
    return change(convert(build(MODELS[name], auto_class_of(name)), **options))


@pytest.mark.parametrize("name", MODELS)
def test_first_output_saving_loading_reverting(name, ids, tmp_path):
    config, auto_class = MODELS[name], auto_class_of(name)
    model = build(config, auto_class)
    means = model(ids).logits
    classes = [type(module) for module in model.modules()]
    assert convert(model) is model
    assert torch.equal(model(ids).logits, means)
    windowed = name in ("gemma2", "gemma3", "qwen3 with windows", "modernbert")
    assert len(far_fields(model)) == (1 if windowed else 2)
    assert [type(module) for module in model.modules() if not isinstance(module, FarField | MeanSummary)] == classes

    change(model)
    out = model(ids).logits
    assert (out - means).abs().max() > 1e-4
    loaded = auto_class.from_pretrained(saved(model, tmp_path / "first"), dtype=torch.float64).eval()
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    # Rotary angles are not saved: in a model that was made float64 they had more digits.
    torch.testing.assert_close(loaded(ids).logits, out, atol=1e-4, rtol=1e-4)
    assert loaded.config._attn_implementation == "multipole"
    saved(loaded, tmp_path / "second")
    assert (tmp_path / "first" / "config.json").read_text() == (tmp_path / "second" / "config.json").read_text()

    assert revert(model) is model
    assert not learned(model) and [type(module) for module in model.modules()] == classes
    stock = build(config, auto_class, model.config._attn_implementation)
    noted = dict.fromkeys(["multipole", "architectures", "dtype"])  # the options went; the others were noted when it was saved
    assert model.config.to_dict() | noted == stock.config.to_dict() | noted
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, **CLOSE)
    with pytest.raises(ValueError, match="was not converted"):
        revert(model)


def test_an_encoder_of_images(tmp_path):
    config = ViTConfig(**IMAGES, **OPTIONS)
    model = AutoModel.from_config(config, attn_implementation="multipole").eval()
    pixels = torch.randn(1, 3, 32, 32)
    means = model(pixels).last_hidden_state
    assert torch.equal(convert(model)(pixels).last_hidden_state, means)
    out = change(model)(pixels).last_hidden_state
    assert (out - means).abs().max() > 1e-4
    loaded = AutoModel.from_pretrained(saved(model, tmp_path)).eval()
    assert torch.equal(loaded(pixels).last_hidden_state, out)
    with pytest.raises(ValueError, match="layers cannot be chosen in ViTModel"):
        convert(AutoModel.from_config(ViTConfig(**IMAGES)), layers=[0])
    with pytest.raises(ValueError, match="summary='direct' needs config.max_position_embeddings"):
        convert(AutoModel.from_config(ViTConfig(**IMAGES)), summary="direct")


@pytest.mark.parametrize(
    ("options", "kind"),
    [({}, HierarchicalSummary), ({"summary": "direct"}, DirectSummary), ({"summary": "mean"}, MeanSummary)],
    ids=["hierarchical", "direct", "mean"],
)
def test_kinds_of_summaries(options, kind, ids, tmp_path):
    model = converted(**options)
    assert {type(part) for far_field in far_fields(model) for part in (far_field.key_summary, far_field.value_summary)} == {kind}
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path), dtype=torch.float64)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_options(ids, tmp_path):
    """What is given goes before what the configuration had, and all of it is saved."""
    model = convert(build(DECODERS["llama"]), layers=[1], rank=4, size_weighting=False, far_bias_init=-3.0)
    expected = {"block_size": BLOCK, "rank": 4, "summary": "hierarchical", "size_weighting": False, "far_bias_init": -3.0, "layers": [1]}
    expected |= {"downsample_queries": False, "sink_tokens": None, "saliency": False}
    assert model.config.multipole == expected
    assert [hasattr(layer.self_attn, "far_field") for layer in model.model.layers] == [False, True]
    assert (model.model.layers[1].self_attn.far_field.far_bias == -3).all()
    assert AutoConfig.from_pretrained(saved(model, tmp_path)).multipole == expected
    # The bias and the weighting are heard.
    assert (model(ids).logits - convert(build(DECODERS["llama"]), layers=[1], rank=4)(ids).logits).abs().max() > 1e-5
    # Nothing learned at all.
    model = convert(build(DECODERS["llama"]), summary="mean", far_bias_init=None)
    assert not far_fields(model) and model.config._attn_implementation == "multipole"
    revert(model)
    # The configuration had no options.
    assert convert(LlamaForCausalLM(LlamaConfig(**GROUPED))).config.multipole["block_size"] == 64


def test_dtype_and_device_of_the_model():
    model = convert(build(DECODERS["llama"]).to(torch.bfloat16))
    assert {parameter.dtype for parameter in learned(model).values()} == {torch.bfloat16}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**GROUPED, **OPTIONS))
    convert(model)
    assert all(parameter.is_meta for parameter in learned(model).values())
    model.to_empty(device="cpu")
    for far_field in far_fields(model):
        far_field.reset_parameters()
        assert far_field.key_summary.tokens.unique().tolist() == [0, RANK / BLOCK] and not far_field.far_bias.any()


@pytest.mark.parametrize("missing", ["all", "some"])
def test_parameters_that_a_checkpoint_lacks_start_as_means(missing, tmp_path):
    """They are made without memory and filled later, by rules that do not know them."""
    model = converted()
    path = saved(model, tmp_path) / "model.safetensors"
    weights = {name: x for name, x in load_file(path).items() if not (missing == "all" and ".far_field." in name)}
    dropped = "model.layers.1.self_attn.far_field.key_summary.tokens"
    weights.pop(dropped, None)
    save_file(weights, path, {"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert dropped in report["missing_keys"]
    for name, parameter in learned(loaded).items():
        if name == dropped or missing == "all":
            expected = [0] if "far_bias" in name else [0, 1 / 2] if "merge" in name else [0, RANK / BLOCK]
            assert parameter.unique().tolist() == expected, name
        else:
            assert torch.equal(parameter, model.get_parameter(name)), name
    torch.testing.assert_close(loaded.state_dict(), loaded.state_dict() | weights, atol=0, rtol=0)


def test_a_new_model_of_the_configuration(ids):
    """It has its parts, at the start, whoever builds it; options that come after the model say what to do."""
    config = converted().config
    for build_it in (AutoModelForCausalLM.from_config, LlamaForCausalLM):
        model = build_it(copy.deepcopy(config)).double().eval()
        assert len(far_fields(model)) == 2 and all(not far_field.far_bias.any() for far_field in far_fields(model))
        model(ids)
    model = build(DECODERS["llama"])
    model.config.multipole = config.multipole
    with pytest.raises(ValueError, match="learned parts.*hf_multipole.convert"):
        model(ids)


def test_a_stock_model_stays_untouched(ids, tmp_path):
    """Its classes, its weights' names, and what Transformers records of its attention: built, loaded, and built again."""
    first = LlamaForCausalLM._from_config(LlamaConfig(**GROUPED), attn_implementation="eager").eval()
    saved(first, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    again = LlamaForCausalLM._from_config(LlamaConfig(**GROUPED), attn_implementation="eager").eval()
    for model in (first, loaded, again):
        attention = type(model.model.layers[0].self_attn)
        assert attention.__module__ == "transformers.models.llama.modeling_llama" and attention in nn.Module.__subclasses__()
        assert sys.modules[attention.__module__].LlamaAttention is attention
        assert not learned(model) and "attn_implementation" not in model.config.to_dict()
        assert len(model(ids, output_attentions=True).attentions) == 2
    assert torch.equal(loaded(ids).logits, first(ids).logits)
    assert "multipole" not in (tmp_path / "config.json").read_text()


def test_attention_weights_of_a_loaded_model(ids, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(saved(converted(), tmp_path))
    assert [weights.shape[-1] > 75 for weights in loaded(ids, output_attentions=True).attentions] == [True, True]


@pytest.mark.slow
def test_in_a_new_process(ids, tmp_path):
    """Importing the package is enough to load it; without that Transformers refuses, instead of dropping the summaries."""
    model = converted().float()
    saved(model, tmp_path / "model")
    torch.save((ids, model(ids).logits), tmp_path / "expected")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model")
except ValueError as error:
    assert 'attn_implementation="multipole"` is not supported' in str(error), error
else:
    raise AssertionError("it was loaded")
import hf_multipole
ids, expected = torch.load(sys.argv[1] + "/expected")
assert torch.allclose(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model").eval()(ids).logits, expected, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_implementation_by_choice(ids, tmp_path):
    """Asked for explicitly, exact attention runs with the summaries there, unused; they come back with the next loading."""
    model = converted()
    exact = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "a"), dtype=torch.float64, attn_implementation="sdpa").eval()
    stock = build(DECODERS["llama"], implementation="sdpa")
    torch.testing.assert_close(exact(ids).logits, stock(ids).logits, atol=1e-4, rtol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(saved(exact, tmp_path / "b"), dtype=torch.float64)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert again.config._attn_implementation == "multipole"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_generation_on_a_state(name):
    model, prompt = converted(name), tokens(n=40)
    mask = torch.ones_like(prompt)
    mask[1, :13] = 0
    options = dict(max_new_tokens=30, eos_token_id=-1, pad_token_id=0, attention_mask=mask, do_sample=False)
    expected = model.generate(prompt, **options)
    torch.testing.assert_close(model.generate(prompt, past_key_values=MultipoleCache(config=model.config), **options), expected)
    means = build(DECODERS[name])
    assert (means(prompt).logits - model(prompt).logits).abs().max() > 1e-4


def test_gradients_checkpointing_and_compilation(ids):
    results = []
    for variant in ("plain", "checkpointing", "compile"):
        model = converted().train()
        if variant == "checkpointing":
            model.gradient_checkpointing_enable()
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if variant == "compile" else model
        loss = run(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
        assert all(parameter.grad.abs().max() > 0 for name, parameter in learned(model).items() if "merge" not in name)
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    torch.testing.assert_close(results[2], results[0], **CLOSE)


def test_trainer(ids, tmp_path):
    """Trains the summaries too, and resumes from a checkpoint to the same weights."""
    model = converted().float()
    before = {name: parameter.detach().clone() for name, parameter in learned(model).items()}
    trainer(model, tmp_path, ids).train()
    assert all((parameter != before[name]).any() for name, parameter in learned(model).items() if "merge" not in name)
    resumed = trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), tmp_path, ids)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(resumed.model.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_adapters(ids, tmp_path):
    """LoRA on the projections, with the summaries as modules to save: both train, are saved, loaded and merged."""
    peft = pytest.importorskip("peft")
    folder = saved(converted(), tmp_path / "model")

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["far_field"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(), config)
    torch.testing.assert_close(model(ids).logits, load()(ids).logits, atol=0, rtol=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora" in name for name in trained) and any("far_field.modules_to_save" in name for name in trained)
    assert all("lora" in name or "far_field" in name for name in trained)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.5)
    for _ in range(2):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    out = model(ids).logits
    assert (out - load()(ids).logits).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, out, **CLOSE)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, out, **CLOSE)
    again = AutoModelForCausalLM.from_pretrained(saved(merged, tmp_path / "merged"), dtype=torch.float64)
    torch.testing.assert_close(again.state_dict(), merged.state_dict(), atol=0, rtol=0)


@pytest.mark.slow
def test_fully_sharded(ids, tmp_path):
    check_sharded(converted(), ids, tmp_path)


def test_summaries_of_another_block_size(tmp_path):
    """The configuration was edited: the weights do not fit."""
    folder = saved(converted(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["multipole"]["block_size"] = 2 * BLOCK
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(folder)
    config["multipole"]["rank"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rank 3 does not divide block_size 16"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_initialising_again_keeps_what_was_learned():
    """As init_weights of a model that is there already keeps all the rest."""
    model = converted()
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_classes_of_the_same_name_elsewhere(ids):
    """Code of a checkpoint may have an attention class of a known name: it is not touched."""

    class LlamaAttention(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    parent = nn.Module()
    parent.attention = LlamaAttention(converted().config)
    assert not hasattr(parent.attention, "far_field")


def test_a_part_of_another_model(tmp_path, caplog):
    """Loaded as a whole, it says that it does not run with what it learned, and how it does."""
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**GROUPED, **OPTIONS), image_token_index=49)
    model = LlavaForConditionalGeneration(config).eval()
    change(convert(model.model.language_model))
    ids = tokens(n=40)
    out = model(ids).logits
    transformers.utils.logging.get_logger("hf_multipole.integration.conversion").addHandler(caplog.handler)
    transformers.utils.logging.warning_once.cache_clear()
    loaded = LlavaForConditionalGeneration.from_pretrained(saved(model, tmp_path)).eval()
    assert (loaded(ids).logits - out).abs().max() > 1e-5
    assert "was converted to multipole attention, but runs with 'sdpa'" in caplog.text
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation={"text_config": "multipole"}).eval()
    torch.testing.assert_close(loaded(ids).logits, out)


@pytest.mark.parametrize("summary", ["hierarchical", "direct", "mean"])
def test_short_rows_give_gradients_too(summary):
    """Zeros where nothing of the far field is used: processes of a parallel training must have the same gradients."""
    model = converted(summary=summary).train()
    for n in (2 * BLOCK, 2 * BLOCK + 1, 75):
        model.zero_grad()
        model(tokens(n=n), labels=tokens(n=n), use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        if n == 2 * BLOCK:
            assert not any(parameter.grad.any() for parameter in learned(model).values())


@pytest.mark.parametrize("kind", ["multipole", "multipole_linear"])
def test_rows_that_are_mostly_padding_give_gradients_too(kind):
    model, ids, mask = converted(kind=kind).train(), tokens(n=75), torch.zeros(2, 75, dtype=torch.long)
    mask[:, : 2 * BLOCK] = 1
    model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_large_summaries_in_half_precision():
    """Weights that are not used must not overflow where they are summed: those at the start sum to 4 * 32 * 2 * 512 here."""
    config = copy.deepcopy(MODELS["llama"])
    config.update({"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 512, "num_hidden_layers": 1})
    model = convert(build(config)).half()
    assert model(tokens(n=BLOCK), use_cache=False).logits.isfinite().all()


def test_cropping_layers_with_a_window():
    """They cannot take back what they dropped: nothing is changed, and what can be done is told."""
    model = convert(build(DECODERS["gemma2"]))
    cache = MultipoleCache(config=model.config)
    with torch.no_grad():
        model(tokens(n=40), past_key_values=cache)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-2)
    assert [layer.get_seq_length() for layer in cache.layers] == [40, 40]


def test_caches_of_other_layers_and_models(ids):
    every, second = (convert(build(DECODERS["llama"]), layers=layers) for layers in (None, [1]))
    with pytest.raises(ValueError, match="made for other layers than config.multipole"):
        second(ids, past_key_values=MultipoleCache(config=every.config))
    with pytest.raises(ValueError, match="no attention weights"):
        every(ids, past_key_values=MultipoleCache(config=every.config), output_attentions=True)
    cache = MultipoleCache(config=every.config)
    every.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match="attn_implementation='multipole' or 'multipole_linear', but this one runs with 'sdpa'; use a DynamicCache"
    ):
        every(ids, past_key_values=cache)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: build(DECODERS["llama"]), {"kind": "linear"}, "kind is 'linear', but must be 'multipole' or 'multipole_linear' or"),
        (lambda: nn.Linear(2, 2), {}, "takes a model of Transformers, but this is a Linear"),
        (lambda: MultipoleForCausalLM(MultipoleConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)), {}, "has multipole"),
        (
            lambda: build(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4), implementation="eager"),
            {},
            "BloomForCausalLM does not",
        ),
        (lambda: build(GPT2Config(n_embd=32, n_layer=1, n_head=4, add_cross_attention=True), implementation="sdpa"), {}, "cross-attention"),
        (lambda: build(MistralConfig(**GROUPED, sliding_window=8)), {}, "nothing to convert: all layers have a sliding window"),
        (lambda: build(DECODERS["llama"]), {"block_size": 12, "rank": 5}, "rank 5 does not divide block_size 12"),
        (lambda: build(DECODERS["llama"]), {"block_size": 0}, "block_size is 0"),
        (lambda: build(DECODERS["llama"]), {"summary": "sum"}, "summary is 'sum'"),
        (lambda: build(DECODERS["llama"]), {"layers": [0, 7]}, r"layers is \[0, 7\]"),
        (lambda: build(DECODERS["llama"]), {"layers": 1}, "layers is 1, but must be a list"),
        (lambda: build(DECODERS["llama"]), {"far_bias_init": float("nan")}, "far_bias_init is nan"),
        (lambda: convert(build(DECODERS["llama"])), {}, "was converted already; hf_multipole.revert"),
    ],
    ids=["kind", "module", "own", "interface", "cross", "windows", "rank", "size", "summary", "layers", "layer", "bias", "twice"],
)
def test_refused(make, options, message):
    model = make()
    before = copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        convert(model, **options)
    assert names == [name for name, _ in model.named_parameters()]
    if before is not None:
        assert model.config.to_dict() == before


def test_unknown_attention_classes_are_refused_by_name():
    from transformers import PersimmonConfig

    with pytest.raises(ValueError, match="has PersimmonAttention modules, which convert does not know; it knows .*LlamaAttention"):
        convert(build(PersimmonConfig(**SIZES)))

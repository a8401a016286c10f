"""convert(model, "tensor"): the first output is the stock model's; what is saved, loaded and refused."""

import copy
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
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    StaticCache,
    ViTConfig,
)
from transformers.masking_utils import create_causal_mask

from hf_multipole import MultipoleConfig, MultipoleForCausalLM, convert, revert
from hf_multipole.modeling.configuration_multipole import tensor_options
from hf_multipole.modeling.options import TensorOptions
from hf_multipole.training.models import converted as run_converted
from tests.helpers.conversion_runs import saved
from tests.helpers.stock_models import CLOSE, GROUPED, IMAGES, auto_class_of, build, tokens
from tests.helpers.tensor_conversions import MODELS, POLYNOMIAL, WINDOWS, N, branches, change, converted, learned, padded_mask, stock


@pytest.fixture
def ids():
    return tokens(n=N)


# The first output, and what is kept


@pytest.mark.parametrize("name", MODELS)
def test_first_output_saving_loading_reverting(name, tmp_path):
    """To the bit, in the precision that models run in: the stock model's, before and after."""
    ids, auto_class = tokens(n=33), auto_class_of(name)
    model = stock(name).float()
    config = model.config.to_dict()
    classes, weights = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    # Elsewhere "eager", the implementation of models with a soft cap, puts out something at padding.
    inputs = [({}, slice(None)), ({"attention_mask": padded_mask(ids)}, padded_mask(ids).bool() if name == "gemma2" else slice(None))]
    with torch.no_grad():
        before = [model(ids, **given).logits[real] for given, real in inputs]
        assert convert(model, "tensor", **(POLYNOMIAL if name in ("qwen3", "bert") else WINDOWS)) is model
        assert all(torch.equal(model(ids, **given).logits[real], out) for (given, real), out in zip(inputs, before))
        assert model.config._attn_implementation == "tensor"
        windowed = name in ("gemma2", "gemma3", "qwen3 with windows", "modernbert")
        assert len(branches(model)) == (1 if windowed else 2)

        change(model)
        after = [model(ids, **given).logits[real] for given, real in inputs]
        assert all((one - other).abs().max() > 1e-3 for one, other in zip(after, before))
        loaded = auto_class.from_pretrained(saved(model, tmp_path / "first")).eval()
        assert list(loaded.state_dict()) == list(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
        # Rotary angles are not saved: in a model that was made float64 they had more digits.
        torch.testing.assert_close(loaded(ids).logits, after[0], atol=1e-3, rtol=1e-3)
        assert loaded.config._attn_implementation == "tensor"
        saved(loaded, tmp_path / "second")
        assert (tmp_path / "first" / "config.json").read_text() == (tmp_path / "second" / "config.json").read_text()

        assert revert(model) is model
        assert [type(module) for module in model.modules()] == classes
        noted = dict.fromkeys(["architectures", "dtype"])  # noted when it was saved
        assert model.config.to_dict() | noted == config | noted
        assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items()) and len(weights) == len(model.state_dict())
        assert all(torch.equal(model(ids, **given).logits[real], out) for (given, real), out in zip(inputs, before))
    with pytest.raises(ValueError, match="was not converted"):
        revert(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_first_output_in_other_dtypes(ids, dtype):
    model = stock().to(dtype)
    before = model(ids).logits
    assert torch.equal(convert(model, "tensor", **POLYNOMIAL)(ids).logits, before)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    change(model)(ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_an_encoder_of_images(tmp_path):
    """Its model passes no mask."""
    model = AutoModel.from_config(ViTConfig(**IMAGES), attn_implementation="sdpa").eval()
    pixels = torch.randn(1, 3, 32, 32)
    before = model(pixels).last_hidden_state
    assert torch.equal(convert(model, "tensor", **WINDOWS)(pixels).last_hidden_state, before)
    out = change(model)(pixels).last_hidden_state
    assert (out - before).abs().max() > 1e-3
    loaded = AutoModel.from_pretrained(saved(model, tmp_path)).eval()
    assert torch.equal(loaded(pixels).last_hidden_state, out)
    assert torch.equal(revert(model)(pixels).last_hidden_state, before)
    model.set_attn_implementation("tensor")
    with pytest.raises(ValueError, match=r'use hf_multipole.convert\(model, "tensor"\) for a stock model'):
        model(pixels)


def test_options(ids, tmp_path):
    """What is given goes before what the configuration had, and all of it is saved."""
    model = stock()
    model.config.multipole = {"tensor_order": 2, "tensor_score_dim": 5, "block_size": 8}
    convert(model, "tensor", layers=[1], tensor_order=4, tensor_window=(2, None, 3), tensor_entry_bound=2.0)
    expected = {"block_size": 8, "layers": [1], "tensor_score_dim": 5, "tensor_order": 4, "tensor_window": [2, None, 3]}
    assert model.config.multipole == TensorOptions().outside("stock") | {"tensor_entry_bound": 2.0} | expected
    assert [hasattr(layer.self_attn, "tensor_branch") for layer in model.model.layers] == [False, True]
    branch = model.model.layers[1].self_attn.tensor_branch
    assert branch.indices == 3 and branch.query_map.shape == (4, 8, 5) and branch.key_norm.bound == 2
    assert AutoConfig.from_pretrained(saved(model, tmp_path)).multipole == model.config.multipole
    # The defaults are those of MultipoleConfig.
    for options in ({}, {"tensor_method": "polynomial"}):
        model = convert(stock(), "tensor", **options)
        own = MultipoleConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, layer_types=["tensor_attention"], **options)
        assert tensor_options(model.config, 8) == tensor_options(own, 8)


def test_layers_that_were_left_exact(ids):
    """They are exact, and give their weights; a layer with a branch has none to give."""
    model = converted(layers=[0])
    hidden = torch.randn(2, N, 32, dtype=torch.float64)
    exact = stock()
    angles = exact.model.rotary_emb(hidden, torch.arange(N)[None])
    mask = create_causal_mask(model.config, hidden, None, None)
    out, weights = model.model.layers[1].self_attn(hidden, angles, mask, output_attentions=True)
    expected, _ = exact.model.layers[1].self_attn(hidden, angles, None)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, N, dtype=torch.float64), **CLOSE)
    with pytest.raises(ValueError, match="output_attentions is not supported by tensor layers"):
        model(ids, output_attentions=True)


def test_refusals_name_the_attention_that_was_asked_for(ids):
    model = converted()
    with pytest.raises(ValueError, match="attn_implementation='tensor' needs the queries to be the last .* use a dynamic cache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=2 * N))


# Loading


@pytest.mark.parametrize("missing", ["all", "some"])
def test_parameters_that_a_checkpoint_lacks_start_as_they_would(missing, tmp_path):
    """They are made without memory and filled later, by rules that do not know them."""
    model = converted(**{"tensor_entry_bound": 1.0})
    path = saved(model, tmp_path) / "model.safetensors"
    weights = {name: x for name, x in load_file(path).items() if not (missing == "all" and ".tensor_branch." in name)}
    dropped = [name for name in learned(model) if "layers.1" in name and name.endswith(("gate", "key_map", "query_norm.weight"))]
    for name in dropped:
        weights.pop(name, None)
    save_file(weights, path, {"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert len(dropped) == 3 and set(dropped) <= set(report["missing_keys"])
    for name, parameter in learned(loaded).items():
        if name not in dropped and missing == "some":
            assert torch.equal(parameter, model.get_parameter(name)), name
        elif name.endswith(("query_map", "key_map")):
            # 256 or 128 numbers of variance 1 / 8 have one within five standard deviations.
            assert abs(parameter.var().item() * 8 - 1) < 5 * (2 / parameter.numel()) ** 0.5
        else:
            first = torch.arange(4).view(-1, 1, 1) < 2
            start = {"value_map": first * torch.eye(8), "value_shift": (~first).expand(4, 1, 8), "gate": torch.zeros(4)}
            expected = start.get(name.rsplit(".")[-1], torch.ones_like(parameter))
            assert torch.equal(parameter, expected.double()), name
    torch.testing.assert_close(loaded.state_dict(), loaded.state_dict() | weights, atol=0, rtol=0)


def test_a_new_model_of_the_configuration(ids):
    """It has its branches, at the start; options that come after the model say what to do; and initialising again changes nothing."""
    config = converted().config
    model = LlamaForCausalLM(copy.deepcopy(config)).double().eval()
    assert model.config._attn_implementation == "tensor"
    assert len(branches(model)) == 2 and not any(branch.gate.any() for branch in branches(model))
    model(ids)
    model = converted(tensor_entry_bound=1.0)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    model = stock()
    model.config.multipole = config.multipole
    model.set_attn_implementation("tensor")
    with pytest.raises(ValueError, match=r'use hf_multipole.convert\(model, "tensor"\)'):
        model(ids)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**GROUPED))
    convert(model, "tensor")
    assert all(parameter.is_meta for parameter in learned(model).values())


@pytest.mark.slow
def test_in_a_new_process(ids, tmp_path):
    """Importing the package is enough to load it; without that Transformers refuses, instead of dropping the branches."""
    model = converted().float()
    saved(model, tmp_path / "model")
    torch.save((ids, model(ids).logits), tmp_path / "expected")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model")
except ValueError as error:
    assert 'attn_implementation="tensor"` is not supported' in str(error), error
else:
    raise AssertionError("it was loaded")
import hf_multipole
ids, expected = torch.load(sys.argv[1] + "/expected")
assert torch.allclose(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model").eval()(ids).logits, expected, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_implementation_by_choice(ids, tmp_path, caplog):
    """Asked for explicitly, the stock model's attention runs with the branches there, unused; they come back with the next loading."""
    model = converted()
    transformers.utils.logging.get_logger("hf_multipole.integration.conversion").addHandler(caplog.handler)
    transformers.utils.logging.warning_once.cache_clear()
    exact = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "a"), dtype=torch.float64, attn_implementation="sdpa").eval()
    assert "converted to tensor attention, but runs with 'sdpa', without its tensor branches: pass" in caplog.text
    torch.testing.assert_close(exact(ids).logits, stock()(ids).logits, atol=1e-4, rtol=1e-4)
    again = AutoModelForCausalLM.from_pretrained(saved(exact, tmp_path / "b"), dtype=torch.float64)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert again.config._attn_implementation == "tensor" and "runs with 'tensor'" not in caplog.text


def test_masks_move():
    """As hooks move what a model split over devices passes on."""
    ids = tokens(n=5)
    mask = create_causal_mask(converted().config, torch.zeros(2, 5, 32), padded_mask(ids, 1, 1), None).to("meta")
    assert mask.exact.is_meta and mask.tokens.attention_mask.is_meta and mask.exact.shape == (2, 1, 5, 5)
    with pytest.raises(ValueError, match="works with its attention mask itself"):
        mask[:, 0]


# What is refused


def test_a_section_of_a_training_configuration():
    model = run_converted(stock(), {"kind": "tensor", "tensor_window": [2, 4], "layers": [1]})
    assert len(branches(model)) == 1 and branches(model)[0].options.window == (2, 4)
    with pytest.raises(ValueError, match="unknown key 'tensor_windw'; did you mean 'tensor_window'"):
        run_converted(stock(), {"kind": "tensor", "tensor_windw": [2, 4]})


@pytest.mark.parametrize("inputs", [{}, {"attention_mask": torch.ones(2, N, dtype=torch.long)}])
def test_a_stock_model_that_was_not_converted(ids, inputs):
    model = stock()
    model.set_attn_implementation("tensor")
    with pytest.raises(ValueError, match=r"'tensor' is for layers with .*: use hf_multipole.convert\(model, \"tensor\"\) for a stock"):
        model(ids, **inputs)
    model = convert(stock(), "multipole")
    model.set_attn_implementation("tensor")
    with pytest.raises(ValueError, match=r"hf_multipole.convert\(model, \"tensor\"\)"):
        model(ids, **inputs)


def with_options(options):
    model = stock()
    model.config.multipole = options
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "takes a model of Transformers, but this is a Linear"),
        (lambda: MultipoleForCausalLM(MultipoleConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)), {}, "has multipole"),
        (lambda: build(GPT2Config(n_embd=32, n_layer=1, n_head=4, add_cross_attention=True), implementation="sdpa"), {}, "cross-attention"),
        (lambda: build(MistralConfig(**GROUPED, sliding_window=8)), {}, "nothing to convert: all layers have a sliding window"),
        (stock, {"layers": [0, 7]}, r"layers is \[0, 7\]"),
        (stock, {"tensor_order": 1}, "tensor_order is 1, but must be at least 2"),
        (stock, {"tensor_order": 2.0}, "tensor_order is 2.0, but must be at least 2"),
        (stock, {"tensor_method": "taylor"}, "tensor_method is 'taylor', but must be 'exact' or 'polynomial'"),
        (stock, {"tensor_window": [4]}, r"tensor_window is \[4\], but must have one width, or None, for each of the 2 keys"),
        (stock, {"tensor_window": 4}, "tensor_window is 4, but must be a list of widths"),
        (stock, {"tensor_window": [4, 4], "tensor_method": "polynomial"}, "tensor_window belongs to method='exact'"),
        (stock, {"tensor_degree": 3}, "tensor_degree belongs to method='polynomial'"),
        (stock, {"tensor_entry_bound": -1.0}, "tensor_entry_bound is -1.0, but must be a positive number"),
        (stock, {"tensor_score_dim": 0}, "tensor_score_dim is 0, but must be positive"),
        (stock, {"tensor_entry_bound": 3.0, "tensor_method": "polynomial"}, "scores may reach .*: take a smaller tensor_entry_bound"),
        (stock, {"rank": 4}, r"rank is no option of convert\(model, 'tensor'\): leave it out; its options are layers, tensor_order"),
        (stock, {"far_bias_init": None}, r"far_bias_init is no option of convert\(model, 'tensor'\)"),
        (stock, {"kind": "multipole", "tensor_order": 3}, r"tensor_order is no option of convert\(model, 'multipole'\)"),
        (lambda: with_options({"summary": "direct"}), {}, "one or the other"),
        (
            lambda: with_options({"tensor_order": 3}),
            {"kind": "multipole", "summary": "mean", "far_bias_init": None},
            "has tensor_\\* options: take them out",
        ),
        (lambda: with_options({"tensor_rank": 3}), {}, "config.multipole has 'tensor_rank', but the options are .*'tensor_score_dim'"),
        (lambda: convert(stock(), "multipole"), {}, "was converted already; hf_multipole.revert"),
        (lambda: convert(stock(), "tensor"), {}, "was converted already; hf_multipole.revert"),
        (lambda: convert(stock(), "tensor"), {"kind": "multipole"}, "was converted already; hf_multipole.revert"),
    ],
)
def test_refused(make, options, message):
    model = make()
    before = copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else None
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        convert(model, **{"kind": "tensor"} | options)
    assert names == [name for name, _ in model.named_parameters()]
    if before is not None:
        assert model.config.to_dict() == before

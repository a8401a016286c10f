"""convert(model, "tensor"): a gated tensor branch beside the attention of stock models."""

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
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    StaticCache,
    ViTConfig,
)
from transformers.masking_utils import create_causal_mask

from hf_multipole import MultipoleCache, MultipoleConfig, MultipoleForCausalLM, convert, revert
from hf_multipole.integration.tensor_branch import TensorBranch
from hf_multipole.modeling.configuration_multipole import TENSOR_OPTIONS, tensor_options
from hf_multipole.modeling.polynomial_attention import TOLERANCE
from hf_multipole.modeling.tensor_attention import document_numbers
from hf_multipole.reference import tensor_attention_reference
from hf_multipole.training.models import converted as run_converted
from tests.helpers.conversion_runs import check_sharded, saved, trainer
from tests.helpers.stock_models import CLOSE, DECODERS, ENCODERS, GROUPED, IMAGES, auto_class_of, build, tokens

MODELS = DECODERS | ENCODERS
N = 21
WINDOWS = {"tensor_window": [3, 7]}
POLYNOMIAL = {"tensor_method": "polynomial", "tensor_score_dim": 3}
KINDS = [
    WINDOWS,
    {"tensor_window": [None, 2], "tensor_score_dim": 4, "tensor_entry_bound": 1.3},
    {"tensor_order": 2},
    {"tensor_order": 4, "tensor_window": [2, 3, 4]},
    POLYNOMIAL,
]


@pytest.fixture
def ids():
    return tokens(n=N)


def stock(name="llama", implementation="sdpa"):
    """A model as Transformers runs it; those with a soft cap have no "sdpa"."""
    config = copy.deepcopy(MODELS[name])
    del config.multipole
    return build(config, auto_class_of(name), "eager" if name == "gemma2" else implementation)


def branches(model):
    return [module for module in model.modules() if isinstance(module, TensorBranch)]


def learned(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".tensor_branch." in name}


def change(model):
    """As if trained: open gates, and maps far from their start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in learned(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * 0.5)
    return model


def converted(name="llama", **options):
    return change(convert(stock(name), "tensor", **WINDOWS | options))


def padded_mask(ids, left=4, right=3):
    """Padding on the left of the first row, and on the right of the second."""
    mask = torch.ones_like(ids)
    mask[0, :left], mask[1, -right:] = 0, 0
    return mask


# The definition


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_the_branch_is_the_definition(options, causal, kind):
    """Output and all gradients; the output of the polynomial to what its weights may be off."""
    torch.manual_seed(0)
    heads, kv_heads, dim, n, queries = 4, 2, 6, 9, 9 if kind == "packed" else 5
    config = LlamaConfig(multipole=options)
    branch = TensorBranch(tensor_options(config, dim), heads, kv_heads, dim).double()
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    shapes = (heads, queries), (kv_heads, n), (kv_heads, n)
    q, k, v = (torch.randn(2, *shape, dim, dtype=torch.float64, requires_grad=True) for shape in shapes)
    inputs = {}
    if kind == "padded":
        inputs["attention_mask"] = padded_mask(torch.ones(2, n, dtype=torch.long), 3, 2)
    elif kind == "packed":
        inputs["segment_ids"] = torch.tensor([[0] * 4 + [1] * 5, [0] * 8 + [1]])
    out = branch(q, k, v, document_numbers(inputs.get("attention_mask"), inputs.get("segment_ids")), causal)

    def bounded(x, norm):
        if norm is None:
            return x
        rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return norm.bound * torch.tanh(norm.weight * x / rms)

    query = bounded(torch.einsum("bhnd,hds->bhns", q, branch.query_map), branch.query_norm)
    indices = branch.indices
    key = torch.einsum("bhnd,ihds->bihns", k, branch.key_map.unflatten(0, (indices, kv_heads)))
    key = bounded(key.flatten(1, 2), branch.key_norm).unflatten(1, (indices, kv_heads))
    value = torch.einsum("bhnd,ihds->bihns", v, branch.value_map.unflatten(0, (indices, kv_heads)))
    value = value + branch.value_shift.unflatten(0, (indices, kv_heads))
    window = options.get("tensor_window")
    expected = tensor_attention_reference(query, key.unbind(1), value.unbind(1), causal=causal, window=window, **inputs)
    expected = expected.transpose(1, 2) * branch.gate.view(1, 1, -1, 1)
    assert expected.abs().max() > 0.1
    leaves = [q, k, v, *branch.parameters()]
    upstream = torch.randn_like(out)
    gradients, wanted = (torch.autograd.grad(y, leaves, upstream) for y in (out, expected))
    assert all(gradient.abs().max() > 1e-3 for gradient in wanted)
    close = CLOSE
    if options is POLYNOMIAL:
        # A relative error of the weights, times half the range of what they weigh.
        largest = (value[:, 0, :, :, None] * value[:, 1, :, None]).abs().max().item()
        close = {"atol": TOLERANCE / (1 - TOLERANCE) * largest * branch.gate.abs().max().item(), "rtol": 0}
        assert (out - expected).abs().max() > 1e-9  # it is the polynomial that ran
    torch.testing.assert_close(out, expected, **close)
    if options is not POLYNOMIAL:
        torch.testing.assert_close(gradients, wanted, **close)


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
    assert model.config.multipole == TENSOR_OPTIONS | {"tensor_entry_bound": 2.0} | expected
    assert [hasattr(layer.self_attn, "tensor_branch") for layer in model.model.layers] == [False, True]
    branch = model.model.layers[1].self_attn.tensor_branch
    assert branch.indices == 3 and branch.query_map.shape == (4, 8, 5) and branch.key_norm.bound == 2
    assert AutoConfig.from_pretrained(saved(model, tmp_path)).multipole == model.config.multipole
    # The defaults are those of MultipoleConfig.
    for options in ({}, {"tensor_method": "polynomial"}):
        model = convert(stock(), "tensor", **options)
        own = MultipoleConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, layer_types=["tensor_attention"], **options)
        assert tensor_options(model.config, 8) == {name: getattr(own, name) for name in TENSOR_OPTIONS}


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


# Training


@pytest.mark.parametrize("options", KINDS)
def test_every_part_is_trained(ids, options):
    """At first the gates alone, while the stock model's gradients are its own; once they have moved, everything."""
    model = stock().train()
    model(ids, labels=ids).loss.backward()
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    convert(model, "tensor", **options)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter.grad, before[name], **CLOSE)
        else:
            assert (parameter.grad.abs().min() > 0) if name.endswith("gate") else not parameter.grad.any(), name
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0 for parameter in learned(model).values())


def test_the_branches_alone_learn(ids):
    """With everything else frozen, they lower the loss."""
    model = convert(stock(), "tensor", **WINDOWS).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".tensor_branch." in name)
    optimizer = torch.optim.Adam(learned(model).values(), 0.02)
    losses = []
    for _ in range(8):
        losses.append(model(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05


def test_gradients_checkpointing_and_compilation(ids):
    results = []
    for variant in ("plain", "checkpointing", "compile"):
        model = converted(layers=[1]).train()
        if variant == "checkpointing":
            model.gradient_checkpointing_enable()
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if variant == "compile" else model
        loss = run(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    torch.testing.assert_close(results[2], results[0], **CLOSE)


@pytest.mark.parametrize("options", [WINDOWS, POLYNOMIAL])
def test_autocast(ids, options):
    """Rounding costs no more than four times what it costs the stock model: every product has one factor more, on both sides of the
    softmax.
    """
    errors = []
    for model in (stock().float(), converted(**{"tensor_window": None} | options).float()):
        exact, dtypes = model(ids).logits, []
        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args, seen=dtypes: seen.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids, labels=ids)
        assert dtypes == [torch.bfloat16]
        mixed.loss.backward()
        assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in model.parameters())
        errors.append((mixed.logits.float() - exact).square().mean().sqrt().item())
    assert 0 < errors[1] < 4 * errors[0]


def test_dropout(ids):
    """The pairs' weights are dropped with the model's own probability; where there are none to drop, it is said."""
    config = LlamaConfig(**GROUPED, attention_dropout=0.4)
    model, passed = change(convert(build(config, implementation="sdpa"), "tensor", **WINDOWS)), []
    branch = branches(model)[0]
    branch.register_forward_hook(lambda module, args, out: passed.append(args))
    for training in (False, True):
        model.train(training)(ids)
        *args, dropout = passed.pop()
        assert dropout == (0.4 if training else 0)
    torch.manual_seed(1)
    first, second = branch(*args, dropout), branch(*args, dropout)
    torch.manual_seed(1)
    assert torch.equal(branch(*args, dropout), first) and (first - second).abs().max() > 1e-3
    # And exact attention drops what it dropped. The last layer's branch draws after all others.
    outputs = []
    for model in (build(config, implementation="sdpa"), convert(build(config, implementation="sdpa"), "tensor", layers=[1], **WINDOWS)):
        torch.manual_seed(1)
        outputs.append(model.train()(ids).logits)
    assert torch.equal(*outputs) and (outputs[0] - model.eval()(ids).logits).abs().max() > 1e-3
    model = convert(build(config, implementation="sdpa"), "tensor", **POLYNOMIAL)
    model(ids)
    with pytest.raises(ValueError, match="drops attention weights with probability 0.4, but .*'polynomial' .*: set the attention dropout"):
        model.train()(ids)


def test_trainer(ids, tmp_path):
    """Trains the branches too, and resumes from a checkpoint to the same weights."""
    model = convert(stock().float(), "tensor", **POLYNOMIAL)
    before = {name: parameter.detach().clone() for name, parameter in learned(model).items()}
    trainer(model, tmp_path, ids).train()
    assert all((parameter != before[name]).any() for name, parameter in learned(model).items())
    resumed = trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), tmp_path, ids)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(resumed.model.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_adapters(ids, tmp_path):
    """LoRA on the projections, with the branches as modules to save: both train, are saved, loaded and merged."""
    peft = pytest.importorskip("peft")
    folder = saved(converted(), tmp_path / "model")

    def load():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["tensor_branch"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(), config)
    torch.testing.assert_close(model(ids).logits, load()(ids).logits, atol=0, rtol=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora" in name for name in trained) and any("tensor_branch.modules_to_save" in name for name in trained)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.5)
    for _ in range(2):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    out = model(ids).logits
    assert (out - load()(ids).logits).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, out, **CLOSE)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, out, **CLOSE)


def test_fully_sharded(ids, tmp_path):
    check_sharded(converted(), ids, tmp_path)


# Rows, and generation


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", WINDOWS), ("llama", POLYNOMIAL | {"tensor_window": None}), ("gemma2", WINDOWS), ("gpt2", WINDOWS), ("bert", WINDOWS)],
)
def test_a_row_alone_is_the_row_in_a_batch(name, options):
    model, mask = converted(name, **options), padded_mask(tokens(n=N))
    ids = tokens(n=N).masked_fill(mask == 0, 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    assert together.isfinite().all()
    for row, real in zip((0, 1), mask.bool()):
        torch.testing.assert_close(together[row, real], model(ids[row, real][None]).logits[0], **CLOSE)


@pytest.mark.parametrize("options", [WINDOWS, POLYNOMIAL | {"tensor_window": None}])
def test_packed_documents_are_documents_alone(ids, options):
    model, lengths = converted(**options), (3, 12, 1, 5)
    alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, alone, **CLOSE)
    with pytest.raises(ValueError, match="position_ids that start anew.*its own row"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, N]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", WINDOWS),
        ("llama", {"tensor_window": None}),
        ("qwen3", POLYNOMIAL | {"tensor_window": None}),
        ("gpt2", {"tensor_order": 2, "tensor_window": None}),
        ("gemma2", WINDOWS),
        ("qwen3 with windows", WINDOWS),
    ],
)
def test_generation(name, options):
    """On the cache of the stock model, which keeps what it kept: step by step, in chunks, and without it."""
    model, prompt = converted(name, **options), tokens(n=12)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    given = dict(max_new_tokens=13, eos_token_id=-1, pad_token_id=0, attention_mask=mask, do_sample=False)
    with torch.no_grad():
        cache, stock_cache = DynamicCache(config=model.config), DynamicCache(config=stock(name).config)
        written = model.generate(prompt, past_key_values=cache, **given)
        assert torch.equal(written, model.generate(prompt, use_cache=False, **given))
        stock(name).generate(prompt, past_key_values=stock_cache, **given)
        for one, other in zip(cache.layers, stock_cache.layers):
            assert type(one) is type(other) and one.keys.shape == other.keys.shape
        assert (stock(name)(written).logits - model(written).logits).abs().max() > 1e-3

        whole, cache, parts = model(written).logits, DynamicCache(config=model.config), []
        for part in written.split([11, 1, 1, 9, 3], 1):
            parts.append(model(part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def test_other_caches(ids):
    """A MultipoleCache keeps all keys, as the model does; static caches are refused."""
    model = converted()
    cache = MultipoleCache(config=model.config)
    model(ids[:, :9], past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 9:], past_key_values=cache).logits, model(ids).logits[:, 9:], **CLOSE)
    with pytest.raises(ValueError, match="static caches and cross-attention are not supported"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)


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
    assert len(branches(model)) == 1 and branches(model)[0].options["window"] == [2, 4]
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
        (stock, {"tensor_window": 4}, "tensor_window is 4, but must have one width"),
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

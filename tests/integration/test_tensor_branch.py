"""The gated tensor branch beside the attention of stock models: its definition, training, and generation."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
)

from hf_multipole import MultipoleCache, convert
from hf_multipole.integration.tensor_branch import TensorBranch
from hf_multipole.modeling.configuration_multipole import tensor_options
from hf_multipole.modeling.polynomial_attention import TOLERANCE
from hf_multipole.modeling.tensor_attention import document_numbers
from hf_multipole.reference import tensor_attention_reference
from tests.helpers.conversion_runs import check_sharded, saved, trainer
from tests.helpers.stock_models import CLOSE, GROUPED, build, tokens
from tests.helpers.tensor_conversions import KINDS, POLYNOMIAL, WINDOWS, N, branches, change, converted, learned, padded_mask, stock


@pytest.fixture
def ids():
    return tokens(n=N)


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


@pytest.mark.slow
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

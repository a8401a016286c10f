"""Training of the multipole models: gradients under checkpointing, dropout, autocast and compilation."""

import contextlib

import pytest
import torch

from hf_multipole import (
    MultipoleModel,
)
from tests.helpers.tiny_models import (
    CLOSE,
    HYBRID,
    build,
    gradients,
    pad,
    tokens,
)


@pytest.fixture
def ids():
    return tokens()


@pytest.mark.parametrize("options", [{}, {"layer_types": HYBRID}, {"attention_dropout": 0.3}, {"rotate_summaries": True}])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(ids, options, use_reentrant):
    model = build(**options).train()
    ids, mask = pad(ids, left=3)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            assert model.model.gradient_checkpointing
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    assert len(results[0][1]) == len(list(model.parameters()))


def test_attention_dropout(ids):
    model = build(attention_dropout=0.5)
    plain = model(ids).logits
    torch.testing.assert_close(model(ids).logits, plain, atol=0, rtol=0)
    model.train()
    assert (model(ids).logits - plain).abs().max() > 1e-3
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(model(ids).logits)
    torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=0)


def test_an_empty_row_does_no_harm(ids):
    """A row of padding only changes neither the outputs nor the gradients of the others."""
    for implementation in ("multipole", "sdpa", "eager"):
        model = build(attn_implementation=implementation, layer_types=HYBRID)
        mask = torch.ones_like(ids)
        mask[0] = 0
        output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        output.loss.backward()
        together = gradients(model)
        assert output.logits.isfinite().all()
        model.zero_grad()
        alone = model(ids[1:], labels=ids[1:])
        alone.loss.backward()
        torch.testing.assert_close(output.logits[1:], alone.logits, **CLOSE)
        torch.testing.assert_close(together, gradients(model), **CLOSE)


@pytest.mark.parametrize("summary", ["hierarchical", "direct", "mean"])
def test_every_parameter_is_trained(ids, summary):
    model = build(summary=summary)
    model(ids, labels=ids).loss.backward()
    longer = {name for name, _ in model.named_parameters() if name.endswith(("level_4", "level_5"))}  # than these rows
    trained = gradients(model)
    assert set(trained) == {name for name, _ in model.named_parameters()} - longer
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in trained.values())


def test_bfloat16_and_autocast(ids):
    """Rounding costs the multipole model no more than twice what it costs the same model with exact attention."""
    errors = {}
    for implementation in ("multipole", "sdpa"):
        model = build(dtype=torch.float32, attn_implementation=implementation)
        exact = model(ids, labels=ids)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids, labels=ids)
        mixed.loss.backward()
        assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients(model).values())
        model = model.bfloat16()
        half = model(ids, labels=ids)
        half.loss.backward()
        assert half.logits.dtype == torch.bfloat16 and all(gradient.isfinite().all() for gradient in gradients(model).values())
        errors[implementation] = [(output.logits.float() - exact.logits).square().mean().sqrt().item() for output in (mixed, half)]
    for multipole, sdpa in zip(errors["multipole"], errors["sdpa"]):
        assert 0 < multipole < 2 * sdpa


@pytest.mark.parametrize(
    ("training", "padded", "options"),
    [
        (True, True, {}),
        (True, False, {"is_causal": False, "rotate_summaries": True}),
        (False, True, {"is_causal": False, "rotate_summaries": True}),
        (False, False, {}),
        (False, False, {"max_position_embeddings": 32}),
    ],
)
@pytest.mark.slow
def test_compile(ids, training, padded, options):
    model = build(layer_types=["multipole_attention", "full_attention"], **options).train(training)
    ids, mask = pad(ids, left=3)
    # One row without padding, so that both alignments are in one batch.
    mask[0] = 1
    inputs = {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}
    torch._dynamo.reset()
    # Graph capture and autograd are in question here, not the code that inductor makes.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grad = contextlib.nullcontext() if training else torch.no_grad()
    results = []
    for run in (model, compiled):
        model.zero_grad()
        with grad:
            output = run(**inputs, use_cache=False)
        if training:
            (output.logits * mask[..., None]).square().mean().backward()
        results.append((output.logits[mask.bool()], gradients(model) if training else None))
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@pytest.mark.slow
def test_compile_by_inductor(ids):
    """The default backend, on one layer."""
    model = build(MultipoleModel, dtype=torch.float32, layer_types=["multipole_attention"])
    torch._dynamo.reset()
    with torch.no_grad():
        expected, got = (run(ids, use_cache=False)[0] for run in (model, torch.compile(model, fullgraph=True)))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)

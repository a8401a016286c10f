"""torch.export and torch.onnx: what a program of a model can be, and one line for what it cannot."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_multipole import multipole_attention
from hf_multipole.modeling.operators import refuse_onnx
from tests.helpers.tiny_models import BLOCK, RANK, TOKENS, VOCABULARY, build, pad, tokens

BATCH, LENGTH = torch.export.Dim("batch", max=16), torch.export.Dim("length", min=2, max=200)
DYNAMIC = "cannot be exported with a dynamic length.*fixed length.*attn_implementation='sdpa'"


def stock(implementation):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, multipole={"block_size": BLOCK, "rank": RANK}, **sizes)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


MODELS = {
    "own": lambda: build(dtype=torch.float32, layer_types=["multipole_attention"]),
    "linear": lambda: build(dtype=torch.float32, layer_types=["multipole_linear_attention"]),
    "rotated": lambda: build(dtype=torch.float32, layer_types=["multipole_attention"], rotate_summaries=True),
    "tensor": lambda: build(dtype=torch.float32, layer_types=["tensor_attention"]),
    "stock": lambda: stock("multipole"),
    "stock linear": lambda: stock("multipole_linear"),
}
LEVELS = [name for name in MODELS if name != "tensor"]


def inputs(padded=True):
    ids, mask = pad(tokens(), left=3)
    return {"input_ids": ids, "use_cache": False} | ({"attention_mask": mask} if padded else {})


def exported(model, given, shapes):
    dynamic = {name: None if name == "use_cache" else shapes for name in given}
    return torch.export.export(model, (), kwargs=given, dynamic_shapes=dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_fixed_length_and_any_batch(name):
    """The program gives the model's own logits, for another number of rows too."""
    model, given = MODELS[name](), inputs()
    program = exported(model, given, {0: BATCH}).module()
    for rows in (2, 5):
        more = {key: x if key == "use_cache" else x[:1].repeat(rows, 1) for key, x in given.items()}
        torch.testing.assert_close(program(**more).logits, model(**more).logits)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.slow
def test_a_dynamic_length_is_refused(name):
    with pytest.raises(ValueError, match=DYNAMIC):
        exported(MODELS[name](), inputs(), {1: LENGTH})


@pytest.mark.parametrize("padded", [False, True])
def test_a_dynamic_length_of_the_function(padded):
    class Attention(torch.nn.Module):
        def forward(self, x, mask):
            return multipole_attention(x, x, x, block_size=BLOCK, rank=RANK, attention_mask=mask if padded else None)

    given = (torch.randn(2, 2, TOKENS, 4), torch.ones(2, TOKENS, dtype=torch.bool))
    torch.export.export(Attention(), given)
    with pytest.raises(ValueError, match=DYNAMIC):
        torch.export.export(Attention(), given, dynamic_shapes=({2: LENGTH}, {1: LENGTH}))


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["own", "stock"])
def test_exact_attention_has_a_dynamic_length(own):
    """What the refusal advises: one program for rows of several lengths."""
    model, given = build(dtype=torch.float32) if own else stock("sdpa"), inputs()
    model.set_attn_implementation("sdpa")
    program = exported(model, given, {1: LENGTH}).module()
    for n in (20, TOKENS):
        shorter = {key: x if key == "use_cache" else x[:, :n] for key, x in given.items()}
        torch.testing.assert_close(program(**shorter).logits, model(**shorter).logits)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_onnx_is_refused(monkeypatch, name):
    """Within torch.onnx, which needs a package of its own, a program or a trace of a model is refused, and exact attention is not."""
    model, given = MODELS[name](), inputs()
    monkeypatch.setattr("torch.onnx.is_in_onnx_export", lambda: True)
    message = "no operators in ONNX.*attn_implementation='sdpa'"
    with pytest.raises(ValueError, match=message):
        refuse_onnx()
    with pytest.raises(ValueError, match=message):
        model(**given)
    if name == "own":
        with pytest.raises(ValueError, match=message):
            exported(model, given, {0: BATCH})
    if name != "tensor":
        model.set_attn_implementation("sdpa")
        model(**given)

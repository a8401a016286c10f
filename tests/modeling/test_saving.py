"""The multipole models saved, loaded, spread over devices and in pipelines."""

import copy
import logging

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from hf_multipole import (
    MultipoleForCausalLM,
    MultipoleForMaskedLM,
    MultipoleForTokenClassification,
    MultipoleModel,
)
from hf_multipole.modeling.modeling_multipole import MultipoleAttention
from hf_multipole.modeling.summaries import HierarchicalSummary, MeanSummary
from tests.helpers.tiny_models import (
    AUTO_CLASSES,
    BLOCK,
    CLOSE,
    HYBRID,
    RANK,
    TOKENS,
    VOCABULARY,
    build,
    pad,
    tiny_config,
    tokens,
)


@pytest.fixture
def ids():
    return tokens()


# Saving, loading, devices


@pytest.mark.parametrize("summary", ["hierarchical", "direct", "mean"])
@pytest.mark.parametrize("auto_class", list(AUTO_CLASSES))
def test_save_and_load_to_the_bit(tmp_path, ids, auto_class, summary):
    cls = AUTO_CLASSES[auto_class]
    model = build(cls, dtype=torch.float32, summary=summary, num_labels=3, is_causal=cls is MultipoleForCausalLM, layer_types=HYBRID)
    model.save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is cls
    assert not any(info.values()), info
    assert loaded.config.to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # As a copy, whose memory is aligned as the first model's was: the order of a matrix product's sums depends on that.
    assert torch.equal(copy.deepcopy(loaded)(ids)[0], model(ids)[0])
    assert loaded.config._attn_implementation == "multipole"
    half = auto_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cls", [MultipoleForCausalLM, MultipoleForMaskedLM])
def test_tied_embeddings(tmp_path, ids, cls, tied):
    model = build(cls, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for each in (model, loaded):
        assert (each.lm_head.weight is each.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    torch.testing.assert_close(loaded(ids)[0], model(ids)[0], **CLOSE)
    # Still tied after a step.
    loaded(ids)[0].square().mean().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("size", [VOCABULARY + 14, VOCABULARY - 10])
@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tmp_path, size, tied):
    model = build(tie_word_embeddings=tied)
    ids = tokens() % 40
    kept = min(size, VOCABULARY)
    before = model(ids).logits[..., :kept]
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == model.lm_head.out_features == size
    output = model(ids, labels=ids)
    assert output.logits.shape[-1] == size and output.loss.isfinite()
    torch.testing.assert_close(output.logits[..., :kept], before, **CLOSE)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(MultipoleForCausalLM.from_pretrained(tmp_path)(ids).logits, output.logits, **CLOSE)


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_a_causal_checkpoint_under_another_head(tmp_path, ids, auto_class):
    causal = build()
    causal.save_pretrained(tmp_path)
    options = {"num_labels": 3} if "Classification" in auto_class.__name__ else {}
    model, info = auto_class.from_pretrained(tmp_path, is_causal=False, output_loading_info=True, **options)
    assert info["missing_keys"] == {name for name in model.state_dict() if name.startswith("score")}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.is_causal is False
    backbone = model if auto_class is AutoModel else model.model
    for name, parameter in causal.model.named_parameters():
        assert torch.equal(backbone.get_parameter(name), parameter)
    # It does look ahead now.
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % VOCABULARY
    first = model.eval()(ids, output_hidden_states=True).hidden_states[-1][:, 0]
    assert (model(changed, output_hidden_states=True).hidden_states[-1][:, 0] - first).abs().max() > 0


def test_missing_and_unexpected_keys_are_reported(tmp_path, caplog):
    build(tie_word_embeddings=False).save_pretrained(tmp_path)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        _, info = MultipoleForTokenClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert info["missing_keys"] == {"score.weight", "score.bias"}
    assert info["unexpected_keys"] == {"lm_head.weight"}
    for name in ("score.weight", "score.bias", "lm_head.weight"):
        assert name in caplog.text
    with pytest.raises(RuntimeError, match="mismatch"):
        MultipoleForCausalLM.from_pretrained(tmp_path, block_size=16)


def test_a_far_bias_can_be_left_out(tmp_path, ids):
    model = build(far_bias_init=None)
    assert not any("far_bias" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(MultipoleForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits, **CLOSE)


def check_start(model):
    """Summaries at the mean, the bias where the configuration says, nothing left uninitialised."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not tensor.is_meta and tensor.isfinite().all(), name
    x = torch.randn(1, 2, 64, 8).to(model.dtype)
    count = 0
    for module in model.modules():
        if isinstance(module, MeanSummary):
            count += 1
            for got, mean in zip(module(x, None, 3), MeanSummary(BLOCK, RANK)(x, None, 3)):
                torch.testing.assert_close(got, mean)
        if isinstance(module, HierarchicalSummary):
            # Exactly: one over the tokens of a segment, and one half for each child.
            assert module.tokens.unique().tolist() == [0, RANK / BLOCK] and module.merge.unique().tolist() == [0, 1 / 2]
        if isinstance(module, MultipoleAttention):
            assert (module.far_field.far_bias == model.config.far_bias_init).all()
    assert count == 2 * model.config.num_hidden_layers
    fresh = MultipoleModel(model.config).rotary_emb
    backbone = getattr(model, "model", model)
    torch.testing.assert_close(backbone.rotary_emb.inv_freq, fresh.inv_freq)
    torch.testing.assert_close(backbone.rotary_emb.original_inv_freq, fresh.inv_freq)
    assert (backbone.norm.weight == 1).all()
    assert 0.01 < backbone.layers[0].mlp.up_proj.weight.std() < 0.03


@pytest.mark.parametrize("summary", ["hierarchical", "direct", "mean"])
def test_initialisation_from_the_meta_device(summary):
    config = tiny_config(summary=summary, far_bias_init=-3.5)
    check_start(MultipoleForCausalLM(config))
    with torch.device("meta"):
        model = MultipoleForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)  # what uninitialised memory may be
    model.init_weights()
    check_start(model)


@pytest.mark.parametrize("summary", ["hierarchical", "direct", "mean"])
@pytest.mark.slow
def test_init_empty_weights(tmp_path, ids, summary):
    """accelerate's own way round from_pretrained."""
    model = build(summary=summary)
    model.save_pretrained(tmp_path)
    with init_empty_weights():
        empty = MultipoleForCausalLM(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.tie_weights()
    loaded = load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"}, dtype=torch.float64)
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("summary", ["hierarchical", "direct"])
@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_a_checkpoint_without_the_learned_parts(tmp_path, ids, summary, device_map):
    """An ordinary checkpoint starts as mean summaries, with the bias of the configuration."""
    model = MultipoleForCausalLM(tiny_config(summary=summary, far_bias_init=-3.5))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    learned = {name for name in weights if "summary" in name or "far_bias" in name}
    save_file({name: tensor for name, tensor in weights.items() if name not in learned}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, device_map=device_map)
    assert info["missing_keys"] == learned and len(learned) >= 6
    check_start(loaded)
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, OFFLOADED],
    ids=["auto", "one device", "offloaded"],
)
@pytest.mark.parametrize("options", [{}, {"rotate_summaries": True}, {"is_causal": False}], ids=["plain", "rotated", "bidirectional"])
@pytest.mark.slow
def test_device_maps(tmp_path, ids, device_map, options):
    model = build(layer_types=HYBRID, **options)
    model.save_pretrained(tmp_path / "model")
    dispatched = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload")
    if device_map is OFFLOADED:
        assert dispatched.model.layers[1].self_attn.q_proj.weight.is_meta
    ids, mask = pad(ids, left=3)
    mask[0] = 1
    for inputs in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            torch.testing.assert_close(dispatched(ids, **inputs).logits, model(ids, **inputs).logits, **CLOSE)
    if not model.config.is_causal:
        return
    generate = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    torch.testing.assert_close(dispatched.generate(**generate), model.generate(**generate))


def test_masks_move_between_devices(ids):
    """What accelerate does with the arguments of a layer on another device; the meta device stands for one."""
    model = build(rotate_summaries=True)
    ids, mask = pad(ids, left=3)
    seen = {}
    model.model.layers[0].register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(ids, attention_mask=mask, use_cache=False)
    moved = seen["attention_mask"].to("meta")
    assert moved.causal and moved.length == TOKENS + 3 and all(part.is_meta for part in moved.alignment)


def test_deep_copies(ids):
    model = build()
    before = model(ids).logits
    other = copy.deepcopy(model)
    torch.testing.assert_close(other(ids).logits, before, atol=0, rtol=0)
    assert other.lm_head.weight is other.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model(ids).logits, before)
    assert (other(ids).logits - before).abs().max() > 1e-2


# Pipelines


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<pad>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


def test_text_generation_pipeline(tmp_path):
    tokenizer = byte_tokenizer()
    model = build(dtype=torch.float32, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["def fast_multipole(x):\n    return", "import"]
    options = dict(max_new_tokens=20, do_sample=False)
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    for prompt, text in zip(prompts, alone):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert text == prompt + tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :])
    assert [out[0]["generated_text"] for out in generator(prompts, batch_size=2, **options)] == alone


def test_fill_mask_pipeline():
    words = "the cat sat on a mat and saw its far field".split()
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")
    model = build(
        MultipoleForMaskedLM, dtype=torch.float32, vocab_size=len(vocabulary), is_causal=False, bos_token_id=None, eos_token_id=None
    )
    text = "the cat sat on a [MASK] and " + "saw its far field " * 10
    found = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")(text, top_k=3)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = model(ids).logits[0, ids[0] == 2].softmax(-1)[0].topk(3)
    assert [out["token"] for out in found] == expected.indices.tolist()
    torch.testing.assert_close(torch.tensor([out["score"] for out in found]), expected.values, atol=1e-5, rtol=1e-4)

"""What of Transformers and torch is no public interface: it is there, does what it is used for, and is used in one file alone."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    initialization,
    masking_utils,
)
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, DynamicLayer, StaticLayer
from transformers.masking_utils import AttentionMaskInterface, and_masks, causal_mask_function, or_masks, packed_sequence_mask_function
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto import modeling_auto

import hf_multipole
from hf_multipole import convert
from hf_multipole.integration import conversion
from hf_multipole.modeling import private
from tests.helpers import stock_models, tiny_models

PACKAGE = Path(hf_multipole.__file__).parent
LLAMA = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)


def test_the_implementation_of_a_configuration():
    model = LlamaForCausalLM._from_config(LlamaConfig(**LLAMA), attn_implementation="eager")
    assert private.implementation_of(model.config) == "eager"
    other = private.with_implementation(model.config, "sdpa")
    assert private.implementation_of(other) == "sdpa" and private.implementation_of(model.config) == "eager"
    private.set_implementation(model.config, "multipole")
    assert private.implementation_of(model.config) == "multipole"


def test_an_implementation_is_forgotten():
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface.register("for_a_while", lambda *args, **kwargs: None)
    private.forget_implementation("for_a_while")
    assert "for_a_while" not in AttentionInterface().valid_keys() and "for_a_while" not in AttentionMaskInterface().valid_keys()


def test_layer_types_are_allowed():
    """By the base class of configurations, too, with which Trainer reads config.json."""
    for kind in hf_multipole.modeling.configuration_multipole.LAYER_TYPES:
        PreTrainedConfig(layer_types=[kind], num_hidden_layers=1).validate_layer_type()
    with pytest.raises((ValueError, StrictDataclassError), match="layer_types"):
        PreTrainedConfig(layer_types=["no_attention"], num_hidden_layers=1).validate_layer_type()


def test_cache_layers(monkeypatch):
    for mapping in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):
        monkeypatch.setitem(mapping, "tensor_attention", mapping["tensor_attention"])
    private.add_cache_layers("tensor_attention", type("One", (DynamicLayer,), {}), type("Other", (StaticLayer,), {}))
    config = tiny_models.tiny_config(layer_types=["tensor_attention"])
    assert [type(layer).__name__ for layer in DynamicCache(config=config).layers] == ["One"]
    assert [type(layer).__name__ for layer in StaticCache(config=config, max_cache_len=4).layers] == ["Other"]


def test_labels_are_shifted():
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["multipole"] == "MultipoleForCausalLM"


class Part(private.LearnedPart):
    def __init__(self):
        super().__init__()
        self.weight, self.filled = nn.Parameter(torch.zeros(2)), 0

    def reset_parameters(self):
        self.filled += 1
        initialization.ones_(self.weight)


class Holder(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.part = Part()
        self.post_init()


def test_parts_are_filled_where_a_checkpoint_lacks_them(tmp_path):
    assert Holder(PreTrainedConfig()).part.filled == 1
    model = Holder(PreTrainedConfig())
    with torch.no_grad():
        model.part.weight.fill_(5)
    model.save_pretrained(tmp_path)
    assert Holder.from_pretrained(tmp_path).part.weight.tolist() == [5, 5]
    # Nothing is filled again where a part came to a model that is there.
    model.part = Part()
    private.mark_initialised(model.part)
    filled = model.part.filled
    model.init_weights()
    assert model.part.filled == filled


def test_packed_documents():
    documents = torch.tensor([[0, 0, 1]])
    packed = packed_sequence_mask_function(documents)
    assert private.packed_documents(and_masks(causal_mask_function, packed)) is documents
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        within = masking_utils.remap_positions_for_packed_sequence(causal_mask_function, documents)
        assert private.packed_documents(and_masks(within, packed)) is documents
    for other in (
        causal_mask_function,
        packed,
        or_masks(causal_mask_function, packed),
        and_masks(causal_mask_function, packed, packed),
        and_masks(packed, packed),
        and_masks(causal_mask_function, causal_mask_function),
    ):
        assert private.packed_documents(other) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_backward(dtype):
    logits = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    weights, slope = logits.softmax(-1), torch.randn(3, 4, 5, dtype=dtype)
    (expected,) = torch.autograd.grad(weights, logits, slope)
    private.softmax_backward(slope, weights.detach(), dtype)
    torch.testing.assert_close(slope, expected)


# No hook in a forward


def frames(function):
    """The files of the Python functions that are called while ``function`` runs."""
    files = set()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: files.add(frame.f_code.co_filename) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(before)
    return files


@pytest.mark.parametrize("kind", ["own", "hybrid", "stock", "multipole", "multipole_linear", "tensor"])
def test_a_forward_runs_no_hook(kind):
    """Neither one of torch that serves all modules, nor anything of conversion, whatever a model's own forward does with modules."""
    if kind in ("own", "hybrid"):
        model = tiny_models.build(**({"layer_types": tiny_models.HYBRID} if kind == "hybrid" else {}))
    else:
        model = stock_models.build(stock_models.DECODERS["llama"], implementation="multipole" if kind == "stock" else "sdpa")
    if kind not in ("own", "hybrid", "stock"):
        model = convert(model, kind, **({"tensor_window": [2, 4]} if kind == "tensor" else {"block_size": 8, "rank": 2})).double()
    ids = stock_models.tokens()
    seen = frames(lambda: model(ids))
    assert PACKAGE / "modeling" / "attention_functions.py" in map(Path, seen)  # the profile sees what runs
    assert conversion.__file__ not in seen
    modules = torch.nn.modules.module
    assert not any(hooks for name, hooks in vars(modules).items() if re.fullmatch(r"_global_\w*hooks", name))


def test_building_a_model_calls_it_once_each():
    built = frames(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)))
    assert conversion.__file__ in built
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, multipole={"summary": "hierarchical"}))
    assert all(hasattr(layer.self_attn, "far_field") for layer in model.model.layers)


# In one place


def private_names(text: str, own: set[str]) -> list[str]:
    """Attributes with an underscore, of things of others, that a file reads or writes."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in own:
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [name.name for name in node.names if re.match(r"_[^_]", name.name)]
    return found


def named_here(text: str) -> set[str]:
    """Names with an underscore that a file gives to something of its own."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", None) == "self":
            names.add(node.attr)
    return names


def test_times_written():
    """Counts what is written in place, by whoever, and through views."""
    x = torch.zeros(4)
    before = private.times_written(x)
    x[1:].add_(1)
    with torch.no_grad():
        x.copy_(torch.ones(4))
    assert private.times_written(x) == before + 2


def test_it_stands_in_one_file():
    files = {path: path.read_text() for room in ("modeling", "integration") for path in sorted((PACKAGE / room).glob("*.py"))}
    one = files.pop(Path(private.__file__))
    # Those of named tuples are public.
    own = set().union(*map(named_here, files.values())) | {"_replace", "_fields", "_asdict", "_make"}
    assert not {str(path): found for path, text in files.items() if (found := private_names(text, own))}
    assert {"_attn_implementation", "_softmax_backward_data", "_global_mapping"} <= set(private_names(one, set()))
    assert private_names("import x\nx._y", set()) == ["_y"] and private_names("from x import _y", set()) == ["_y"]


def test_it_was_checked_with_the_bound_of_the_requirement():
    """The file names the versions, and the package requires no later one of Transformers."""
    checked = [Version(number) for number in re.findall(r"\d+\.\d+\.\d+", private.__doc__)]
    required = [line for line in requirements() if Requirement(line).name == "transformers"]
    assert len(required) == 1
    bound = Requirement(required[0]).specifier
    latest = max(number for number in checked if number.major == 5)
    assert str(latest) in bound and f"{latest.major}.{latest.minor + 1}.0" not in bound


def requirements() -> list[str]:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    return re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*?)\]", text, re.S | re.M).group(1))

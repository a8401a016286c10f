"""Options: each field of the two dataclasses appears wherever its uses say, with its default and its check."""

import argparse
import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, LlamaForCausalLM

import hf_multipole
from hf_multipole import MultipoleConfig, convert, multipole_attention, tensor_attention
from hf_multipole.modeling import options
from hf_multipole.modeling.configuration_multipole import multipole_options, tensor_options
from hf_multipole.modeling.options import MultipoleOptions, TensorOptions, default_of, fields_of

# A value of each field that differs from its defaults, and one that cannot be used.
VALUES = {
    "block_size": (8, 0),
    "rank": (2, -1),
    "summary": ("direct", "median"),
    "size_weighting": (False, 1),
    "far_bias_init": (-3.5, float("nan")),
    "sink_tokens": (3, -1),
    "saliency": (True, 1),
    "rotate_summaries": (True, "no"),
    "downsample_queries": (True, None),
    "layers": ((1,), (-1,)),
    "tensor_order": (4, 1),
    "tensor_method": ("polynomial", "fast"),
    "tensor_window": ((3, 5), (0, 5)),
    "tensor_degree": (4, 25),
    "tensor_entry_bound": (1.5, 0.0),
    "tensor_score_dim": (5, 0),
}
# What a value needs beside it.
BESIDE = {"tensor_degree": {"tensor_method": "polynomial"}}
FIELDS = {cls.prefix + f.name: (cls, f) for cls in options.CLASSES for f in dataclasses.fields(cls)}
LLAMA = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)


def with_beside(name):
    """A field's value, and what it needs beside it, as JSON has them."""
    values = {name: VALUES[name][0]} | BESIDE.get(name, {})
    return {key: list(x) if isinstance(x, tuple) else x for key, x in values.items()}


def read(name, config):
    """A field's value as the modules get it from a configuration, as JSON has it."""
    cls, field = FIELDS[name]
    found = getattr(multipole_options(config) if cls is MultipoleOptions else tensor_options(config, 8), field.name)
    return list(found) if isinstance(found, tuple) else found


def test_every_field_is_tried():
    assert set(VALUES) == set(FIELDS)


@pytest.mark.parametrize("name", VALUES)
def test_a_field(name):
    cls, field = FIELDS[name]
    value, wrong = VALUES[name]
    beside = BESIDE.get(name, {})
    assert {default_of(field, use) for use in field.metadata["uses"]} != {value}
    assert getattr(cls.of({name: value} | beside), field.name) == value
    with pytest.raises(ValueError, match=name):
        cls.of({name: wrong} | beside)
    with pytest.raises(ValueError, match=field.name):
        cls(**{field.name: wrong} | {other.removeprefix(cls.prefix): x for other, x in beside.items()})
    assert field.metadata["help"] and set(field.metadata["uses"]) <= set(options.USES)


@pytest.mark.parametrize("name", fields_of("own"))
def test_the_configuration_has_a_field(name, tmp_path):
    assert getattr(MultipoleConfig(head_dim=8), name) == read(name, MultipoleConfig(head_dim=8))
    MultipoleConfig(**with_beside(name)).save_pretrained(tmp_path)
    config = MultipoleConfig.from_pretrained(tmp_path)
    assert getattr(config, name) == read(name, config) == with_beside(name)[name]
    assert f"        {name}: {FIELDS[name][1].metadata['help'][:20]}" in MultipoleConfig.__doc__
    with pytest.raises((ValueError, StrictDataclassError), match=name):
        MultipoleConfig(**with_beside(name) | {name: VALUES[name][1]})


@pytest.mark.parametrize("name", fields_of("stock"))
def test_config_multipole_has_a_key(name):
    assert read(name, LlamaConfig(**LLAMA, multipole=with_beside(name))) == with_beside(name)[name]
    with pytest.raises(ValueError, match=name):
        read(name, LlamaConfig(**LLAMA, multipole=with_beside(name) | {name: VALUES[name][1]}))
    read_back = LlamaConfig(**json.loads(LlamaConfig(**LLAMA, multipole=with_beside(name)).to_json_string()))
    assert read(name, read_back) == with_beside(name)[name]


@pytest.mark.parametrize("name", fields_of("convert"))
def test_convert_has_an_argument(name):
    cls, field = FIELDS[name]
    kind = "tensor" if cls is TensorOptions else "multipole"
    argument = inspect.signature(convert).parameters[name]
    assert argument.kind is argument.KEYWORD_ONLY and argument.default == field.metadata["defaults"].get("convert")
    assert f"        {name}: {field.metadata['help'][:20]}" in convert.__doc__
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    with pytest.raises(ValueError, match=name):
        convert(model, kind, **with_beside(name) | {name: VALUES[name][1]})
    convert(model, kind, **with_beside(name))
    assert model.config.multipole[name] == read(name, model.config) == with_beside(name)[name]


@pytest.mark.parametrize("cls, operator", [(MultipoleOptions, multipole_attention), (TensorOptions, tensor_attention)])
def test_the_operators_have_their_fields(cls, operator):
    arguments = inspect.signature(operator).parameters
    x = torch.ones(1, 1, 16, 8)
    tokens = (x, x, x) if cls is MultipoleOptions else (x, [x, x], [x, x])
    for outside, field in fields_of("operator", cls).items():
        assert arguments[field.name].default == default_of(field, "operator"), outside
        assert f"        {field.name}: " in operator.__doc__, outside
        beside = {key.removeprefix(cls.prefix): value for key, value in BESIDE.get(outside, {}).items()}
        with pytest.raises(ValueError, match=field.name):
            operator(*tokens, **beside | {field.name: VALUES[outside][1]})
    # What one has the others do not: neither option is stated twice, nor are there options beside the classes'.
    known = {f.name for f in dataclasses.fields(cls)}
    assert {name for name in arguments if name in known} == {f.name for f in fields_of("operator", cls).values()}


NEW = """
    novelty: int = _option(3, "a number that nobody reads", lambda x: _is_integer(x, 0), "no negative number", ("own", "stock", "convert"))
"""
ASKED = """
import argparse, inspect
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, LlamaForCausalLM
from hf_multipole import MultipoleConfig, convert
from hf_multipole.modeling import options
from hf_multipole.modeling.configuration_multipole import multipole_options, tensor_options

parser = argparse.ArgumentParser()
options.add_arguments(parser)
for cls, prefix, kind in ((options.MultipoleOptions, "", "multipole"), (options.TensorOptions, "tensor_", "tensor")):
    name = prefix + "novelty"
    def read(config):
        return (multipole_options(config) if not prefix else tensor_options(config, 8)).novelty
    assert read(MultipoleConfig()) == getattr(MultipoleConfig(), name) == 3
    assert read(MultipoleConfig(**{name: 5})) == 5 and MultipoleConfig(**{name: 5}).to_dict()[name] == 5
    sizes = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**sizes, multipole={name: 7})
    assert read(config) == 7
    model = convert(LlamaForCausalLM(LlamaConfig(**sizes)), kind, **{name: 9})
    assert model.config.multipole[name] == read(model.config) == 9
    assert name in inspect.signature(convert).parameters and f"{name}: a number that nobody reads" in convert.__doc__
    assert getattr(parser.parse_args(["--" + name.replace("_", "-"), "4"]), name) == 4
    for wrong in (lambda: MultipoleConfig(**{name: -1}), lambda: convert(model, kind, **{name: -1})):
        try:
            wrong()
        except (ValueError, StrictDataclassError):
            continue
        raise AssertionError(name)
"""


@pytest.mark.slow
def test_a_new_option_appears_everywhere(tmp_path):
    package = Path(hf_multipole.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / package.name / "modeling" / "options.py"
    text = path.read_text()
    for cls in options.CLASSES:
        prefix = f'    prefix: ClassVar[str] = "{cls.prefix}"\n'
        assert text.count(prefix) == 1
        text = text.replace(prefix, prefix + NEW)
    path.write_text(text)
    subprocess.run([sys.executable, "-c", ASKED], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})


def test_command_line():
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    assert set(vars(parser.parse_args([]))) == set(fields_of("convert")) and not any(vars(parser.parse_args([])).values())
    for name, field in fields_of("convert").items():
        value = VALUES[name][0]
        flag = "--" + name.replace("_", "-")
        words = {False: ["--no-" + flag[2:]], True: [flag]}[value] if isinstance(value, bool) else [flag]
        words += [] if isinstance(value, bool) else [str(x) for x in value] if isinstance(value, tuple) else [str(value)]
        found = getattr(parser.parse_args(words), name)
        assert found == (list(value) if isinstance(value, tuple) else value), name
        assert " ".join(field.metadata["help"].split()[:3]) in " ".join(parser.format_help().split())
    assert parser.parse_args(["--tensor-window", "all", "8"]).tensor_window == [None, 8]


def test_options_are_values():
    assert MultipoleOptions(layers=[0, 2]) == MultipoleOptions(layers=(0, 2)) and len({MultipoleOptions(), MultipoleOptions()}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        MultipoleOptions().rank = 2
    assert MultipoleOptions(layers=[0, 2]).outside("stock")["layers"] == [0, 2]
    with pytest.raises(ValueError, match="rank 3 does not divide block_size 64"):
        MultipoleOptions(rank=3)
    assert TensorOptions(method="polynomial").completed(32) == TensorOptions(method="polynomial", entry_bound=0.7, score_dim=8)
    assert TensorOptions().completed(32) == TensorOptions(score_dim=32)
    for given, message in (
        ({"tensor_window": [3]}, "tensor_window is .3., but must have one width, or None, for each of the 2 keys"),
        ({"tensor_degree": 3}, "tensor_degree belongs to method='polynomial'"),
        ({"tensor_method": "polynomial", "tensor_window": [3, 3]}, "tensor_window belongs to method='exact'"),
    ):
        with pytest.raises(ValueError, match=message):
            TensorOptions.of(given)


def test_they_need_no_torch():
    code = f"import runpy, sys; sys.modules['torch'] = sys.modules['transformers'] = None; runpy.run_path({options.__file__!r})"
    subprocess.run([sys.executable, "-c", code], check=True)

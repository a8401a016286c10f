"""Options: each field of the two dataclasses appears wherever its uses say, with its default and its check."""

import argparse
import dataclasses
import inspect
import subprocess
import sys

import pytest

from hf_multipole import multipole_attention, tensor_attention
from hf_multipole.modeling import options
from hf_multipole.modeling.options import MultipoleOptions, TensorOptions, default_of, fields_of

# A value of each field that differs from its defaults, and one that cannot be used.
VALUES = {
    "block_size": (8, 0),
    "rank": (2, -1),
    "summary": ("direct", "median"),
    "size_weighting": (False, 1),
    "far_bias_init": (-3.5, float("nan")),
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


def test_every_field_is_tried():
    assert set(VALUES) == set(FIELDS)


@pytest.mark.parametrize("name", VALUES)
def test_a_field(name):
    cls, field = FIELDS[name]
    value, wrong = VALUES[name]
    beside = BESIDE.get(name, {})
    assert {default_of(field, use) for use in field.metadata["uses"]}.isdisjoint({value})
    assert getattr(cls.of({name: value} | beside), field.name) == value
    with pytest.raises(ValueError, match=name):
        cls.of({name: wrong} | beside)
    with pytest.raises(ValueError, match=field.name):
        cls(**{field.name: wrong} | {other.removeprefix(cls.prefix): x for other, x in beside.items()})
    assert field.metadata["help"] and set(field.metadata["uses"]) <= set(options.USES)


def test_the_operators_have_their_fields():
    for cls, operator in ((MultipoleOptions, multipole_attention), (TensorOptions, tensor_attention)):
        arguments = inspect.signature(operator).parameters
        for name, field in fields_of("operator", cls).items():
            assert arguments[name.removeprefix(cls.prefix)].default == default_of(field, "operator"), name


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

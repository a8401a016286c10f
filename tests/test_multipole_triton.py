"""The GPU kernels: on a GPU where there is one, else under Triton's interpreter; and compiled for GPUs that need not be there."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from properties import (
    Case,
    assert_within,
    documents_do_not_meet,
    exact_when_keys_are_constant,
    exact_when_short,
    future_does_not_matter,
    make,
    matches_reference,
    padding_does_not_matter,
    sees_exactly_what_is_visible,
    weights_sum_to_one,
)

import hf_multipole
from hf_multipole.modeling.hierarchy import level_count

triton = pytest.importorskip("triton")

from hf_multipole.modeling import multipole_triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
# The interpreter computes what is not finite as the kernels do, and says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

multipole_attention = partial(hf_multipole.multipole_attention, backend="triton")

# One of everything, as small as three levels allow.
FULL = Case(n=19, batch=1, kv_heads=1, repeats=2, block_size=2, rank=1, bias_levels=2, softcap=2.0, far_keys=True, summary="hierarchical")
FULL = replace(FULL, dtype=torch.float32)
PACKED = {"cuts": (3, 14), "padding": ((2, 1),)}

CASES = {
    "causal": FULL,
    "bidirectional": replace(FULL, causal=False),
    "padded": replace(FULL, padding=((3, 2),)),
    "padded, bidirectional": replace(FULL, causal=False, padding=((3, 2),)),
    "packed": replace(FULL, **PACKED),
    "packed, bidirectional": replace(FULL, causal=False, **PACKED),
    "two rows, two key heads, heads between tokens": replace(FULL, n=11, batch=2, kv_heads=2, layout="fused"),
    "rows of different padding": replace(FULL, n=11, batch=2, causal=False, padding=((3, 1), (0, 4)), layout="strided"),
    "the last queries": replace(FULL, queries=3),
    "one query": replace(FULL, queries=1, bias_levels=0),
    "no far field": replace(FULL, n=3),
    "one token": replace(FULL, n=1),
    "no size weighting, no cap": replace(FULL, size_weighting=False, softcap=None, bias_levels=0, far_keys=False, summary="mean"),
    "direct, ragged": replace(FULL, n=21, block_size=4, rank=2, causal=False, summary="direct", size_weighting=False),
    "whole tiles": replace(FULL, n=70, block_size=16, rank=4, dim=16, value_dim=32, repeats=1),
    "several tiles a block": replace(FULL, n=300, block_size=70, rank=35, repeats=1, causal=False, softcap=None),
}  # fmt: skip
LOW = {
    "bfloat16": replace(FULL, dtype=torch.bfloat16),
    "bfloat16, bidirectional": replace(FULL, dtype=torch.bfloat16, causal=False, **PACKED),
    "bfloat16, whole tiles": replace(CASES["whole tiles"], dtype=torch.bfloat16, softcap=None),
    "float16": replace(FULL, dtype=torch.float16),
    "float16, bidirectional": replace(FULL, dtype=torch.float16, causal=False),
}


# Properties


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients_equal_the_reference(case):
    assert case.n == 300 or level_count(case.n, case.block_size) <= 3
    matches_reference(multipole_attention, case, DEVICE)


@pytest.mark.parametrize("case", LOW.values(), ids=LOW)
def test_low_precision_is_within_twice_the_error_of_a_reference_that_rounds_its_products(case):
    matches_reference(multipole_attention, case, DEVICE, rounded_products=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_sum_to_one(dtype):
    weights_sum_to_one(multipole_attention, replace(FULL, dtype=dtype, padding=((3, 2),)), DEVICE)


@pytest.mark.parametrize("causal", [True, False])
def test_sees_exactly_what_is_visible(causal):
    sees_exactly_what_is_visible(multipole_attention, replace(FULL, n=9, repeats=1, causal=causal), DEVICE)


def test_the_future_does_not_matter():
    future_does_not_matter(multipole_attention, replace(FULL, n=11, repeats=1), DEVICE)


def test_exact_when_the_near_field_covers_the_row():
    exact_when_short(multipole_attention, FULL, DEVICE)


def test_exact_when_keys_are_constant():
    exact_when_keys_are_constant(multipole_attention, replace(FULL, causal=False), DEVICE)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_matter(causal):
    padding_does_not_matter(multipole_attention, replace(FULL, n=9, repeats=1, causal=causal), DEVICE)


def test_documents_do_not_meet():
    documents_do_not_meet(multipole_attention, replace(FULL, n=17, causal=False, cuts=(3, 12)), DEVICE)

"""torch.onnx, which needs the package onnxscript: multipole attention is refused by name, exact attention is exported."""

import pytest
import torch

from tests.helpers.tiny_models import build, pad, tokens

pytest.importorskip("onnxscript")


def test_the_exporter_of_onnx(tmp_path):
    ids, mask = pad(tokens(), left=3)
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    model = build(dtype=torch.float32)
    with pytest.raises(Exception) as caught:
        torch.onnx.export(model, (), kwargs=given, dynamo=True, verbose=False)
    causes = [caught.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert any("no operators in ONNX" in str(cause) for cause in causes)
    model.set_attn_implementation("sdpa")
    torch.onnx.export(model, (), kwargs=given, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 1000

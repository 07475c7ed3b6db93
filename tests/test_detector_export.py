"""Exported detectors compute what the trained ones do: a `torch.export` file and an ONNX one, for any batch size."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_training import SMALL
from torch import nn

from route_detr.cli import main
from route_detr.config import preset
from route_detr.errors import UsageError
from route_detr.files import kind_of
from route_detr.model.detector import Detector
from route_detr.predict import Trained
from route_detr.tools.export import Inference, export

SIZE = (64, 48)
VARIANTS = ("dab", "dino")


def trained(base="tiny", **changes):
    torch.manual_seed(0)
    small = {key: value for key, value in SMALL.items() if key.startswith("detector.")}
    config = preset(base).updated({**small, **changes})
    detector = Detector(config.detector).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return Trained(detector, config, list(range(10)), list("0123456789"), {}, torch.device("cpu"))


def expected(model, images):
    with torch.no_grad():
        return Inference(model.detector)(images)


@pytest.mark.filterwarnings("ignore")
def test_a_torch_export_file_holds_pytorchs_operators_alone_and_takes_any_batch(tmp_path):
    model = trained()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        said = export(model, tmp_path / "new" / "detector.pt2", SIZE)
    assert told == []
    assert "images [B, 3, 64, 48]" in said
    assert kind_of(tmp_path / "new" / "detector.pt2") == "model"
    program = torch.export.load(tmp_path / "new" / "detector.pt2")
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {getattr(target, "namespace", "aten") for target in targets} <= {"aten", "_operator"}
    assert any("grid_sample" in str(target) for target in targets)
    images = torch.randn(3, 3, *SIZE)
    for found, known in zip(program.module()(images), expected(model, images), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", ["tiny", "tiny-dab", "tiny-dino"])
def test_an_onnx_file_samples_by_grid_and_agrees_in_onnxruntime(base, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = trained(base)
    export(model, tmp_path / "detector.onnx", SIZE)
    assert kind_of(tmp_path / "detector.onnx") == "model"
    graph = onnx.load(tmp_path / "detector.onnx")
    assert {node.domain for node in graph.graph.node} == {""}
    assert "GridSample" in {node.op_type for node in graph.graph.node}
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [20]
    session = runtime.InferenceSession(tmp_path / "detector.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, *SIZE)
    found = session.run(["logits", "boxes"], {"images": images.numpy()})
    for one, other in zip(found, expected(model, images), strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["detector.onnx"]


class Nearly(nn.Module):
    """Says one thing while it is exported and another when it is asked."""

    def forward(self, images):
        wrong = 1.01 if torch.compiler.is_exporting() else 1.0
        return SimpleNamespace(logits=images.flatten(2) * wrong, boxes=images.flatten(2))


@pytest.mark.filterwarnings("ignore")
def test_what_was_exported_wrongly_is_not_written(tmp_path):
    model = replace(trained(), detector=Nearly())
    with pytest.raises(RuntimeError, match=r"detector.pt2: the exported detector differs .* by 1.0e-02"):
        export(model, tmp_path / "detector.pt2", SIZE)
    assert list(tmp_path.iterdir()) == []


class Exactly(nn.Module):
    def forward(self, images):
        return SimpleNamespace(logits=images.flatten(2), boxes=images.flatten(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masks", [True, False])
def test_masks_that_are_left_out_are_told(masks, tmp_path):
    config = preset("tiny").updated({"detector.masks": masks})
    model = replace(trained(), config=config, detector=Exactly())
    assert export(model, tmp_path / "detector.pt2", SIZE).endswith("without the masks of this detector") == masks


def test_another_kind_of_file_is_an_error(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"--out: expected a name that ends in .onnx or .pt2, got .*detector.txt"):
        export(trained(), tmp_path / "detector.txt")
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "detector.onnx")]) == 2
    assert "no such run folder" in capsys.readouterr().err

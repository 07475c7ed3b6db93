"""A trained detector as a `torch.export` program or an ONNX model, checked against itself."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import route_kernels as rk
from route_detr.errors import UsageError
from route_detr.files import SOFTWARE, check_replaceable, with_folder, write_atomically
from route_detr.predict import Trained

OPSET = 20  # GridSample of any batch, LayerNormalization, Gelu
TOLERANCE = 1e-3  # of logits and boxes, relative to the largest: float32 through a whole detector


class Inference(nn.Module):
    """Images [B, 3, H, W] of one size, normalised -> logits [B, N, K] and boxes [B, N, 4] (cx, cy, w, h) in [0, 1]."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.detector(images)
        return output.logits, output.boxes


def export(trained: Trained, path: Path, size: Sequence[int] | None = None) -> str:
    """Write ``path`` (NAME.onnx or NAME.pt2) for any number of images of ``size`` (height, width); says what it wrote.

    Raises:
        UsageError: another kind of file is asked for, another program wrote what is there, or what computes ONNX models
            is not installed.
        FloatingPointError: what the trained detector computes is NaN or infinite.
        RuntimeError: what was exported computes something else; nothing is written.
    """
    if path.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"--out: expected a name that ends in .onnx or .pt2, got {path}")
    check_replaceable("model", path)
    height, width = size or (trained.config.transforms.eval_scale,) * 2
    if min(height, width) < 1:
        raise UsageError(f"--size: expected a height and a width of at least 1, got {height} {width}")
    missing = [name for name in ("onnxruntime", "onnxscript") if path.suffix == ".onnx" and find_spec(name) is None]
    if missing:
        raise UsageError(f"--out {path.name}: {missing[0]} is not installed (pip install onnx onnxscript onnxruntime)")
    model, images = Inference(trained.detector), torch.randn(2, 3, height, width)
    with torch.no_grad():
        expected = model(images[:1])
    if not all(output.isfinite().all() for output in expected):
        raise FloatingPointError(f"{path}: not written, what the trained detector computes is not finite")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PyTorch's remarks on its own exporters
        with rk.backend("eager"):  # sampling is grid_sample, an operator that ONNX has
            batches = ({0: torch.export.Dim.DYNAMIC},)
            program = torch.export.export(model, (images,), dynamic_shapes=batches, strict=False)
        written = Path(folder) / path.name
        found = (_onnx_outputs if path.suffix == ".onnx" else _program_outputs)(program, written, images[:1])
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
        if not worst <= TOLERANCE:
            raise RuntimeError(f"{path}: the exported detector differs from the trained one by {worst:.1e}")
        write_atomically(with_folder(path), lambda stream: stream.write(written.read_bytes()))
    left_out = "; without the masks of this detector" if trained.config.detector.masks else ""
    differs = f"differs from eager PyTorch by {worst:.1e} at most"
    return f"written to {path}: images [B, 3, {height}, {width}], {differs}{left_out}"


def _program_outputs(program: torch.export.ExportedProgram, path: Path, images: Tensor) -> Sequence[Tensor]:
    torch.export.save(program, path, extra_files={SOFTWARE: ""})
    return torch.export.load(path).module()(images)


def _onnx_outputs(program: torch.export.ExportedProgram, path: Path, images: Tensor) -> Sequence[Tensor]:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits", "boxes"],
        verbose=False,
    )
    exported.model.producer_name = SOFTWARE
    exported.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]

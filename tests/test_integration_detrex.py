"""detrex on our ops: a stub with detrex's files, call paths and `_C`, which itself is not to be installed."""

import sys
from importlib import import_module
from pathlib import Path

import foreign_mmcv
import pytest
import torch
from foreign_packages import check_no_kernel_no_change, check_one_model_alone, check_refusals, check_twice_and_back
from integration_checks import check_integration

from route_kernels.integrations import detrex as integration
from route_kernels.testing import counted_calls

MODULE = "detrex.layers.multi_scale_deform_attn"
SHAPES = ((5, 7), (3, 4))
POSITIONS = sum(height * width for height, width in SHAPES)

LAYERS = "from .multi_scale_deform_attn import MultiScaleDeformableAttention, multi_scale_deformable_attn_pytorch"
WITHOUT_EXTENSION = """
try:
    from detrex import _C as compiled
except ImportError:
    class MultiScaleDeformableAttention:
        def __init__(self, *arguments, **options):
            raise ImportError("detrex is not compiled successfully")
"""
COMPILED = "from foreign_mmcv import C; functions = C()" + "".join(
    f"; {name} = functions.{name}" for name in ("ms_deform_attn_forward", "ms_deform_attn_backward")
)


@pytest.fixture
def detrex(tmp_path, monkeypatch):
    """A folder with detrex in it, not compiled, first on the path and not imported."""
    files = {
        "detrex/__init__.py": "from detrex import layers",
        "detrex/layers/__init__.py": LAYERS,
        "detrex/layers/multi_scale_deform_attn.py": Path(foreign_mmcv.__file__).read_text() + WITHOUT_EXTENSION,
    }
    (tmp_path / "detrex" / "layers").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "detrex"
    monkeypatch.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] == "detrex"]:
        del sys.modules[name]


@pytest.fixture
def bindings(detrex):
    """The file that is patched, of a compiled detrex."""
    (detrex / "_C.py").write_text(COMPILED)
    return import_module(MODULE)


@pytest.fixture
def inputs():
    """The inputs that detrex's decoder layers pass: batch second, boxes for reference points."""
    sizes = {"query": 6, "value": POSITIONS, "query_pos": 6}
    sequences = {name: torch.randn(size, 2, 16, dtype=torch.float64).requires_grad_() for name, size in sizes.items()}
    return {
        **sequences,
        "key_padding_mask": torch.arange(POSITIONS).expand(2, -1) % 5 == 0,
        "reference_points": torch.rand(2, 6, 2, 4, dtype=torch.float64).requires_grad_(),
        "spatial_shapes": torch.tensor(SHAPES),
        "level_start_index": torch.tensor([0, 35]),
    }


def build(bindings):
    return bindings.MultiScaleDeformableAttention(16, 2, 2, 3).double()


def apply():
    return integration.apply(verbose=False)


def test_module(bindings, inputs):
    check_integration(build(bindings), inputs, apply, {"ms_deform_attn_fused": 1})


@pytest.mark.parametrize("compiled_for", ["cuda", "cpu"])
def test_a_forward_of_ones_own_reaches_the_plain_op(bindings, inputs, compiled_for):
    """Through the PyTorch form, or through the function over `_C`."""
    bindings.COMPILED_FOR = compiled_for

    class Local(bindings.MultiScaleDeformableAttention):
        forward = bindings.MultiScaleDeformableAttention.forward

    check_integration(Local(16, 2, 2, 3).double(), inputs, apply, {"ms_deform_attn": 1})
    assert bindings.compiled.functions.calls == (2 if compiled_for == "cpu" else 0)  # before apply() and after revert()


def test_one_model_alone(bindings, inputs):
    check_one_model_alone(integration, lambda: build(bindings), inputs)


def test_no_kernel_no_change(bindings, inputs, monkeypatch):
    check_no_kernel_no_change(apply, build(bindings), inputs, monkeypatch)


def test_twice_and_back(bindings, capsys):
    owners = [
        (bindings.MultiScaleDeformableAttention, "forward"),
        (bindings.MultiScaleDeformableAttnFunction, "apply"),
        (bindings, "multi_scale_deformable_attn_pytorch"),
        (sys.modules["detrex.layers"], "multi_scale_deformable_attn_pytorch"),
    ]
    check_twice_and_back(integration, owners, capsys)


def test_refusals(bindings, monkeypatch):
    check_refusals(integration, MODULE, monkeypatch)


def test_runs_without_having_been_compiled(detrex, inputs):
    """The function over `_C`, which a CUDA tensor would take, finds our two functions there."""
    with integration.apply(verbose=False) as report:
        assert report.replaced[0].name == "import detrex._C"
        bindings = import_module(MODULE)
        bindings.COMPILED_FOR = "cpu"
        module = build(bindings)
        with counted_calls() as counts:
            fused = module.eval()(**inputs)
        assert counts == {"ms_deform_attn_fused": 1}
    assert "detrex._C" not in sys.modules
    with counted_calls() as counts:
        torch.testing.assert_close(module(**inputs), fused)
    assert counts == {"ms_deform_attn": 1}


def test_imported_too_early(detrex):
    layers = import_module("detrex.layers")
    with pytest.raises(ImportError, match="not compiled"):
        layers.MultiScaleDeformableAttention(16, 2, 2, 3)
    with pytest.raises(ImportError, match=r"imported without its extension detrex\._C.*before the first import"):
        apply()


def test_a_compiled_extension_stays(bindings):
    with apply() as report:
        assert not any(entry.name == "import detrex._C" for entry in report.replaced)

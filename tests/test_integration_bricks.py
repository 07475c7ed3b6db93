"""Relation-, Salience- and Dual-R-DETR: what their `models.bricks` binds, and its modules in the fused form."""

import sys

import pytest
import torch
from integration_checks import check_integration

from benchmarks.research_modules import BRICKS, MultiScaleDeformableAttention, bricks_module, compiled_extension
from route_kernels.integrations import bricks
from route_kernels.testing import counted_calls

SHAPES = torch.tensor([[6, 4], [3, 2]])
STARTS = torch.tensor([0, 24])
POSITIONS = 30
CHANNELS, HEADS = 8, 2


@pytest.fixture
def bindings(monkeypatch):
    """Their module, imported without a GPU."""
    for name, module in bricks_module().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield sys.modules[BRICKS]
    bricks.revert()


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.points = MultiScaleDeformableAttention(CHANNELS, 2, HEADS, 3)
        self.boxes = MultiScaleDeformableAttention(CHANNELS, 2, HEADS, 3)

    def forward(self, query, memory, points, boxes, padding_mask):
        shared = {"value": memory, "spatial_shapes": SHAPES, "level_start_index": STARTS}
        query = query + self.points(query=query, reference_points=points, key_padding_mask=padding_mask, **shared)
        return query + self.boxes(query=query, reference_points=boxes, key_padding_mask=None, **shared)


@pytest.fixture
def model():
    model = Model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(dtype=torch.float64):
    random = {
        "query": torch.randn(2, 5, CHANNELS),
        "memory": torch.randn(2, POSITIONS, CHANNELS),
        "points": torch.rand(2, 5, 2, 2),
        "boxes": torch.rand(2, 5, 2, 4),
    }
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in random.items()}
    return leaves | {"padding_mask": torch.rand(2, POSITIONS) < 0.2}


def test_the_pytorch_form_of_every_model(bindings, model):
    report = check_integration(model, inputs(), lambda: bricks.apply(verbose=False), {"ms_deform_attn": 2})
    assert [(entry.name, entry.op) for entry in report.replaced] == [
        (f"{BRICKS}.multi_scale_deformable_attn_pytorch", "ms_deform_attn")
    ]


def test_the_compiled_functions_of_every_model(bindings, model):
    bindings._C = compiled_extension()
    report = check_integration(model, inputs(), lambda: bricks.apply(verbose=False), {"ms_deform_attn": 2})
    assert {entry.name for entry in report.replaced} >= {
        f"{BRICKS}._C.ms_deform_attn_forward", f"{BRICKS}._C.ms_deform_attn_backward",
    }  # fmt: skip


def test_a_model_in_the_fused_form(bindings, model):
    report = check_integration(model, inputs(), lambda: bricks.apply(model, verbose=False), {"ms_deform_attn_fused": 2})
    assert {entry.name for entry in report.replaced if entry.op == "ms_deform_attn_fused"} == {"points", "boxes"}


def test_a_fused_model_in_bfloat16(bindings, model):
    model = model.bfloat16()
    bricks.apply(model, verbose=False)
    with counted_calls() as counts:
        output = model(**inputs(torch.bfloat16))
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert counts == {"ms_deform_attn_fused": 2}


def test_names_bound_by_value_follow_and_revert_restores_all(bindings, model, monkeypatch):
    importer = type(sys)("importer")
    importer.multi_scale_deformable_attn_pytorch = original = bindings.multi_scale_deformable_attn_pytorch
    monkeypatch.setitem(sys.modules, "importer", importer)
    bindings._C = extension = compiled_extension()
    functions = dict(vars(extension))
    with bricks.apply(model, verbose=False):
        assert importer.multi_scale_deformable_attn_pytorch is bindings.multi_scale_deformable_attn_pytorch
        assert importer.multi_scale_deformable_attn_pytorch is not original
        assert dict(vars(extension)) != functions
    assert importer.multi_scale_deformable_attn_pytorch is bindings.multi_scale_deformable_attn_pytorch is original
    assert bindings._C is extension and dict(vars(extension)) == functions
    assert "forward" not in vars(model.points)


def test_where_no_kernel_runs_theirs_does(bindings, model, monkeypatch):
    expected = model(**(arguments := inputs()))
    bricks.apply(model, verbose=False)
    monkeypatch.setattr("route_kernels.native.load_error", "not built")
    with counted_calls() as counts:
        assert torch.equal(model(**arguments), expected)
    assert not counts


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_keeps_the_shapes_that_theirs_reads(bindings, model):
    """Their PyTorch form traces the sizes of the levels as tensors; ours would write them in as numbers."""
    bricks.apply(model, verbose=False)
    with counted_calls() as counts:
        torch.jit.trace(model, tuple(inputs().values()), check_trace=False)
    assert not counts


def test_applied_twice(bindings, capsys):
    model = Model()
    first = bricks.apply(model)
    assert capsys.readouterr().out == f"{first}\n"
    second = bricks.apply(model, verbose=False)
    assert second.replaced == []
    assert {entry.reason for entry in second.left} == {"already replaced by an earlier apply()"}


def test_without_their_repository():
    assert BRICKS not in sys.modules
    with pytest.raises(ImportError, match=r"models\.bricks\.ms_deform_attn cannot be imported .* is on sys\.path"):
        bricks.apply(verbose=False)


def test_in_another_repository(bindings, monkeypatch):
    monkeypatch.delattr(bindings, "multi_scale_deformable_attn_pytorch")
    with pytest.raises(ImportError, match=r"has no multi_scale_deformable_attn_pytorch: .* of another repository"):
        bricks.apply(verbose=False)

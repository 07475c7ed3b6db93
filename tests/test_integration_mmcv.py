"""mmcv on our ops: the module, and both functions it (and others) may call; on a stub, and on mmcv where installed."""

import sys
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import foreign_mmcv
import pytest
import torch
from foreign_packages import (
    check_low_precision,
    check_no_kernel_no_change,
    check_one_model_alone,
    check_refusals,
    check_twice_and_back,
)
from integration_checks import assert_agree, check_integration

from route_kernels.integrations import mmcv as integration
from route_kernels.testing import counted_calls, perturb_sampling, training_step

MODULE = "mmcv.ops.multi_scale_deform_attn"
SHAPES = ((5, 7), (3, 4))
POSITIONS = sum(height * width for height, width in SHAPES)


@pytest.fixture(params=["stub", "installed"])
def bindings(request, monkeypatch):
    """The file that is patched: of a stub over a stubbed `_ext`, or of mmcv."""
    if request.param == "stub":
        return foreign_mmcv.stub_package(MODULE, foreign_mmcv.Ext(), monkeypatch)
    pytest.importorskip("mmcv", reason="mmcv is not installed: pip install onedl-mmcv")
    if find_spec("mmcv._ext") is None:
        monkeypatch.setitem(sys.modules, "mmcv._ext", integration.StandIn())
    installed = import_module(MODULE)
    monkeypatch.setattr(installed, "ext_module", foreign_mmcv.Ext())
    return installed


LOADED = """

import importlib
compiled = importlib.import_module("mmcv._ext")
assert hasattr(compiled, "nms"), "nms miss in module _ext"
compiled.returns_gradients = False
"""


@pytest.fixture
def uncompiled(tmp_path, monkeypatch):
    """A folder with mmcv in it, without `_ext`, first on the path and not imported."""
    (tmp_path / "mmcv" / "ops").mkdir(parents=True)
    for name, content in {"__init__.py": "", "ops/__init__.py": "from . import multi_scale_deform_attn"}.items():
        (tmp_path / "mmcv" / name).write_text(content)
    attention = Path(foreign_mmcv.__file__).read_text() + LOADED
    (tmp_path / "mmcv" / "ops" / "multi_scale_deform_attn.py").write_text(attention)
    imported = {name for name in sys.modules if name.partition(".")[0] == "mmcv"}
    for name in imported:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "mmcv"
    integration.revert()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmcv"]:
        del sys.modules[name]


def test_runs_without_having_been_compiled(uncompiled):
    with pytest.raises(ModuleNotFoundError, match="_ext"):
        import_module("mmcv.ops")
    with integration.apply(verbose=False) as report, counted_calls() as counts:
        provided, *replaced = [entry.name for entry in report.replaced]
        assert provided == "import mmcv._ext" and f"{MODULE}.MultiScaleDeformableAttention" in replaced
        module, arguments = build(import_module(MODULE), dropout=0.0), inputs()
        found = training_step(module, arguments)
    assert counts == {"ms_deform_attn_fused": 1} and "mmcv._ext" not in sys.modules
    assert_agree(found, training_step(module, arguments))


def test_the_function_over_a_stand_in_is_ours(uncompiled):
    """Forward and backward, as a CUDA tensor would call them; nothing else is replaced, or touched afterwards."""
    with integration.provide_extension(verbose=False) as provided:
        assert [entry.name for entry in provided.replaced] == ["import mmcv._ext"]
        bindings = import_module(MODULE)
    assert "mmcv._ext" not in sys.modules and isinstance(bindings.compiled, integration.StandIn)
    bindings.COMPILED_FOR = "cpu"
    module, arguments = build(bindings, dropout=0.0), inputs()
    with counted_calls() as counts:
        found = training_step(module, arguments)
    assert counts == {"ms_deform_attn": 1}
    bindings.COMPILED_FOR = "cuda"
    assert_agree(found, training_step(module, arguments))


def test_what_a_stand_in_lacks_is_named_when_it_is_called(uncompiled):
    integration.provide_extension(verbose=False)
    extension = import_module("mmcv._ext")
    suppress = extension.nms  # which mmcv takes when it is imported
    with pytest.raises(NotImplementedError, match=r"^mmcv\._ext\.nms: mmcv is installed without its compiled ops"):
        suppress(torch.zeros(1, 4), torch.zeros(1), iou_threshold=0.5, offset=0)
    assert not hasattr(extension, "__path__") and find_spec("mmcv._ext").loader is None


def test_what_is_compiled_or_imported_stays(uncompiled, monkeypatch):
    (uncompiled / "_ext.py").write_text("from foreign_mmcv import Ext; ext = Ext(); nms = None")
    assert not integration.provide_extension(verbose=False).replaced
    (uncompiled / "_ext.py").unlink()
    monkeypatch.setitem(sys.modules, "mmcv._ext", theirs := ModuleType("mmcv._ext"))
    assert not integration.provide_extension(verbose=False).replaced and sys.modules["mmcv._ext"] is theirs
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    (uncompiled / "__init__.py").unlink()
    monkeypatch.setattr(sys, "path", [])
    assert not integration.provide_extension(verbose=False).replaced, "mmcv is not installed"


def build(bindings, dtype=torch.float64, **options):
    options = {"embed_dims": 16, "num_heads": 2, "num_levels": 2, "num_points": 3, "dropout": 0.2, **options}
    module = bindings.MultiScaleDeformableAttention(**options).to(dtype)
    perturb_sampling(module)
    return module


def inputs(queries=6, *, batch_first=False, reference=2, dtype=torch.float64, batch=2):
    def sequence(length):
        size = (batch, length, 16) if batch_first else (length, batch, 16)
        return torch.randn(size, dtype=dtype).requires_grad_()

    return {
        "query": sequence(queries),
        "value": sequence(POSITIONS),
        "identity": sequence(queries),
        "query_pos": sequence(queries),
        "key_padding_mask": torch.arange(POSITIONS).expand(batch, -1) % 5 == 0,
        "reference_points": torch.rand(batch, queries, 2, reference, dtype=dtype).requires_grad_(),
        "spatial_shapes": torch.tensor(SHAPES),
        "level_start_index": torch.tensor([0, SHAPES[0][0] * SHAPES[0][1]]),
    }


def apply():
    return integration.apply(verbose=False)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bindings", ["installed"], indirect=True)
def test_losses_of_dino_of_mmdet(bindings, double):
    """Two images, one of them padded; denoising queries; two layers each."""
    mmdet = pytest.importorskip("mmdet", reason="mmdet is not installed: pip install onedl-mmdetection")
    pytest.importorskip("mmdet.models")
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmengine.structures import InstanceData

    init_default_scope("mmdet")
    configs = Path(mmdet.__file__).parent / ".mim" / "configs"
    config = Config.fromfile(configs / "dino" / "dino-4scale_r50_8xb2-12e_coco.py")
    layers = {"num_layers": 2, "layer_cfg": {"ffn_cfg": {"feedforward_channels": 32}}}
    changes = {
        "backbone": {"depth": 18, "init_cfg": None, "frozen_stages": -1},
        "neck": {"in_channels": [128, 256, 512]},
        "encoder": layers,
        "decoder": layers,
        "bbox_head": {"num_classes": 5},
        "num_queries": 10,
    }
    config.merge_from_dict({"model": changes})
    model = MODELS.build(config.model).double()
    torch.nn.init.normal_(model.level_embed)  # which its constructor leaves as the memory was
    samples = []
    for height in (64, 48):
        metainfo = {"img_shape": (height, 64), "batch_input_shape": (64, 64)}
        boxes = torch.tensor([[4.0, 5.0, 30.0, 40.0], [20.0, 10.0, 60.0, 45.0]])
        sample = DetDataSample(metainfo=metainfo)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([1, 3]))
        samples.append(sample)

    def losses(images):
        return model.loss(images, samples)

    check_integration(losses, (torch.randn(2, 3, 64, 64),), apply, {"ms_deform_attn_fused": 4}, module=model)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("reference", [2, 4])
def test_module(bindings, batch_first, reference):
    module = build(bindings, batch_first=batch_first)
    arguments = inputs(batch_first=batch_first, reference=reference)
    check_integration(module, arguments, apply, {"ms_deform_attn_fused": 1})


def test_module_attends_to_its_own_queries(bindings):
    arguments = inputs(POSITIONS)
    for optional in ("value", "identity", "query_pos", "key_padding_mask"):
        del arguments[optional]
    check_integration(build(bindings), arguments, apply, {"ms_deform_attn_fused": 1})


def test_deprecated_residual_is_the_identity(bindings):
    arguments = inputs()
    arguments["residual"] = arguments.pop("identity")
    check_integration(build(bindings), arguments, apply, {"ms_deform_attn_fused": 1})


@pytest.mark.parametrize("compiled_for", ["cuda", "cpu"])
def test_a_forward_of_ones_own_reaches_the_plain_op(monkeypatch, compiled_for):
    stub = foreign_mmcv.stub_package(MODULE, foreign_mmcv.Ext(), monkeypatch)
    stub.COMPILED_FOR = compiled_for

    class Local(stub.MultiScaleDeformableAttention):
        forward = stub.MultiScaleDeformableAttention.forward

    module = Local(16, 2, 2, 3).double()
    check_integration(module, inputs(), apply, {"ms_deform_attn": 1})
    assert stub.compiled.calls == (2 if compiled_for == "cpu" else 0)  # before apply() and after revert()


def test_functions(bindings):
    shapes, starts = torch.tensor(SHAPES), torch.tensor([0, 35])
    value = torch.randn(3, POSITIONS, 2, 8, dtype=torch.float64, requires_grad=True)
    layers = {"sampling_offsets": torch.nn.Linear(5, 2), "attention_weights": torch.nn.Linear(5, 1)}
    holder = torch.nn.ModuleDict(layers).double()
    features = torch.randn(3, 4, 2, 2, 3, 5, dtype=torch.float64)

    def sample(value):
        locations = 0.5 + 0.3 * holder["sampling_offsets"](features)
        weights = holder["attention_weights"](features).squeeze(-1)
        called = bindings.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
        plain = bindings.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
        return called, plain

    check_integration(sample, (value,), apply, {"ms_deform_attn": 2}, module=holder)


def test_im2col_step_is_ignored(bindings):
    value, locations = torch.randn(3, POSITIONS, 2, 8), torch.rand(3, 4, 2, 2, 3, 2)
    arguments = (value, torch.tensor(SHAPES), torch.tensor([0, 35]), locations, torch.rand(3, 4, 2, 2, 3), 2)
    with pytest.raises(AssertionError, match="im2col_step"):
        bindings.MultiScaleDeformableAttnFunction.apply(*arguments)
    with apply():
        found = bindings.MultiScaleDeformableAttnFunction.apply(*arguments)
    expected = foreign_mmcv.multi_scale_deformable_attn_pytorch(value, *(arguments[i] for i in (1, 3, 4)))
    torch.testing.assert_close(found, expected)


def test_low_precision(bindings):
    """Where mmcv's own functions want one dtype."""
    module, arguments = build(bindings, dropout=0.0), inputs(reference=4)
    check_low_precision(apply, module, arguments, "reference_points")
    if bindings.__file__ != foreign_mmcv.__file__:
        with pytest.raises(RuntimeError, match="expected scalar type BFloat16 but found Float"):
            check_low_precision(nullcontext, module, arguments, "reference_points")


def test_compiles_as_one_graph(bindings):
    module, arguments = build(bindings, dropout=0.0), inputs()
    names = ("query", "value", "reference_points")
    with integration.apply(module, verbose=False):
        expected = module(**arguments)
        found = torch.compile(module, backend="aot_eager", fullgraph=True)(**arguments)
    torch.testing.assert_close(found, expected)
    leaves = [arguments[name] for name in names if arguments[name].requires_grad]
    grads = [torch.autograd.grad(output.square().sum(), leaves) for output in (found, expected)]
    torch.testing.assert_close(*grads)


def test_one_model_alone(bindings):
    check_one_model_alone(
        integration, lambda: torch.nn.ModuleList([build(bindings)]).append(build(bindings))[0], inputs()
    )


@pytest.mark.parametrize("owner", ["module", "function"])
def test_casts_of_a_decorator_stay(monkeypatch, owner):
    """The case is the module's forward, or of the autograd function's in a module with a forward of its own."""
    stub = foreign_mmcv.stub_package(MODULE, foreign_mmcv.Ext(), monkeypatch)
    stub.COMPILED_FOR = "cpu"
    cast = torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    module, arguments = build(stub, torch.float32, dropout=0.0), inputs(dtype=torch.float32)
    if owner == "module":
        monkeypatch.setattr(stub.MultiScaleDeformableAttention, "forward", cast(module.__class__.forward))
        run, op = lambda: module(**arguments), "ms_deform_attn_fused"
    else:
        function = stub.MultiScaleDeformableAttnFunction
        monkeypatch.setattr(function, "forward", staticmethod(cast(function.forward)))
        value, locations = torch.randn(2, POSITIONS, 2, 8), torch.rand(2, 4, 2, 2, 3, 2)
        weights = torch.rand(2, 4, 2, 2, 3)
        run = lambda: function.apply(value, torch.tensor(SHAPES), torch.tensor([0, 35]), locations, weights, 64)  # noqa: E731
        op = "ms_deform_attn"
    with torch.autocast("cpu", torch.bfloat16):
        expected = run()
        with apply(), counted_calls() as counts:
            found = run()
    assert counts == {op: 1} and found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_a_forward_of_ones_own_is_left(bindings):
    class Local(bindings.MultiScaleDeformableAttention):
        def forward(self, query, **kwargs):
            return super().forward(query, **kwargs)

    local = Local(embed_dims=16, num_heads=2, num_levels=2, num_points=3)
    with integration.apply(torch.nn.ModuleList([local, build(bindings)]), verbose=False) as report:
        assert [entry.name for entry in report.replaced] == ["1"]
        assert [(entry.name, entry.reason) for entry in report.left] == [("0", "Local has a forward of its own")]


def test_a_model_of_a_package_that_is_replaced_already(bindings):
    with apply(), integration.apply(build(bindings), verbose=False) as report:
        assert not report.replaced
        assert [entry.reason for entry in report.left] == ["already replaced by an earlier apply()"]


def test_no_kernel_no_change(bindings, monkeypatch):
    check_no_kernel_no_change(apply, build(bindings), inputs(), monkeypatch)


def test_twice_and_back(bindings, capsys):
    importer = ModuleType("imports_by_value")
    importer.multi_scale_deformable_attn_pytorch = bindings.multi_scale_deformable_attn_pytorch
    sys.modules[importer.__name__] = importer
    owners = [
        (bindings.MultiScaleDeformableAttention, "forward"),
        (bindings.MultiScaleDeformableAttnFunction, "apply"),
        (bindings, "multi_scale_deformable_attn_pytorch"),
        (importer, "multi_scale_deformable_attn_pytorch"),
    ]
    try:
        check_twice_and_back(integration, owners, capsys)
    finally:
        del sys.modules[importer.__name__]


def test_refusals(bindings, monkeypatch):
    check_refusals(integration, MODULE, monkeypatch)

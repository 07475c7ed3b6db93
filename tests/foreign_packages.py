"""Checks that every package's apply() shares; imported before the package, it makes torchvision importable."""

import copy
import pickle
import sys
from importlib.util import find_spec

import pytest
import torch
from integration_checks import assert_agree
from torch.utils._python_dispatch import TorchDispatchMode

from route_kernels import backends
from route_kernels.testing import counted_calls, training_step

_torchvision = torch.library.Library("torchvision", "FRAGMENT")


def _import_torchvision():
    """The usual wheel does not load beside a CPU-only PyTorch, but all that is missed then are two schemas."""
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for schema in ("nms", "qnms"):
            _torchvision.define(f"{schema}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


if find_spec("torchvision") is not None:
    _import_torchvision()


def check_one_model_alone(integration, build, inputs):
    """apply(model) changes that model: no other, not the package; copies keep it, a pickle can be replaced anew.

    A forward that other code put into the model stays.
    """
    model, other = build(), build()
    other.load_state_dict(model.state_dict())
    original = training_step(other, inputs)
    with integration.apply(model, verbose=False) as report:
        assert report.replaced and all(entry.op == "ms_deform_attn_fused" for entry in report.replaced)
        for candidate, calls in ((model, True), (copy.deepcopy(model), True), (other, False)):
            with counted_calls() as counts:
                assert_agree(training_step(candidate, inputs), original)
            assert counts == ({"ms_deform_attn_fused": len(report.replaced)} if calls else {})
        pickled = pickle.dumps(model)
        assert b"route_kernels" not in pickled
        unpickled = pickle.loads(pickled)
        again = integration.apply(copy.deepcopy(model), verbose=False)
        assert {entry.reason for entry in again.left} == {"already replaced by an earlier apply()"}
    with integration.apply(unpickled, verbose=False) as anew:
        assert len(anew.replaced) == len(report.replaced)
    for module in other.modules():
        module.forward = lambda *args, own=module.forward, **kwargs: own(*args, **kwargs)
    with integration.apply(other, verbose=False) as hooked:
        assert not hooked.replaced and len(hooked.left) == len(report.replaced)
        assert all(entry.reason.startswith("other code has replaced its forward") for entry in hooked.left)
    with counted_calls() as counts:
        for candidate in (model, unpickled):
            assert_agree(training_step(candidate, inputs), original, tolerance=0)
    assert not counts


def check_no_kernel_no_change(apply, model, inputs, monkeypatch):
    """While a graph is exported, and on a device without a kernel of ours, the original runs."""
    original = training_step(model, inputs)
    for name, answer in (("exporting", lambda: True), ("can_run", lambda op, name, *_: (name == "reference", ""))):
        with monkeypatch.context() as patched, apply(), counted_calls() as counts:
            patched.setattr(backends, name, answer)
            assert_agree(training_step(model, inputs), original, tolerance=0)
        assert not counts


class Copies(TorchDispatchMode):
    """Records the shapes of copies to another dtype."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def check_low_precision(apply, model, inputs, reference):
    """bfloat16 and float16 with float32 reference points: near the float64 result, and nothing is copied to float32."""
    expected = model(**inputs).detach()
    for dtype in (torch.bfloat16, torch.float16):
        narrowed = {
            name: x.detach().to(torch.float32 if name == reference else dtype).requires_grad_()
            if isinstance(x, torch.Tensor) and x.is_floating_point()
            else x
            for name, x in inputs.items()
        }
        low = copy.deepcopy(model).to(dtype)
        with apply(), Copies() as copies:
            found = low(**narrowed)
            found.sum().backward()
        assert found.dtype == dtype and not copies.shapes
        torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0.05)


def name_of(integration):
    return integration.__name__.rpartition(".")[2]


def check_twice_and_back(integration, owners, capsys):
    """A second apply() says so; revert() restores every (owner, attribute), and says nothing."""
    originals = [vars(owner).get(attribute) for owner, attribute in owners]
    first, second = integration.apply(), integration.apply(verbose=False)
    printed = capsys.readouterr().out
    assert printed.startswith(f"route-kernels: {name_of(integration)}: {len(first.replaced)} replaced, 0 left\n")
    assert all(f"{entry.name}" in printed for entry in first.replaced)
    assert not second.replaced
    assert [entry.name for entry in second.left] == [entry.name for entry in first.replaced]
    assert {entry.reason for entry in second.left} == {"already replaced by an earlier apply()"}
    for (owner, attribute), original in zip(owners, originals, strict=True):
        assert vars(owner).get(attribute) is not original, f"{attribute} of {owner} was not replaced"
    integration.revert()
    assert [vars(owner).get(attribute) for owner, attribute in owners] == originals
    assert not capsys.readouterr().out


def check_refusals(integration, module, monkeypatch):
    """No model, a model with nothing to replace and a missing package each get one clear error."""
    name = name_of(integration)
    with pytest.raises(TypeError, match=rf"{name}.apply: model_or_family: expected a torch.nn.Module or None, got str"):
        integration.apply("encoder", verbose=False)
    with pytest.raises(ValueError, match=rf"{name}.apply: model_or_family: expected a model with \w+ modules, got Lin"):
        integration.apply(torch.nn.Linear(1, 1), verbose=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{name}.apply: {module} cannot be imported \(.*\); install .*{name}"):
        integration.apply(verbose=False)

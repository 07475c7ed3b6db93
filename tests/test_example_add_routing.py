"""examples/add_routing.py trains both branches, over one memory, and leaves transformers' own detector."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="the matcher of transformers needs scipy")

import torch
from integration_checks import assert_agree

import route_kernels as rk
from route_kernels.testing import counted_calls, perturb_sampling, training_step

PATH = Path(__file__).parents[1] / "examples" / "add_routing.py"
specification = importlib.util.spec_from_file_location("example_add_routing", PATH)
example = importlib.util.module_from_spec(specification)
specification.loader.exec_module(example)


@pytest.fixture(params=example.DETECTORS)
def detector(request):
    return example.DETECTORS[request.param]()


def randomised(branches):
    """Routers of which the branches depend visibly."""
    for router in branches.routing.routers.values():
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return branches


def test_both_branches_learn_and_inference_is_plain(detector):
    names = list(detector.state_dict())
    images, labels = example.synthetic_images(4)
    branches = randomised(example.DualBranch(detector))
    routers = torch.nn.ModuleList(branches.routing.routers.values())
    before = [parameter.clone() for parameter in routers.parameters()]
    with counted_calls() as counts:
        losses = torch.tensor(example.train(branches, images, labels, steps=20))
    assert len(routers) == 2 and counts["routed_attention"] == 2 * 20
    assert (losses[:3].mean(0) > 1.1 * losses[-3:].mean(0)).all(), losses
    assert (losses[:, 0] != losses[:, 1]).any()
    assert not any(torch.equal(old, new) for old, new in zip(before, routers.parameters(), strict=True))

    plain = type(detector)(detector.config).eval()
    plain.load_state_dict({name: tensor for name, tensor in detector.state_dict().items() if ".router." not in name})
    with torch.no_grad(), counted_calls() as counts:
        expected = plain(images)
        found = detector.eval()(images)
        branches.routing.revert()
        reverted = detector(images)
    assert not counts and list(detector.state_dict()) == names
    for output in (found, reverted):
        assert torch.equal(output.pred_boxes, expected.pred_boxes) and torch.equal(output.logits, expected.logits)


def test_one_memory_is_two_passes(detector):
    detector.config.num_denoising = 0  # its noise would differ between two passes
    perturb_sampling(detector)
    branches = randomised(example.DualBranch(detector)).double()
    images, labels = example.synthetic_images(2)
    images, labels = images.double(), [{**label, "boxes": label["boxes"].double()} for label in labels]

    def one_memory(images):
        return [output.loss for output in branches(images, labels, 0.7)]

    def two_passes(images):
        main = detector(images, labels=labels)
        with rk.routing(0.7, **example.gate_features(main)):
            return main.loss, detector(images, labels=labels).loss

    expected = training_step(two_passes, (images,), module=branches)
    assert_agree(training_step(one_memory, (images,), module=branches), expected, 1e-7)
    assert abs(expected["output 0"] - expected["output 1"]) > 1e-6


def test_it_runs_as_it_stands(capsys):
    example.main(steps=2)
    printed = capsys.readouterr().out
    assert all(f"{name}: inference without the routers is the same: True" in printed for name in example.DETECTORS)

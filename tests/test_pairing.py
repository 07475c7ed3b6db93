"""Runs of one seed are pairs: what two detectors share begins alike, and both see the same images, crops and noise."""

import pytest
import torch
from small_detector import SMALL as SMALL_DETECTOR
from small_training import SMALL, write_data

from route_detr.config import DetectorConfig, preset
from route_detr.data.coco import coco_layout
from route_detr.model.detector import Detector
from route_detr.run import Run
from route_detr.scale_out import start_processes
from route_detr.train import Training

DENOISED = {"query_position": "anchor", "denoising_pairs": 6}
VARIANTS = {
    "plain": {"route": False},
    "routed": {"routed_layers": "last:1"},
    "all layers": {"routed_layers": "all"},
    "two layers": {"routed_layers": (0, 2)},
}


def begun(**changes):
    """Parameters and buffers of a detector as it begins with seed 0, but for the schedule of routing."""
    torch.manual_seed(0)
    state = Detector(DetectorConfig(**{**SMALL_DETECTOR, **changes})).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("routing.")}


@pytest.mark.parametrize("common", [{}, DENOISED, {"masks": True}, DENOISED | {"masks": True}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_router_shifts_no_number_of_another_part(variant, common):
    ours, everything = begun(**VARIANTS[variant], **common), begun(routed_layers="all", **common)
    assert ours.keys() == {n for n in everything if ".routers." not in n or n in ours}
    for name, value in ours.items():
        assert torch.equal(value, everything[name]), name


@pytest.mark.parametrize("common", [{}, {"masks": True}], ids=str)
def test_a_denoising_part_shifts_no_number_of_another_part(common):
    with_it, without = begun(**DENOISED, **common), begun(**DENOISED | {"denoising_pairs": 0}, **common)
    assert with_it.keys() - without.keys() == {"denoising.content.weight"}
    for name, value in without.items():
        assert torch.equal(value, with_it[name]), name


def test_routers_of_different_layers_begin_with_different_numbers():
    state = begun(routed_layers="all")
    name = next(name for name, value in state.items() if ".routers.0." in name and value.dim() > 1)
    assert not torch.equal(state[name], state[name.replace(".0.", ".1.", 1)])


def seen(folder, data, changes, steps=6):
    """Images, boxes and noisy boxes of a run's first steps."""
    config = preset("tiny").updated({**SMALL, **changes, "train.steps": steps, "train.eval_every": 9, "train.seed": 3})
    training = Training(Run(folder), config, data, start_processes("cpu"))
    training.start()
    found = []

    def look(module, args, output):
        images, _, targets = args
        known = output.denoising.targets
        found.append([images, known.target, *(target.boxes for target in targets)])

    def look_at_noise(module, args, queries):
        found.append([queries.box_logits[:, 0, args[0].matching :], queries.content[:, 0, args[0].matching :].shape])

    training.detector.denoising.register_forward_hook(look_at_noise)
    training.detector.register_forward_hook(lambda *each: look(*each) if training.detector.training else None)
    training.fit()
    return found


def test_all_see_the_same_images_crops_and_noise(tmp_path):
    layout = coco_layout(write_data(tmp_path / "coco"))
    parts = [("json", "annotations"), ("images", "images")]
    data = {f"{s}_{kind}": str(getattr(getattr(layout, s), part)) for s in ("train", "val") for kind, part in parts}
    common = {"detector.query_position": "anchor", "detector.denoising_pairs": 4, "transforms.crop": 0.5}
    common |= {"transforms.flip": 0.5, "transforms.crop_scales": [48], "transforms.crop_size": [20, 40]}
    variants = [{"detector.route": False}, {}, {"schedule.warmup": 0.0, "detector.routed_layers": "all"}]
    plain, *others = (seen(tmp_path / str(n), data, common | changes) for n, changes in enumerate(variants))
    assert len(plain) == 12
    for other in others:
        for ours, theirs in zip(plain, other, strict=True):
            assert all(
                a == b if isinstance(a, torch.Size) else torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
            )

"""The memory levels, and the public formulation, compute the same losses and gradients."""

import pytest
import torch
from small_detector import small_batch, small_detector, trained_step

from route_detr.config import DetectorConfig, TrainConfig
from route_detr.memory.planner import LEVELS
from route_detr.memory.public_form import PublicCriterion, make_public, public_config
from route_detr.model import blocks
from route_detr.model.blocks import AddNorm, Blocks
from route_detr.model.encoder import EncoderLayer
from route_kernels.nn import AddLayerNorm, FeedForward, MSDeformAttn

STRENGTH, AUX_WEIGHT = 0.3, 0.5
VARIANTS = {
    "plain": {},
    "denoising": {"denoising_pairs": 6, "query_position": "anchor", "proposal_classes": "all", "decoder_norm": True},
    "all layers routed": {"routed_layers": "all"},
}


def largest_error(found, expected):
    """Largest difference of losses and gradients, each over its own largest number."""
    return max(
        ((found[k] - expected[k]).abs().max() / expected[k].abs().max().clamp_min(1e-3)).item() for k in expected
    )


@pytest.fixture(scope="module", params=VARIANTS)
def eager_step(request):
    changes = VARIANTS[request.param]
    return changes, step("none", changes)


def step(level, changes):
    detector = small_detector(memory=level, **changes)
    _, losses, gradients = trained_step(detector, small_batch(), STRENGTH, AUX_WEIGHT)
    return {**losses, **gradients}


@pytest.mark.parametrize("level", LEVELS[1:])
def test_losses_and_gradients_are_those_of_the_eager_form(level, eager_step):
    changes, expected = eager_step
    found = step(level, changes)
    assert found.keys() == expected.keys()
    assert largest_error(found, expected) < 1e-9


@pytest.mark.parametrize("changes", [VARIANTS["plain"], VARIANTS["denoising"]], ids=["plain", "denoising"])
def test_the_public_form_has_our_loss_and_gradients(changes):
    settings = vars(public_config(DetectorConfig(**changes)))
    alike = {name: settings[name] for name in ("branches", "proposal_classes", "memory")} | changes
    results = []
    for public in (False, True):
        detector = small_detector(**{**alike, "proposal_classes": "all"})
        if public:
            make_public(detector)
        images, padding_mask, targets = small_batch()
        criterion = (PublicCriterion if public else _ours)(TrainConfig())
        detector.set_routing(STRENGTH, AUX_WEIGHT)
        detector.train()
        torch.manual_seed(0)
        loss = criterion(detector(images, padding_mask, targets), targets)["loss"]
        loss.backward()
        gradients = {n: p.grad for n, p in detector.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), **gradients})
    assert results[0].keys() == results[1].keys()
    assert largest_error(results[1], results[0]) < 1e-9


def _ours(config):
    from route_detr.model.criterion import Criterion

    return Criterion(config)


def test_state_dicts_do_not_depend_on_the_level():
    states = [small_detector(memory=level).state_dict() for level in LEVELS]
    for state in states[1:]:
        assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in states[0].items()}


def recomputed_functions(monkeypatch):
    """A list to which the blocks append each function that backward would run again."""
    ran = []
    monkeypatch.setattr(blocks, "recomputed", lambda function, *inputs, kept: ran.append(function) or function(*inputs))
    return ran


def test_each_level_recomputes_what_it_says(monkeypatch):
    by_level = {level: small_detector(memory=level) for level in LEVELS}
    modules = {level: list(detector.modules()) for level, detector in by_level.items()}
    for level, found in modules.items():
        lean = level in ("lean", "tight", "min")
        assert any(isinstance(module, AddNorm) for module in found) != lean
        assert any(isinstance(module, AddLayerNorm) for module in found) == lean
        assert {module.chunks for module in found if isinstance(module, FeedForward)} == {8 if lean else None}
        again = {module.recompute for module in by_level[level].decoder.modules() if isinstance(module, MSDeformAttn)}
        assert again == {level in ("tight", "min")}
        ran = recomputed_functions(monkeypatch)
        by_level[level](*small_batch()[:2])
        layers = set(by_level[level].encoder.layers) if level == "min" else set()
        assert {each for each in ran if isinstance(each, EncoderLayer)} == layers
        assert (by_level[level].proposals._scored in ran) == lean


def test_an_unknown_level_is_an_error():
    with pytest.raises(ValueError, match="memory"):
        DetectorConfig(memory="tiny")


def test_levels_are_ordered():
    config = DetectorConfig(memory="tight")
    assert [Blocks(config).saves(level) for level in LEVELS] == [True, True, True, True, False]

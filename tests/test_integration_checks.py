"""The checks that every integration's test relies on notice what they are there to notice."""

import foreign_model
import pytest
import torch
from integration_checks import align_corners_mistaken, assert_agree, check_integration

import route_kernels as rk
from route_kernels.testing import counted_calls, perturb_sampling, relative_errors, tensors_in, training_step


def model():
    return foreign_model.Model().double()


def through(change):
    """An apply() whose op is ours with `change` made to its arguments or its result."""
    return lambda: foreign_model.apply(
        lambda value, shapes, *points: change(lambda *a: rk.ms_deform_attn(a[0], shapes, None, *a[1:]), value, *points)
    )


WRONG = {
    "no gradient of the weights": lambda op, value, locations, weights: op(value, locations, weights.detach()),
    "a gradient a little off": lambda op, value, locations, weights: op(
        value, locations * 1.001 - locations.detach() * 0.001, weights
    ),
    "a scale": lambda op, *arguments: op(*arguments) * (1 + 1e-6),
    "float32 inside": lambda op, *arguments: op(*(x.float() for x in arguments)).double(),
    "NaN": lambda op, *arguments: op(*arguments) * float("nan"),
}


def test_an_op_that_is_right_passes():
    report = check_integration(model(), foreign_model.inputs(), foreign_model.apply, {"ms_deform_attn": 2})
    assert [entry.name for entry in report.replaced] == ["deformable_attention"]


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_an_op_that_is_wrong_does_not(change):
    with pytest.raises(AssertionError, match="results differ by more than 1e-08"):
        check_integration(model(), foreign_model.inputs(), through(change), {"ms_deform_attn": 2})


def test_a_missing_gradient_is_named():
    detached = through(WRONG["no gradient of the weights"])
    with pytest.raises(AssertionError, match=r"4 of them missing \(like 'grad layers.0.attention_weights.weight'\)"):
        check_integration(model(), foreign_model.inputs(), detached, {"ms_deform_attn": 2})


def test_calls_that_are_not_made_are_noticed():
    with pytest.raises(AssertionError, match=r"expected calls \{'ms_deform_attn': 3\}, got \{'ms_deform_attn': 2\}"):
        check_integration(model(), foreign_model.inputs(), foreign_model.apply, {"ms_deform_attn": 3})


def test_a_model_in_which_a_wrong_op_does_not_show_proves_nothing():
    blind = model()
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_integration(
            lambda **inputs: 0 * blind(**inputs)["hidden"],
            foreign_model.inputs(), foreign_model.apply, {"ms_deform_attn": 2}, module=blind,
        )  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
def test_calls_are_counted_on_every_backend(backend):
    with rk.backend(backend), foreign_model.apply(), counted_calls() as counts:
        model()(**foreign_model.inputs())
        rk.query_similarity(torch.randn(1, 3, 4))
    assert counts == {"ms_deform_attn": 2, "query_similarity": 1}


def test_the_mistake_is_made_by_the_plain_and_the_fused_op_and_ends():
    value, shapes = torch.randn(1, 12, 1, 4), ((3, 4),)
    places = torch.full((1, 1, 1, 1, 2), 0.25)
    calls = (
        lambda: rk.ms_deform_attn(value, shapes, None, places.unsqueeze(4), torch.ones(1, 1, 1, 1, 1)),
        lambda: rk.ms_deform_attn_fused(
            value, shapes, places[:, :, 0], torch.zeros_like(places), torch.zeros(1, 1, 1, 1)
        ),
    )
    right = [call() for call in calls]
    with align_corners_mistaken():
        mistaken = [call() for call in calls]
    torch.testing.assert_close(mistaken[0], mistaken[1])
    assert not torch.allclose(mistaken[0], right[0])
    assert all(torch.equal(call(), result) for call, result in zip(calls, right, strict=True))


def test_step_has_every_output_parameter_and_input():
    step = training_step(model(), foreign_model.inputs())
    assert {"output hidden", "output of_each_query.0", "output of_each_query.1"} < step.keys()
    assert {"grad layers.1.value_proj.bias", "grad input query", "grad input memory"} < step.keys()
    assert step["grad layers.0.unused.weight"] is None
    assert relative_errors(step, step) == dict.fromkeys(step, 0.0)


def test_step_is_repeatable_under_dropout():
    dropped = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    steps = [training_step(dropped, (torch.ones(2, 4),)) for _ in range(2)]
    assert_agree(*steps, tolerance=0)


def test_perturbation_is_repeatable_and_only_of_sampling_layers():
    one, other = foreign_model.Model(), foreign_model.Model()
    other.load_state_dict(one.state_dict())
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    assert perturb_sampling(one) == perturb_sampling(other) == 8
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
        assert torch.equal(tensor, before[name]) == ("value_proj" in name or "unused" in name)


def test_errors_of_odd_results():
    expected = {
        "output proposals": torch.tensor([torch.inf, 1.0]), "output indices": torch.tensor([1, 2]),
        "grad unused": None, "grad cancels": torch.tensor([1e-12]), "grad large": torch.tensor([1.0]),
        "grad dead": torch.zeros(2),
    }  # fmt: skip
    found = expected | {"grad unused": torch.zeros(3), "grad cancels": torch.tensor([-1e-12])}
    errors = relative_errors(found, expected)
    assert errors.pop("grad cancels") < 1e-7 and not any(errors.values())
    for wrong in (
        {"output proposals": torch.tensor([1.0, 1.0])},
        {"output indices": torch.tensor([1, 3])},
        {"grad unused": torch.ones(3)},
        {"grad large": None},
        {"grad dead": torch.zeros(3)},
        {"grad new": torch.ones(1)},
    ):
        errors = relative_errors(expected | wrong, expected)
        assert [name for name, error in errors.items() if error] == list(wrong)


def test_tensors_are_found_in_any_nesting():
    routing = rk.RoutingFactors(*(torch.zeros(1) for _ in range(6)), 5.0)
    nested = {"a": [torch.zeros(1), (torch.zeros(2), None)], "routing": routing, "n": 3}
    names = [name for name, _ in tensors_in(nested)]
    assert names[:3] == ["a.0", "a.1.0", "routing.sup_q"] and len(names) == 8


def test_a_step_without_gradient_says_so():
    with pytest.raises(ValueError, match="expected an output that requires a gradient, got none"):
        training_step(torch.sigmoid, (torch.zeros(2),))

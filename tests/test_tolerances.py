"""The tolerance policy catches the mistakes that a kernel of routed attention can have."""

import math

import pytest
import torch

from route_kernels.testing import EAGER, assert_as_accurate, check_accuracy, routed_attention_arguments


def attend(query, key, value, bias, scale=None):
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return torch.softmax(scale * (query @ key.mT) + bias.unsqueeze(1), dim=-1) @ value


def products(routing):
    """p, the suppressor's and the delegator's products: [B, N, M] each."""
    p = torch.sigmoid(routing.gate_q @ routing.gate_k.mT)
    return p, routing.sup_q @ routing.sup_k.mT, routing.del_q @ routing.del_k.mT


def right(query, key, value, routing):
    p, sup, delegated = products(routing)
    return attend(query, key, value, (p * sup + (1 - p) * delegated).clamp(-routing.limit, routing.limit))


def no_bias(query, key, value, routing):
    factors = {name: 0 * x for name, x in routing._asdict().items() if isinstance(x, torch.Tensor)}
    return right(query, key, value, routing._replace(**factors))


def no_clamp(query, key, value, routing):
    return right(query, key, value, routing._replace(limit=math.inf))


def clamp_not_differentiated(query, key, value, routing):
    p, sup, delegated = products(routing)
    r = p * sup + (1 - p) * delegated
    return attend(query, key, value, r + (r.clamp(-routing.limit, routing.limit) - r).detach())


def gate_the_other_way_round(query, key, value, routing):
    return right(query, key, value, routing._replace(gate_q=routing.gate_k, gate_k=routing.gate_q))


def gate_not_differentiated(query, key, value, routing):
    p, sup, delegated = products(routing)
    p = p.detach() + 0 * p
    return attend(query, key, value, (p * sup + (1 - p) * delegated).clamp(-routing.limit, routing.limit))


def scale_of_another_width(query, key, value, routing):
    return right(query * 1.001, key, value, routing)


def first_head_alone_moves_the_bias(query, key, value, routing):
    frozen = routing._replace(**{k: x.detach() for k, x in routing._asdict().items() if isinstance(x, torch.Tensor)})
    heads = [right(q[:, None], k[:, None], v[:, None], f) for q, k, v, f in zip(
        query.unbind(1), key.unbind(1), value.unbind(1), (routing, *(frozen,) * (query.shape[1] - 1)), strict=True
    )]  # fmt: skip
    return torch.cat(heads, dim=1)


def last_row_forgotten(query, key, value, routing):
    return torch.cat([right(query, key, value, routing)[:, :, :-1], 0 * query[:, :, -1:]], dim=2)


def last_key_forgotten(query, key, value, routing):
    shorter = {name: getattr(routing, name)[:, :-1] for name in ("sup_k", "del_k", "gate_k")}
    short = right(query, key[:, :, :-1], value[:, :, :-1], routing._replace(**shorter))
    return short + 0 * (key.sum() + value.sum() + sum(getattr(routing, name).sum() for name in shorter))


def bias_in_bfloat16(query, key, value, routing):
    p, sup, delegated = (x.bfloat16() for x in products(routing))
    return attend(query, key, value, (p * sup + (1 - p) * delegated).clamp(-routing.limit, routing.limit).float())


def not_a_number(query, key, value, routing):
    return right(query, key, value, routing) * math.nan


ARGUMENTS = dict(queries=37, limit=2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("function", [right, EAGER["routed_attention"]], ids=["by hand", "SDPA"])
def test_a_right_form_passes(function, dtype):
    check_accuracy("routed_attention", routed_attention_arguments(dtype=dtype, **ARGUMENTS), function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "function",
    [
        no_bias, no_clamp, clamp_not_differentiated, gate_the_other_way_round, gate_not_differentiated,
        first_head_alone_moves_the_bias, last_row_forgotten, last_key_forgotten, not_a_number,
    ],
)  # fmt: skip
def test_a_mistake_is_caught(function, dtype):
    with pytest.raises(AssertionError, match="RMS error"):
        check_accuracy("routed_attention", routed_attention_arguments(dtype=dtype, **ARGUMENTS), function)


@pytest.mark.parametrize("function", [bias_in_bfloat16, scale_of_another_width])
def test_lost_precision_is_caught(function):
    with pytest.raises(AssertionError, match="output: RMS error"):
        check_accuracy("routed_attention", routed_attention_arguments(**ARGUMENTS), function)


def test_a_gradient_mistake_is_named():
    with pytest.raises(AssertionError) as caught:
        check_accuracy("routed_attention", routed_attention_arguments(**ARGUMENTS), clamp_not_differentiated)
    assert "grad routing.sup_q" in str(caught.value)
    assert "output" not in str(caught.value) and "grad value" not in str(caught.value)


def test_missing_results_and_wrong_shapes_are_caught():
    exact = {"output": torch.ones(3, dtype=torch.float64), "grad x": torch.ones(2, dtype=torch.float64)}
    with pytest.raises(AssertionError, match="expected results"):
        assert_as_accurate({"output": exact["output"]}, exact, exact)
    with pytest.raises(AssertionError, match=r"wrong shapes of \['grad x'\]"):
        assert_as_accurate({**exact, "grad x": torch.ones(1)}, exact, exact)

"""The report tells what an apply() replaced and reverts it exactly, whatever happened in between."""

import copy
import functools
import gc
import inspect
import types
import weakref
from types import MethodType

import pytest
import torch

from route_kernels.integrations.codebase import (
    UNKNOWN_DECORATOR,
    Report,
    applying,
    inside_decorators,
    is_replaced,
    replaced_by_others,
    revert_all,
)


class Attention(torch.nn.Module):
    def forward(self):
        return "original"


def replacement():
    return "ours"


@pytest.fixture
def module():
    return types.SimpleNamespace(sample=lambda: "original", other=lambda: "other")


def apply(*names_of, codebase="somebody's", verbose=False):
    with applying(codebase, verbose=verbose) as report:
        for owner, attribute in names_of:
            report.replace(owner, attribute, replacement, name=attribute, op="ms_deform_attn")
    return report


def test_replaced_and_reverted(module):
    original = module.sample
    report = apply((module, "sample"))
    assert module.sample is replacement and is_replaced(module, "sample")
    assert [(entry.name, entry.op) for entry in report.replaced] == [("sample", "ms_deform_attn")]
    report.revert()
    assert module.sample is original and not is_replaced(module, "sample")
    module.sample = "later"
    report.revert()  # a second time does nothing
    assert module.sample == "later"


def test_end_of_the_block_reverts_after_an_error_too(module):
    original = module.sample
    with pytest.raises(KeyError), apply((module, "sample")):
        assert module.sample is replacement
        raise KeyError
    assert module.sample is original


def test_an_instance_gets_an_attribute_and_loses_it_again():
    one, other = Attention(), Attention()
    with apply((one, "forward")):
        assert one() == "ours" and other() == "original" and "forward" in vars(one)
    assert one() == "original" and "forward" not in vars(one)


def test_an_instance_keeps_an_attribute_of_its_own():
    held = Attention()
    held.core = original = lambda: "held since __init__"
    with apply((held, "core")):
        assert held.core is replacement
    assert held.core is original and vars(held)["core"] is original


def test_a_class_changes_for_instances_made_before_and_after():
    class Mine(Attention):
        pass

    before, original = Mine(), Attention.forward
    with apply((Mine, "forward")):
        assert vars(Mine)["forward"] is replacement and Attention.forward is original
    assert "forward" not in vars(Mine) and before() == Mine()() == "original"


def test_an_item_of_a_dictionary():
    modules = {"there": "original"}
    with apply((modules, "there"), (modules, "new")):
        assert modules == {"there": replacement, "new": replacement}
    assert modules == {"there": "original"}


def test_applied_twice_the_second_says_so_and_leaves_it_to_the_first(module):
    original = module.sample
    first, second = apply((module, "sample")), apply((module, "sample"), (module, "other"))
    assert [entry.name for entry in second.replaced] == ["other"]
    assert [(entry.name, entry.reason) for entry in second.left] == [
        ("sample", "already replaced by an earlier apply()")
    ]
    second.revert()
    assert module.sample is replacement and module.other() == "other"
    first.revert()
    assert module.sample is original


def test_an_instance_of_a_replaced_class_is_replaced_already():
    class Mine(Attention):
        pass

    instance = Mine()
    with apply((Mine, "forward")):
        assert apply((instance, "forward")).left[0].reason == "already replaced by an earlier apply()"
        assert "forward" not in vars(instance)


@pytest.mark.parametrize("first_reverted", [0, 1])
def test_nested_reports_of_different_names_revert_in_any_order(module, first_reverted):
    originals = dict(vars(module))
    reports = [apply((module, "sample")), apply((module, "other"))]
    reports.pop(first_reverted).revert()
    reports.pop().revert()
    assert vars(module) == originals


@pytest.mark.parametrize("reported", [False, True], ids=["", "its report is kept"])
def test_a_replaced_module_may_be_dropped(reported):
    one = Attention()
    one.forward = one.forward  # as a model is unpickled whose forward was replaced
    report = apply((one, "core"))
    with applying("somebody's", verbose=False) as bound:
        bound.replace(one, "forward", MethodType(replacement, one), name="forward", op="ms_deform_attn")
    gone, reports = weakref.ref(one), [report, bound] if reported else []
    del one, report, bound
    gc.collect()
    assert gone() is None
    revert_all("somebody's")
    for report in reports:
        report.revert()


def test_a_method_that_was_bound_already_comes_back():
    one = Attention()
    one.forward = original = one.forward
    with applying("somebody's", verbose=False) as report:
        report.replace(one, "forward", MethodType(lambda self: "ours", one), name="forward", op="ms_deform_attn")
    assert one() == "ours" and not replaced_by_others(one)
    report.revert()
    assert vars(one)["forward"] == original and one() == "original"


def test_copies_are_replaced_and_what_others_did_is_theirs():
    one, others = Attention(), Attention()
    ours = MethodType(lambda self: "ours", one)
    with applying("somebody's", verbose=False) as report:
        report.replace(one, "forward", ours, name="forward", op="ms_deform_attn")
    twin = copy.deepcopy(one)
    report.revert()
    assert one() == "original" and twin() == "ours" and not replaced_by_others(twin)
    assert apply((twin, "forward")).left[0].reason == "already replaced by an earlier apply()"
    others.forward = lambda: "theirs"
    assert replaced_by_others(others) and not replaced_by_others(one)


def test_the_same_name_may_be_replaced_again_after_a_revert(module):
    for _ in range(2):
        with apply((module, "sample")) as report:
            assert report.replaced and not report.left


def test_an_error_while_applying_puts_everything_back(module):
    originals = dict(vars(module))
    with pytest.raises(AttributeError), applying("somebody's", verbose=True) as report:
        report.replace(module, "sample", replacement, name="sample", op="ms_deform_attn")
        report.replace(module, "other", replacement, name="other", op="ms_deform_attn")
        raise AttributeError
    assert vars(module) == originals
    assert not is_replaced(module, "sample")


def test_someone_elses_replacement_since_is_not_overwritten(module):
    originals = dict(vars(module))
    report = apply((module, "other"), (module, "sample"))
    module.sample = theirs = lambda: "theirs"
    with pytest.raises(RuntimeError, match="sample of SimpleNamespace has been replaced by other code"):
        report.revert()
    assert module.sample is theirs and module.other is replacement, "nothing changes where not everything can"
    module.sample = replacement
    report.revert()
    assert vars(module) == originals


def test_someone_elses_removal_since_is_noticed_too(module):
    report = apply((module, "sample"))
    del module.sample
    with pytest.raises(RuntimeError, match="undo that first"):
        report.revert()
    module.sample = replacement
    report.revert()


def test_revert_all_is_of_one_codebase(module):
    originals = dict(vars(module))
    mine, theirs = apply((module, "sample")), apply((module, "other"), codebase="another")
    revert_all("somebody's")
    assert module.sample is originals["sample"] and module.other is replacement
    revert_all("another")
    assert vars(module) == originals
    mine.revert(), theirs.revert()  # nothing is left to do


def test_report_is_printed_when_asked(module, capsys):
    with applying("somebody's", verbose=True) as report:
        report.replace(module, "sample", replacement, name="sample", op="ms_deform_attn")
        report.leave("decoder.layers.0", "method is discrete")
    report.revert()
    assert capsys.readouterr().out.splitlines() == [
        "route-kernels: somebody's: 1 replaced, 1 left",
        "  sample            -> ms_deform_attn",
        "  decoder.layers.0  left: method is discrete",
    ]
    apply((module, "sample"), verbose=False).revert()
    assert capsys.readouterr().out == ""
    assert str(Report("nothing")) == "route-kernels: nothing: 0 replaced, 0 left"


# ---- decorators -----------------------------------------------------------------------------------------------------


def product(self, x, weight):
    """Runs as autocast says."""
    return x @ weight


def transposed_product(original):
    @functools.wraps(original)
    def forward(self, *arguments, **keywords):  # as replacements are written: the names are the original's
        x, weight = inspect.signature(original).bind(self, *arguments, **keywords).args[1:]
        return (weight.mT @ x.mT).mT

    return forward


def force_fp32(function):
    """mmcv's, in short: it looks up which arguments it gets by the names that the function has."""

    @functools.wraps(function)
    def forward(*arguments, **keywords):
        names = inspect.getfullargspec(function).args[: len(arguments)]
        assert len(names) == len(arguments)
        arguments = [x.float() if isinstance(x, torch.Tensor) else x for x in arguments]
        with torch.autocast("cpu", enabled=False):
            return function(*arguments, **{name: x.float() for name, x in keywords.items()})

    return forward


KEPT = {
    "nothing": lambda function: function,
    "custom_fwd": torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32),
    "custom_fwd without a cast": torch.amp.custom_fwd(device_type="cpu"),
    "autocast": torch.autocast("cpu", enabled=False),
    "force_fp32": force_fp32,
    "no_grad": torch.no_grad(),
    "compiler.disable": torch.compiler.disable,
    "two of them": lambda function: torch.no_grad()(torch.autocast("cpu", enabled=False)(function)),
    "of another device": torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.float32),
}


@pytest.mark.parametrize("name", KEPT)
def test_decorators_of_a_forward_stay_around_its_replacement(name):
    class Product(torch.nn.Module):
        forward = KEPT[name](product)

    module, x, weight = Product(), torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x, weight=weight)
    for owner in (module, Product):
        with applying("somebody's", verbose=False) as report:
            report.replace_forward(owner, transposed_product, name="product", op="a product")
        assert [entry.name for entry in report.replaced] == ["product"]
        with report, torch.autocast("cpu", torch.bfloat16):
            found = module(x, weight=weight)
            assert torch.equal(module(x, weight), found)
            assert inspect.signature(module.forward) == inspect.signature(Product.forward.__get__(module))
        assert found.dtype == expected.dtype and found.requires_grad == expected.requires_grad
        torch.testing.assert_close(found, expected)
    assert "forward" not in vars(module) and inspect.unwrap(Product.forward) is product


def test_every_decorator_that_is_called_stays():
    """The device of one is not here: what it holds shows that it is there."""
    kept = inside_decorators(KEPT["of another device"](product), transposed_product)
    assert inspect.getclosurevars(kept).nonlocals["device_type"] == "cuda"
    assert kept.__wrapped__.__code__ is transposed_product(product).__code__


class HeldElsewhere:
    """A decorator of another making."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __get__(self, owner, _):
        return MethodType(self, owner) if owner is not None else self

    def __call__(self, *arguments):
        return self.function(*arguments).float()


def held_as_a_default(function):
    @functools.wraps(function)
    def forward(self, x, weight, *, call=function):
        return call(self, x, weight).float()

    return forward


@pytest.mark.parametrize("decorator", [HeldElsewhere, held_as_a_default, functools.partialmethod])
def test_a_forward_whose_decorator_would_be_lost_is_left(decorator):
    class Product(torch.nn.Module):
        forward = decorator(product)

    module = Product()
    for owner in (module, Product):
        with applying("somebody's", verbose=False) as report:
            report.replace_forward(owner, transposed_product, name="product", op="a product")
        if decorator is functools.partialmethod:  # which is resolved when it is looked up
            continue
        assert not report.replaced and [entry.reason for entry in report.left] == [UNKNOWN_DECORATOR]
    assert inside_decorators(functools.partial(product), transposed_product) is None

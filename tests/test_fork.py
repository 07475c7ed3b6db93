"""CPU kernels in a child of fork(), which has none of the threads that its parent computed with."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import route_kernels as rk
from route_kernels.testing import declaration, outcome, sample_arguments


def first_elements(op, arguments, grad_output):
    return {
        name: result.flatten()[:5].tolist() for name, result in outcome(getattr(rk, op), arguments, grad_output).items()
    }


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("op", rk.backends.OPS)
def test_a_forked_child_computes_what_its_parent_does(op, large):
    assert rk.can_run(op, "cpu", torch.empty(0))[0]
    torch.set_num_threads(2)
    arguments = next(iter(sample_arguments(op, **declaration(op).OF_WORKERS if large else {}).values()))
    grad_output = torch.ones_like(getattr(rk, op)(**arguments))
    expected = first_elements(op, arguments, grad_output)
    torch.ones(10**6).exp()  # PyTorch's threads exist, whatever the op needed
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(first_elements(op, arguments, grad_output)))
    child.start()
    try:
        assert receiver.poll(60), f"{op} hangs in a forked child"
        assert receiver.recv() == expected
    finally:
        child.kill()
        child.join()


def test_threads_of_a_forked_child_may_all_make_its_first_call():
    torch.set_num_threads(8)
    x = torch.randn(4, 240, 32)
    expected = rk.query_similarity(x).tolist()
    context = multiprocessing.get_context("fork")

    def child():
        together = threading.Barrier(4, timeout=30)

        def first_call(_):
            together.wait()
            return rk.query_similarity(x).tolist()

        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(first_call, range(4)))
        assert found == [expected] * 4

    children = [context.Process(target=child) for _ in range(8)]
    for process in children:
        process.start()
        process.join(60)
        process.kill()
    assert [process.exitcode for process in children] == [0] * 8

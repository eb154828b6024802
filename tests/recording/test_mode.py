"""The block itself: nothing runs, nothing is allocated, questions get true answers, and nothing stays behind."""

from __future__ import annotations

import gc
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import init
from torch.nn.init import trunc_normal_, xavier_uniform_  # captured references, as model code has them
from torch.utils._python_dispatch import TorchDispatchMode

from fabric_init import deferred_init
from fabric_init.api import materialize
from fabric_init.recording.mode import active
from fabric_init.recording.tensor.recorded_tensor import recorded

INIT: dict[str, Callable[[torch.Tensor], object]] = {
    name: getattr(init, name)
    for name in [
        "uniform_",
        "normal_",
        "trunc_normal_",
        "ones_",
        "zeros_",
        "eye_",
        "xavier_uniform_",
        "xavier_normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "orthogonal_",
    ]
} | {
    "constant_": lambda t: init.constant_(t, 0.5),
    "sparse_": lambda t: init.sparse_(t, 0.5),
    "dirac_": lambda t: init.dirac_(t.view(2, 3, 1)),
    "captured xavier_uniform_": xavier_uniform_,
    "captured trunc_normal_": lambda t: trunc_normal_(t, std=0.02),
}


class RealOps(TorchDispatchMode):
    """Dispatch mode that collects the ops on real tensors of more than one element."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        if any(not t.is_meta and t.numel() > 1 for t in tensors):
            self.seen.append(str(func))
        return result


@pytest.mark.parametrize("name", INIT)
def test_no_init_kernel_runs_in_the_block(name: str) -> None:
    with RealOps() as spy, deferred_init():
        INIT[name](torch.empty(2, 3))
    assert spy.seen == []


def test_the_spy_above_sees_eager_kernels() -> None:
    with RealOps() as spy:
        init.xavier_uniform_(torch.empty(2, 3))
    assert any("uniform_" in op for op in spy.seen)


def test_a_model_of_100_gb_takes_neither_memory_nor_time() -> None:
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with deferred_init():
        model = nn.ModuleList([nn.Linear(50_000, 50_000) for _ in range(10)])
        for layer in model:
            init.trunc_normal_(layer.weight, std=0.02)
            layer.weight.data.mul_(0.5)
    assert sum(p.nbytes for p in model.parameters()) > 100e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert time.process_time() - start < 20


def test_another_thread_builds_eagerly_meanwhile() -> None:
    opened, built = threading.Event(), threading.Event()
    made: list[nn.Linear] = []
    seen: list[object] = []

    def other() -> None:
        opened.wait(30)
        seen.append(active())
        made.append(nn.Linear(4, 4))
        trunc_normal_(made[0].weight)
        built.set()

    thread = threading.Thread(target=other)
    thread.start()
    with deferred_init():
        opened.set()
        assert built.wait(30)
        mine = nn.Linear(4, 4)
    thread.join()
    assert seen == [None]
    assert recorded(made[0].weight) is None
    assert not made[0].weight.is_meta
    assert float(made[0].weight.detach().abs().sum()) > 0
    assert recorded(mine.weight) is not None


def test_two_threads_record_at_once_without_mixing_their_tapes() -> None:
    models: dict[int, nn.Module] = {}
    both_open = threading.Barrier(2)

    def build(number: int) -> None:
        with deferred_init():
            both_open.wait(30)
            models[number] = nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)])

    threads = [threading.Thread(target=build, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tapes = [{id(recorded(p).tape) for p in model.parameters()} for model in models.values()]  # type: ignore[union-attr]
    assert [len(numbers) for numbers in tapes] == [1, 1]
    assert tapes[0] != tapes[1]
    for model in models.values():
        materialize(model)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_constructor_that_raises_leaves_nothing_changed() -> None:
    functions = {name: getattr(init, name) for name in dir(init)}

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)
            raise KeyError("the model's own")

    with pytest.raises(KeyError, match="own"), deferred_init():
        Broken()
    assert active() is None
    assert {name: getattr(init, name) for name in dir(init)} == functions
    assert not nn.Linear(3, 3).weight.is_meta
    torch.manual_seed(1)
    drawn = torch.randn(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.randn(3))


def test_an_init_function_that_raises_inside_is_not_recorded_as_done() -> None:
    with deferred_init():
        weight = torch.ones(3)
        with pytest.raises(ValueError, match="Fan in and fan out"):
            init.xavier_uniform_(weight)
        after = nn.Parameter(weight)
    model = nn.Module()
    model.after = after
    materialize(model)
    assert model.after.tolist() == [1.0, 1.0, 1.0]


def test_the_random_stream_moves_on_over_a_block() -> None:
    torch.manual_seed(3)
    with deferred_init():
        nn.Linear(3, 3)
    drawn = torch.randn(4)
    torch.manual_seed(3)
    with deferred_init():
        nn.Linear(3, 3)
    assert torch.equal(drawn, torch.randn(4))
    torch.manual_seed(3)
    assert not torch.equal(drawn, torch.randn(4))


def test_a_block_inside_a_block_continues_the_outer_recording() -> None:
    with deferred_init(rng="eager"):
        outer = active()
        first = nn.Linear(3, 3)
        with deferred_init():
            assert active() is outer
            second = nn.Linear(3, 3)
        assert active() is outer
        third = nn.Linear(3, 3)
    tapes = {id(recorded(layer.weight).tape) for layer in (first, second, third)}  # type: ignore[union-attr]
    assert len(tapes) == 1


def test_a_model_made_in_two_blocks_fills_as_one() -> None:
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    eager[1].weight.data.copy_(eager[0].weight.data)
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        first = nn.Linear(3, 3)
    with deferred_init(rng="eager"):
        second = nn.Linear(3, 3)
        second.weight.data.copy_(first.weight.data)
    model = nn.Sequential(first, second)
    materialize(model)
    assert torch.equal(model[0].weight, eager[0].weight)
    assert torch.equal(model[1].weight, model[0].weight)


def test_recorded_tensors_answer_with_the_device_that_was_asked_for() -> None:
    with deferred_init():
        plain, cuda = torch.zeros(3), torch.zeros(3, device="cuda")
        layer = nn.Linear(3, 3, device="cuda:1")
        assert (plain.device.type, plain.is_meta, plain.is_cpu, plain.get_device()) == ("cpu", False, True, -1)
        assert (cuda.device.type, cuda.is_meta, cuda.is_cuda, cuda.is_cpu) == ("cuda", False, True, False)
        assert layer.weight.device == torch.device("cuda", 1)
        assert plain.to("cpu") is plain
        assert plain.to("cuda").device.type == "cuda"
        assert cuda.cpu().device.type == "cpu"
        assert torch.zeros_like(cuda).device.type == "cuda"
        assert (cuda + 1).device.type == "cuda"


def test_a_meta_tensor_that_was_asked_for_stays_on_meta() -> None:
    with deferred_init():
        asked = torch.zeros(3, device="meta")
        with torch.device("meta"):
            layer = nn.Linear(3, 3)
        assert asked.is_meta
        assert layer.weight.device.type == "meta"
    assert recorded(asked) is None


def test_a_model_recorded_for_cuda_can_be_filled_on_the_cpu() -> None:
    with deferred_init():
        model = nn.Linear(3, 3, device="cuda")
    materialize(model, device="cpu")
    assert model.weight.device.type == "cpu"
    assert float(model.weight.detach().abs().sum()) > 0


def test_arrays_that_left_torch_are_read_only() -> None:
    with deferred_init():
        array = torch.arange(3.0).numpy()
    assert array.tolist() == [0, 1, 2]
    assert not array.flags.writeable


def test_a_value_looked_at_is_the_value_filled_in() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(5))
            self.seen = self.a.tolist()
            self.b = nn.Parameter(torch.randn(5))
            self.first = self.b[0].item()

    for rng in ("eager", "per_op"):
        with deferred_init(rng=rng):  # type: ignore[arg-type]
            model = Model()
        materialize(model)
        assert model.a.tolist() == model.seen
        assert model.b[0].item() == model.first


def test_the_recording_goes_when_its_tensors_go() -> None:
    with deferred_init():
        model = nn.Linear(3, 3)
    tape = recorded(model.weight).tape  # type: ignore[union-attr]
    watched = [tape]
    del tape, model
    gc.collect()
    assert len(gc.get_referrers(watched[0])) <= 1  # the list here


class Filled(nn.Module):
    """Fills in place with numbers, tensors and keywords, of views and as itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 3))
        with torch.no_grad():
            self.weight.zero_()
            self.weight[1].fill_(2)
            self.weight[2].fill_(torch.tensor(3.5))
            self.weight[3].fill_(value=-1)
        self.bias = nn.Parameter(torch.empty(3))
        self.bias.data.fill_(True)
        self.register_buffer("steps", torch.empty(2, dtype=torch.int64).fill_(7.9))


def test_fills_in_place_are_recorded_without_the_dispatcher_and_have_their_values() -> None:
    eager = Filled().state_dict()
    with deferred_init():
        model = Filled()
    tape = recorded(model.weight).tape  # type: ignore[union-attr]
    lines = {op.source.line for op in tape.ops.values() if str(op.func).startswith(("aten.fill_", "aten.zero_"))}
    assert len(lines) == 6
    materialize(model)
    assert all(torch.equal(value, eager[name]) for name, value in model.state_dict().items())


def test_a_fill_that_autograd_refuses_is_refused_in_a_block() -> None:
    for fill in (lambda weight: weight.fill_(1), lambda weight: weight[0].zero_(), lambda weight: weight.zero_()):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            fill(nn.Parameter(torch.empty(2, 2)))
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"), deferred_init():
            fill(nn.Parameter(torch.empty(2, 2)))


class Sevens(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zero_.default:
            return torch.ops.aten.fill_.Scalar(args[0], 7.0)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_of_the_constructor_hears_of_fills_in_place() -> None:
    with deferred_init():
        model = nn.ParameterList([torch.empty(3)])
        with torch.no_grad(), Sevens():
            model[0].zero_()
    materialize(model)
    assert model[0].tolist() == [7.0, 7.0, 7.0]


def test_a_number_that_torch_refuses_is_refused_where_the_constructor_has_it() -> None:
    with pytest.raises(OverflowError), deferred_init():
        torch.empty(3).fill_(2**70)

"""The gradient of a net's first convolution: PyTorch's own, up to rounding, and only where it is sought alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from robustbench_lite.attacks import PGD
from robustbench_lite.core import convolutions
from robustbench_lite.core.convolutions import image_gradients
from robustbench_lite.core.threats import Lp

SHAPES = list(itertools.product(((1, 1), (3, 3), (4, 3)), (1, 2, (1, 3)), (0, (2, 1))))


class Taken:
    """Counts the convolutions that are taken over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, ours = 0, convolutions._Convolution.apply

        def counted(*args: Any) -> Any:
            self.count += 1
            return ours(*args)

        monkeypatch.setattr(convolutions._Convolution, "apply", counted)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """Take over small work too, and count."""
    monkeypatch.setattr(convolutions, "WORK", 1)
    return Taken(monkeypatch)


def frozen(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs).requires_grad_(False)


def images(channels: int = 3, count: int = 8) -> Tensor:
    return torch.rand(count, channels, 17, 14).requires_grad_()


def both(work: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a gradient within the context, and without it."""
    with image_gradients(x):
        (ours,) = torch.autograd.grad(work(x), x)
    (theirs,) = torch.autograd.grad(work(x), x)
    return ours, theirs


def near(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()) + 1e-7)


@pytest.mark.parametrize(("kernel", "stride", "padding"), SHAPES)
@pytest.mark.parametrize("values", [convolutions.VALUES, 20_000])  # 20,000: the batch is cut
def test_it_is_pytorchs_gradient(
    taken: Taken, monkeypatch: pytest.MonkeyPatch, kernel: Any, stride: Any, padding: Any, values: int
) -> None:
    monkeypatch.setattr(convolutions, "VALUES", values)
    net, x = frozen(3, 5, kernel, stride, padding), images()
    expected = net(x)
    with image_gradients(x):
        found = net(x)
    assert taken.count == 1
    assert torch.equal(found, expected)
    weights = torch.randn_like(expected)
    near(*(torch.autograd.grad(answer, x, weights)[0] for answer in (found, expected)))


@pytest.mark.parametrize("stride", [1, 2])
def test_it_takes_any_layout_and_can_be_differentiated_again(taken: Taken, stride: int) -> None:
    net = frozen(3, 4, 3, stride=stride, padding=1)
    x = torch.rand(1, 3, 9, 8).expand(8, -1, -1, -1).contiguous(memory_format=torch.channels_last).requires_grad_()

    def bent(x: Tensor) -> Tensor:
        slope = torch.autograd.grad(net(x).tanh().sum(), x, create_graph=True)[0]
        return slope.square().sum()

    near(*both(bent, x))
    assert taken.count == 1


@pytest.mark.parametrize("stride", [1, 2])
def test_a_branch_that_meets_no_image_stays_empty(taken: Taken, stride: int) -> None:
    net = frozen(3, 4, 3, stride=stride)
    near(*both(lambda x: net(x[:0]).sum() + net(x).sum(), images()))
    assert taken.count == 1


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (nn.Conv2d(3, 4, 3), images()),
        (frozen(3, 6, 3, groups=3), images()),
        (frozen(3, 4, 3, padding="same"), images()),
        (frozen(3, 4, 3, padding=(1,)), images()),
        (frozen(3, 4, 3, stride=(2,)), images()),
        (frozen(3, 4, 3, dilation=2), images()),
        (frozen(3, 4, 6), images()),  # as many shifts
        (frozen(8, 4, 3), images(8)),
        (frozen(3, 4, 3), images(count=7)),
        (frozen(3, 4, 3).double(), images().detach().double().requires_grad_()),
        (frozen(3, 4, 3).bfloat16(), images().detach().bfloat16().requires_grad_()),
        (frozen(3, 4, 3, dtype=torch.complex64), images().detach().to(torch.complex64).requires_grad_()),
        (frozen(17, 4, 3), torch.rand(17, 9, 9).requires_grad_()),
        (frozen(3, 4, 3).to("meta"), images().detach().to("meta").requires_grad_()),
        (frozen(3, 4, 3), images().detach()),
    ],
)
def test_the_rest_is_left_to_pytorch(taken: Taken, net: nn.Conv2d, x: Tensor) -> None:
    place = torch.zeros(1)
    with image_gradients(place):
        answer = net(x)
        if x.requires_grad:
            torch.autograd.grad(answer.abs().sum(), x)
    assert taken.count == 0


def test_a_bias_that_is_trained_gets_its_gradient(taken: Taken) -> None:
    net, x = frozen(3, 4, 3), images()
    assert net.bias is not None
    net.bias.requires_grad_(True)
    with image_gradients(x):
        net(x).sum().backward()
    assert taken.count == 0
    assert net.bias.grad is not None


def test_work_that_does_not_pay_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, net = Taken(monkeypatch), frozen(1, 4, 3)
    for count in (20, 40):  # 9 * 17 * 14 values each
        with image_gradients(torch.zeros(1)):
            net(images(1, count))
    assert taken.count == 1


def test_it_stands_aside_under_autocast(taken: Taken) -> None:
    net, x = frozen(3, 4, 3), images()
    with image_gradients(x), torch.autocast("cpu"):
        net(x)
    assert taken.count == 0


def test_compiled_nets_answer_as_they_do_elsewhere(taken: Taken) -> None:
    torch.compiler.reset()  # other tests of this process have compiled convolutions, and there is a limit
    net, whole, compiled = frozen(3, 4, 3), frozen(3, 4, 3), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    whole.compile(backend="eager", fullgraph=True)
    part = torch.compile(net, backend=backend, fullgraph=True)
    for work in (part, whole, torch.compile(lambda x: net(x), backend="eager")):
        near(*both(lambda x, work=work: work(x).square().sum(), images()))  # type: ignore[misc]
    before = len(compiled)
    for _ in range(3):
        near(*both(lambda x: part(x).square().sum(), images()))
    assert len(compiled) == before  # once within, and once without
    assert taken.count == 0


def test_the_function_is_pytorchs_again_whatever_happens(taken: Taken) -> None:
    net, x, plain = frozen(3, 4, 3), images(), functional.conv2d
    with pytest.raises(KeyError), image_gradients(x):
        with image_gradients(x):  # an attack within a model
            pass
        net(x)
        assert taken.count == 1
        raise KeyError
    assert functional.conv2d is plain
    first, second = ExitStack(), ExitStack()
    first.enter_context(image_gradients(x))
    second.enter_context(image_gradients(x))
    first.close()  # not the one that began last
    assert functional.conv2d is not plain
    second.close()
    assert functional.conv2d is plain
    net(x)
    assert taken.count == 1


def test_other_threads_and_questions_without_gradients_are_not_touched(taken: Taken) -> None:
    net, x = frozen(3, 4, 3), images()
    with image_gradients(x), ThreadPoolExecutor(1) as other:
        other.submit(net, x).result()
    assert taken.count == 0
    with torch.no_grad(), image_gradients(x), torch.enable_grad():  # a model that differentiates inside
        net(x)
    assert taken.count == 0


def test_many_threads_leave_the_function_as_it_was(taken: Taken) -> None:
    net, x, plain = frozen(3, 4, 3), images(), functional.conv2d

    def ask(_: int) -> Tensor:
        with image_gradients(x):
            found: Tensor = net(x)
        return found

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(200)))
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert taken.count == 200
    assert functional.conv2d is plain


class Shifting(nn.Conv2d):
    """Changes its geometry as it answers."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        self.dilation = (2, 2)
        found = super().forward(input)
        self.dilation = (1, 1)
        return found


def test_what_counts_is_the_call(taken: Taken) -> None:
    net, x = Shifting(3, 4, 3).requires_grad_(False), images()
    with image_gradients(x):
        found = net(x)
        functional.conv2d(x, net.weight, net.bias, (2, 1), (1, 0), (1, 1), 1)
    assert torch.equal(found, net(x))
    assert taken.count == 1


@pytest.mark.parametrize("geometry", [(2, 1, 1), ((2, 2), "valid", (1, 1)), (2, (1, 1), (1, 1))])
def test_calls_of_the_function_itself_are_answered(taken: Taken, geometry: tuple[Any, ...]) -> None:
    x, weight = images(), torch.rand(4, 3, 3, 3)
    near(*both(lambda x: functional.conv2d(x, weight, None, *geometry, 1).square().sum(), x))
    near(*both(lambda x: functional.conv2d(x, weight, stride=2, padding=1).square().sum(), x))
    assert taken.count == 0


class Doubling(Tensor):
    """A weight that has a convolution of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [arg.as_subclass(Tensor) if isinstance(arg, Doubling) else arg for arg in args]
        found = func(*plain, **(kwargs or {}))
        return 2 * found if func is torch.conv2d else found


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PyTorch's own rules for forward mode
def test_nets_that_transform_or_differentiate_inside_are_answered_as_before(taken: Taken) -> None:
    net, weight = frozen(3, 4, 3), torch.rand(4, 3, 3, 3)

    def mapped_slopes(x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda one: net(one.expand(8, -1, -1, -1)).square().sum()))(x).square().sum()

    def mapped_weights(x: Tensor) -> Tensor:
        kernels = x[:, :1, :1, :1].reshape(8, 1, 1, 1, 1) * weight
        return torch.vmap(lambda kernel: functional.conv2d(x, kernel, None, (1, 1), (0, 0), (1, 1), 1))(kernels).sum()

    def batched(x: Tensor) -> Tensor:
        few = torch.autograd.functional.jacobian(lambda x: net(x)[:, 0, 0, 0].square(), x, True, vectorize=True)
        assert isinstance(few, Tensor)
        return few.square().sum()

    def forward_mode(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        return found.square().sum() + x.square().sum()

    def checkpointed(x: Tensor) -> Tensor:
        found: Tensor = checkpoint(net, x, use_reentrant=False)
        return found.square().sum()

    def subclassed(x: Tensor) -> Tensor:
        return functional.conv2d(x, weight.as_subclass(Doubling), None, (1, 1), (0, 0), (1, 1), 1).square().sum()

    for work in (mapped_slopes, mapped_weights, batched, forward_mode, checkpointed, subclassed):
        near(*both(work, images()))


def test_attacks_use_it_and_leave_the_parameters_as_they_were(taken: Taken) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    x = torch.rand(8, 3, 8, 8)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    PGD(steps=3)(net, x, y, Lp("linf", 0.001), stop="never")
    assert taken.count == 3
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.usefixtures("taken")
def test_a_net_with_checkpoints_can_be_attacked() -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.LazyLinear(5)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(checkpoint(self.first, x, use_reentrant=False).relu().flatten(1))
            return found

    net, x = Saving().eval(), torch.rand(8, 3, 8, 8)
    with torch.no_grad():
        y = net(x).argmax(dim=1)
    assert int(PGD(steps=3)(net, x, y, Lp("linf", 0.001), stop="never").backwards.sum()) == 24

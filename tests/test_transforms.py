"""torch.func and gradients of gradients, for every activation of the registry; copies of modules."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.optim.swa_utils import AveragedModel

from polycom_ext import functional, reference
from polycom_ext.activations import REGISTRY, build
from polycom_ext.modules import PolyNorm
from polycom_ext.ops.polynomial import library

DEFINITIONS = {
    "polyrelu": reference.poly_relu,
    "polyprelu": reference.poly_prelu,
    "polynorm": reference.poly_norm,
    "polyrelunorm": reference.poly_relu_norm,
    **{name: getattr(reference, name) for name in ("mish", "hardswish", "prelu", "swish", "xielu")},
}
every_activation = pytest.mark.parametrize("name", REGISTRY)


@pytest.fixture(params=["fused", "eager"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if request.param == "eager":
        monkeypatch.setattr(library, "devices", frozenset())
        monkeypatch.setattr(library, "problem", "")
    elif "cpu" not in library.devices:
        pytest.skip(f"the fused operations are not there: {library.problem}")


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.randn_like(p.detach()) for name, p in module.named_parameters()}


def exact(name: str, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """The definition in float64; torch's own activations in float64 are theirs."""
    wide = {key: value.double() for key, value in parameters.items()}
    if name in DEFINITIONS:
        return DEFINITIONS[name](x.double(), *wide.values())
    return build(name)(x.double())


def close(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert float((actual.double() - expected).norm()) <= 2e-5 * float(expected.norm()) + 1e-12


@every_activation
def test_transforms_are_those_of_the_definition(name: str) -> None:
    module = build(name)
    own = parameters(module)
    x, tangent = torch.randn(5, 12), torch.randn(5, 12)

    def here(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, own, (x,))

    def there(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return exact(name, own, x)

    wide = {key: value.double() for key, value in own.items()}

    def compare(transform: object) -> None:
        actual, expected = transform(here, own, x), transform(there, wide, x.double())  # type: ignore[operator]
        flat = [torch.utils._pytree.tree_leaves(found) for found in (actual, expected)]
        assert len(flat[0]) == len(flat[1]) > 0
        for one, other in zip(*flat, strict=True):
            close(one, other)

    compare(lambda f, own, x: grad(lambda own, x: f(own, x).sin().sum(), argnums=(0, 1))(own, x))
    compare(lambda f, own, x: vmap(f, in_dims=(None, 0))(own, x))
    compare(
        lambda f, own, x: vmap(grad(lambda own, x: f(own, x).sin().sum(), argnums=1), in_dims=(None, 0))(
            own, x
        )
    )
    compare(lambda f, own, x: jvp(lambda x: f(own, x), (x,), (tangent.to(x.dtype),)))
    compare(lambda f, own, x: jacrev(f, argnums=(0, 1))(own, x[0]))
    compare(lambda f, own, x: vjp(lambda x: f(own, x), x)[1](f(own, x)))
    compare(lambda f, own, x: hessian(lambda x: f(own, x).sin().sum())(x[0]))


@every_activation
def test_gradients_of_gradients_are_those_of_the_definition(name: str) -> None:
    module = build(name)
    own = parameters(module)
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = {key: value.to(dtype).requires_grad_() for key, value in own.items()}
        x = torch.linspace(-2, 3, 60).reshape(5, 12).to(dtype).requires_grad_()
        y = functional_call(module, inputs, (x,)) if dtype == torch.float32 else exact(name, inputs, x)
        first = torch.autograd.grad(y.sin().sum(), [x, *inputs.values()], create_graph=True)
        total = sum(one.square().sum() for one in first)
        assert isinstance(total, Tensor)
        second = torch.autograd.grad(total, [x, *inputs.values()], allow_unused=True, materialize_grads=True)
        found.append([*first, *second])
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("function", [functional.poly_norm, functional.poly_relu])
def test_gradients_of_gradients_of_the_variants(function: object) -> None:
    x, weight, bias = torch.randn(7, 12), torch.randn(2, 3), torch.randn(2, 1)
    more = {"pre_bias": torch.randn(2, 12), "row_scale": torch.rand(7)}
    offsets = torch.tensor([3, 6])

    def call(*inputs: Tensor) -> Tensor:
        x, weight, bias, pre_bias, row_scale = inputs
        return function(x, weight, bias, pre_bias=pre_bias, row_scale=row_scale, offsets=offsets)  # type: ignore[operator]

    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in (x, weight, bias, *more.values())]
        first = torch.autograd.grad(call(*inputs).sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), inputs)  # type: ignore[arg-type]
        found.append([*first, *second])
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def test_a_linear_layer_behind() -> None:
    inputs = [torch.randn(5, 12), torch.randn(3), torch.randn(1), torch.randn(4, 12), torch.randn(4)]

    def apart(*inputs: Tensor) -> Tensor:
        x, weight, bias, *linear = inputs
        return nn.functional.linear(reference.poly_norm(x, weight, bias), *linear)

    wide = [tensor.double() for tensor in inputs]
    every = tuple(range(5))
    for one, other in zip(
        grad(lambda *inputs: functional.poly_norm_linear(*inputs).sin().sum(), argnums=every)(*inputs),
        grad(lambda *inputs: apart(*inputs).sin().sum(), argnums=every)(*wide),
        strict=True,
    ):
        close(one, other)
    found = []
    both: tuple[Callable[..., Tensor], ...] = (functional.poly_norm_linear, apart)
    for function, tensors in zip(both, (inputs, wide), strict=True):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), leaves)  # type: ignore[arg-type]
        found.append([*first, *second])
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_large_values_do_not_overflow_under_transforms() -> None:
    x, weight, bias = torch.randn(3, 16) * 1e18, torch.randn(3), torch.randn(1)
    actual = vmap(lambda x: functional.poly_norm(x, weight, bias))(x)
    close(actual, reference.poly_norm(x, weight, bias))
    assert jacrev(lambda x: functional.poly_norm(x, weight, bias))(x[0]).isfinite().all()


GROUPS = """
import copy, io, sys
import torch, torch.distributed as dist
from torch.optim.swa_utils import AveragedModel
from polycom_ext import PolyNorm

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
group = dist.group.WORLD
module = torch.nn.Sequential(torch.nn.Linear(4, 8), PolyNorm(group=group))
x = torch.randn(3, 4)
for twin in (copy.deepcopy(module), AveragedModel(module).module, copy.copy(module)):
    assert twin[1].group is group
    assert torch.equal(twin(x), module(x))
assert copy.copy(module[1]).group is group
assert copy.deepcopy(module)[1].weight is not module[1].weight
file = io.BytesIO()
torch.save(module, file)
file.seek(0)
loaded = torch.load(file, weights_only=False)
assert loaded[1].group is None and module[1].group is group
assert torch.equal(loaded(x), module(x))
dist.destroy_process_group()
"""


def test_a_module_with_a_group_can_be_copied_averaged_and_saved(tmp_path: object) -> None:
    command = [sys.executable, "-c", GROUPS, f"{tmp_path}/store"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_module_without_a_group_is_copied_as_any_other() -> None:
    module = PolyNorm()
    module.register_forward_hook(lambda module, args, output: output + 1)
    twin = copy.deepcopy(nn.ModuleList([module, module]))
    assert twin[0] is twin[1] is not module
    assert torch.equal(twin[0](torch.ones(2, 4)), module(torch.ones(2, 4)))
    assert AveragedModel(module).module.weight is not module.weight
    file = io.BytesIO()
    torch.save(PolyNorm(), file)


def test_rows_that_are_sharded_are_refused_in_one_sentence() -> None:
    class Two:
        def size(self) -> int:
            return 2

    x, weight, bias = torch.randn(3, 8), torch.randn(3), torch.randn(1)
    with pytest.raises(NotImplementedError, match="sharded over a process group"):
        grad(lambda x: functional.poly_norm(x, weight, bias, group=Two()).sum())(x)  # type: ignore[arg-type]

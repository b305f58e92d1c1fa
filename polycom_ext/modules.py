"""The activations as modules; activations.py names them, functional.py has the formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from polycom_ext import functional
from polycom_ext.activations import DEFAULT_ORDER
from polycom_ext.functional import Variants
from polycom_ext.ops.polynomial.inputs import Inputs, Rho

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


class Learnable(nn.Module):
    """Base of the activations with parameters: one-dimensional, and shared by the whole width.

    A subclass names its scalars and where they start in `scalars`; `vectors`, name -> (length, start), come
    before them. `group` is the process group over which the width is sharded.

    A copy, shallow or deep, shares the process group. A pickled module (torch.save of it, not of its state)
    has none: who loads it sets `group` again where rows are sharded.
    """

    scalars: ClassVar[Mapping[str, float]] = {}
    constants: ClassVar[tuple[str, ...]] = ()
    """Attributes that fix the function besides its parameters."""
    takes_variants: ClassVar[bool] = False
    """`forward` takes the variants of functional.py, pre_bias, row_scale and offsets, by name."""
    titles: ClassVar[Mapping[str, str]] = {}
    """Parameter -> as it is written on paper, where that is not its name."""
    note: ClassVar[str] = ""
    """What a reader of `coefficients` must know, as a sentence."""

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        vectors: Mapping[str, tuple[int, float]] | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        sized = {**(vectors or {}), **{name: (1, start) for name, start in self.scalars.items()}}
        self._starts = {name: start for name, (_, start) in sized.items()}
        for name, (length, _) in sized.items():
            self.register_parameter(name, nn.Parameter(torch.empty(length, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every parameter as at the start of training."""
        for name, start in self._starts.items():
            nn.init.constant_(self.get_parameter(name), start)

    def coefficients(self) -> dict[str, float]:
        """What has been learned, under the names that the formula has on paper."""
        return {self.titles.get(name, name): p.item() for name, p in self.named_parameters()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}

    def __copy__(self) -> Learnable:
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Learnable:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        state = {key: value for key, value in self.__dict__.items() if key != "group"}
        twin.__dict__.update(copy.deepcopy(state, memo), group=self.group)
        return twin


class _Polynomial(Learnable):
    """Holds `weight` (order,), descending powers, and `bias` (1,).

    They start as 1/order and 0, as in the paper (section 4.1).
    """

    rho: ClassVar[Rho] = Rho.IDENTITY
    normalize: ClassVar[bool] = True
    weight: nn.Parameter
    bias: nn.Parameter
    scalars: ClassVar = {"bias": 0.0}
    note = "aᵢ multiplies the i-th power, a₀ is the constant."

    def __init__(
        self,
        order: int = DEFAULT_ORDER,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        super().__init__(group=group, device=device, dtype=dtype, vectors={"weight": (order, 1.0 / order)})
        self.order = order

    def coefficients(self) -> dict[str, float]:
        """a₀ … a_r, and what else there is: a_i = weight[r - i]."""
        powers = enumerate([*self.bias.tolist(), *reversed(self.weight.tolist())])
        named = {f"a{power}".translate(_SUBSCRIPTS): value for power, value in powers}
        rest = {name: p.item() for name, p in self.named_parameters() if name not in ("weight", "bias")}
        return named | {self.titles.get(name, name): value for name, value in rest.items()}

    def _of_all_experts(self, variants: Variants) -> tuple[Tensor, Tensor]:
        """Weight and bias as functional.py takes them; where rows are grouped by expert, one set for all."""
        offsets = variants.get("offsets")
        if offsets is None:
            return self.weight, self.bias
        return self.weight.expand(len(offsets), -1), self.bias.expand(len(offsets), -1)

    def inputs(self, x: Tensor, **variants: Unpack[Variants]) -> Inputs:
        """What `forward` computes, if it `takes_variants`: for who differentiates it himself."""
        weight, bias = self._of_all_experts(variants)
        options = {name: getattr(self, name) for name in ("rho", "normalize", *self.constants)}
        return Inputs(x, weight, bias, **options, **variants)

    def extra_repr(self) -> str:
        return f"order={self.order}"


class PolyReLU(_Polynomial):
    """sum_i a_i ReLU(x)^i + a_0; see `functional.poly_relu`."""

    rho, normalize = Rho.RELU, False
    takes_variants = True

    def forward(self, x: Tensor, **variants: Unpack[Variants]) -> Tensor:
        weight, bias = self._of_all_experts(variants)
        return functional.poly_relu(x, weight, bias, group=self.group, **variants)


class PolyPReLU(_Polynomial):
    """sum_i a_i PReLU(x)^i + a_0, the slope learnable, 0.25 at the start; see `functional.poly_prelu`."""

    rho, normalize = Rho.PRELU, False
    slope: nn.Parameter
    scalars: ClassVar = {"bias": 0.0, "slope": 0.25}
    titles: ClassVar = {"slope": "negative slope"}

    def forward(self, x: Tensor) -> Tensor:
        return functional.poly_prelu(x, self.weight, self.bias, self.slope, group=self.group)


class PolyNorm(_Polynomial):
    """sum_i a_i x^i / rms(x^i) + a_0 over the last dimension; see `functional.poly_norm`."""

    eps = 1e-6
    constants = ("eps",)
    takes_variants = True

    def forward(self, x: Tensor, **variants: Unpack[Variants]) -> Tensor:
        weight, bias = self._of_all_experts(variants)
        return functional.poly_norm(x, weight, bias, self.eps, group=self.group, **variants)


class PolyReLUNorm(_Polynomial):
    """PolyNorm of ReLU(x); see `functional.poly_relu_norm`."""

    rho = Rho.RELU
    eps = 1e-6
    constants = ("eps",)
    takes_variants = True

    def forward(self, x: Tensor, **variants: Unpack[Variants]) -> Tensor:
        weight, bias = self._of_all_experts(variants)
        return functional.poly_relu_norm(x, weight, bias, self.eps, group=self.group, **variants)


class SquaredReLU(nn.Module):
    """ReLU(x)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x).square()


class SwiGLU(nn.Module):
    """SiLU(x_1) * x_2, where x = [x_1, x_2] are the halves of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * value


class PReLU(Learnable):
    """x for x > 0, slope * x elsewhere; one slope, 0.25 at the start; see `functional.prelu`."""

    slope: nn.Parameter
    scalars: ClassVar = {"slope": 0.25}
    titles: ClassVar = {"slope": "negative slope"}

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(x, self.slope, group=self.group)


class Swish(Learnable):
    """x sigmoid(beta x), beta 1 at the start; see `functional.swish`."""

    beta: nn.Parameter
    scalars: ClassVar = {"beta": 1.0}
    titles: ClassVar = {"beta": "β"}

    def forward(self, x: Tensor) -> Tensor:
        return functional.swish(x, self.beta, group=self.group)


class XIELU(Learnable):
    """xIELU with alpha_p and alpha_n 0.8 at the start, as in the paper; see `functional.xielu`.

    The parameters are kept before the softplus, in the layout of Apertus.
    """

    alpha_p: nn.Parameter
    alpha_n: nn.Parameter
    beta, eps = 0.5, -1e-6
    constants = ("beta", "eps")
    scalars: ClassVar = {"alpha_p": math.log(math.expm1(0.8)), "alpha_n": math.log(math.expm1(0.8 - beta))}
    note = "αₚ and αₙ are shown as they enter the formula."

    def forward(self, x: Tensor) -> Tensor:
        return functional.xielu(x, self.alpha_p, self.alpha_n, self.beta, self.eps, group=self.group)

    def coefficients(self) -> dict[str, float]:
        alpha_p, alpha_n = nn.functional.softplus(torch.cat((self.alpha_p, self.alpha_n))).tolist()
        return {"αₚ": alpha_p, "αₙ": self.beta + alpha_n}


class Elementwise(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.function.__name__


def coefficients(module: nn.Module) -> dict[str, float]:
    """What any activation has learned: its own `coefficients()`, else its parameters' values by name."""
    if isinstance(module, Learnable):
        return module.coefficients()
    return {
        name if parameter.numel() == 1 else f"{name}[{index}]": value
        for name, parameter in module.named_parameters()
        for index, value in enumerate(parameter.tolist())
    }

"""The activations of a PolyCom model in plain torch, as they are saved beside its weights.

The formulas are those of polycom_ext.functional, and so are the names and shapes of the parameters. Where
polycom_ext is installed, its fused operations compute the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

try:
    from polycom_ext import activations as registry
except ImportError:
    registry = None  # type: ignore[assignment]


class _Scalars(nn.Module):
    """Holds one-dimensional parameters; forms its function in float32, float64 for float64."""

    def __init__(self, constants: dict[str, Any], **starts: list[float]) -> None:
        super().__init__()
        self.constants = constants
        self._starts = starts
        for name, values in starts.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(values)))

    def reset_parameters(self) -> None:
        """Every parameter as at the start of training."""
        for name, values in self._starts.items():
            for index, value in enumerate(values):
                nn.init.constant_(self.get_parameter(name)[index : index + 1], value)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        parameters = {name: parameter.to(wide) for name, parameter in self.named_parameters()}
        return self.formula(x.to(wide), **parameters).to(x.dtype)

    def formula(self, u: Tensor, **parameters: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.constants.items())


class _Polynomial(_Scalars):
    """sum_i weight[r - i] p_i + bias, where p_i is the i-th power, or that power over its rms in a row."""

    rectifies, normalizes = False, True

    def __init__(self, constants: dict[str, Any], **more: list[float]) -> None:
        order = constants["order"]
        super().__init__(constants, weight=[1.0 / order] * order, bias=[0.0], **more)

    def formula(self, u: Tensor, **parameters: Tensor) -> Tensor:
        weight, bias = parameters["weight"], parameters["bias"]
        u = self.rectified(u, parameters) if self.rectifies else u
        result = bias.expand_as(u)
        for power in range(1, self.constants["order"] + 1):
            term = self.normalized(u, power) if self.normalizes else u**power
            result = result + weight[-power] * term
        return result

    def rectified(self, u: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return u.clamp(min=0)

    def normalized(self, u: Tensor, power: int) -> Tensor:
        """u^i / sqrt(mean(u^2i) + eps); both divided by the largest of the row, so that neither overflows."""
        largest = u.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1)
        scaled = (u / largest) ** power
        eps = self.constants["eps"] / largest**power / largest**power
        return scaled * torch.rsqrt(scaled.square().mean(dim=-1, keepdim=True) + eps)


class PolyNorm(_Polynomial):
    """sum_i a_i x^i / rms(x^i) + a_0."""


class PolyReLUNorm(_Polynomial):
    """PolyNorm of ReLU(x)."""

    rectifies = True


class PolyReLU(_Polynomial):
    """sum_i a_i ReLU(x)^i + a_0."""

    rectifies, normalizes = True, False


class PolyPReLU(PolyReLU):
    """sum_i a_i PReLU(x)^i + a_0."""

    def __init__(self, constants: dict[str, Any]) -> None:
        super().__init__(constants, slope=[0.25])

    def rectified(self, u: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return torch.where(u > 0, u, parameters["slope"] * u)


class PReLU(_Scalars):
    """x for x > 0, slope * x elsewhere."""

    def __init__(self, constants: dict[str, Any]) -> None:
        super().__init__(constants, slope=[0.25])

    def formula(self, u: Tensor, **parameters: Tensor) -> Tensor:
        return torch.where(u > 0, u, parameters["slope"] * u)


class Swish(_Scalars):
    """x sigmoid(beta x)."""

    def __init__(self, constants: dict[str, Any]) -> None:
        super().__init__(constants, beta=[1.0])

    def formula(self, u: Tensor, **parameters: Tensor) -> Tensor:
        return u * torch.sigmoid(parameters["beta"] * u)


class XIELU(_Scalars):
    """softplus(alpha_p) x^2 + beta x for x > 0, else (beta + softplus(alpha_n)) (e^x - 1 - x) + beta x."""

    def __init__(self, constants: dict[str, Any]) -> None:
        at_start = {"alpha_p": 0.8, "alpha_n": 0.8 - constants["beta"]}
        super().__init__(constants, **{name: [math.log(math.expm1(a))] for name, a in at_start.items()})

    def formula(self, u: Tensor, **parameters: Tensor) -> Tensor:
        beta, eps = self.constants["beta"], self.constants["eps"]
        alpha_p, alpha_n = (nn.functional.softplus(parameters[name]) for name in ("alpha_p", "alpha_n"))
        negative = (beta + alpha_n) * (torch.expm1(u.clamp(max=eps)) - u.clamp(max=0))
        return torch.where(u > 0, alpha_p * u.relu() * u.relu(), negative) + beta * u


class SquaredReLU(nn.Module):
    """ReLU(x)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class HardSwish(nn.Module):
    """x min(max(x + 3, 0), 6) / 6."""

    def forward(self, x: Tensor) -> Tensor:
        return x * ((x + 3).clamp(0, 6) / 6)


class SwiGLU(nn.Module):
    """SiLU(x_1) * x_2, where x = [x_1, x_2] are the halves of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * value


LEARNABLE: dict[str, type[_Scalars]] = {
    "polyrelu": PolyReLU,
    "polyprelu": PolyPReLU,
    "polynorm": PolyNorm,
    "polyrelunorm": PolyReLUNorm,
    "prelu": PReLU,
    "swish": Swish,
    "xielu": XIELU,
}
FIXED: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu2": SquaredReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": HardSwish,
    "swiglu": SwiGLU,
}


def build(activation: dict[str, Any], width: int, hidden: int) -> nn.Module:
    """The activation that a configuration describes, fused where polycom_ext is installed.

    Args:
        width: of its result.
        hidden: width of the model.

    Raises ValueError for one that is known neither here nor there, or lacks a constant.
    """
    constants = {key: value for key, value in activation.items() if key not in ("name", "gated")}
    try:
        if registry is not None:
            return _fused(activation["name"], constants, width, hidden)
        if activation["name"] in FIXED:
            return FIXED[activation["name"]]()
        return LEARNABLE[activation["name"]](constants)
    except KeyError as error:
        if error.args == (activation["name"],):
            raise ValueError(
                f"the activation {activation['name']!r} is not among {', '.join([*LEARNABLE, *FIXED])}; "
                "polycom_ext, or the package that adds it, must be installed"
            ) from None
        raise ValueError(f"the activation {activation['name']!r} has no {error} in config.json") from None


def _fused(name: str, constants: dict[str, Any], width: int, hidden: int) -> nn.Module:
    entry, _ = registry.parse(name)
    order = f"-{constants['order']}" if entry.ordered else ""
    module = registry.build(name + order, width=width, hidden=hidden)
    for constant in getattr(module, "constants", ()):
        setattr(module, constant, constants[constant])
    return module


def reset(module: nn.Module) -> bool:
    """Give an activation its parameters of the start; whether the module is one that has some."""
    ours: tuple[type[nn.Module], ...] = (_Scalars,)
    if registry is not None:
        from polycom_ext.modules import Learnable

        ours = (*ours, Learnable)
    if not isinstance(module, ours):
        return False
    begin: Any = module.reset_parameters
    begin()
    return True

"""Two activations of one's own: a formula, and a module that learns."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from polycom_ext.activations import Activation
from polycom_ext.modules import Learnable
from polycom_ext.ops.elementwise import elementwise

LISHT = Activation("lisht", "LiSHT", "own_activation:lisht")


def lisht(x: Tensor) -> Tensor:
    """x tanh(x) (Roy et al., 2019)."""
    return x * torch.tanh(x)


ELU = Activation("elu", "ELU-α", "own_activation:ParametricELU", learnable=True)


class ParametricELU(Learnable):
    """x for x > 0 and alpha (e^x - 1) elsewhere (Clevert et al., 2016), with a learnable alpha."""

    alpha: nn.Parameter
    scalars: ClassVar = {"alpha": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        def formula(u: Tensor, alpha: Tensor) -> Tensor:
            return torch.where(u > 0, u, alpha * torch.expm1(u.clamp(max=0)))

        return elementwise(formula, x, self.alpha, group=self.group)

"""The activation that a checkpoint was trained with, and the refusal to load it into another.

Coefficients of different activations may have the same names and shapes, and Megatron's loading passes over
keys that it does not expect; so the arguments in the checkpoint are compared with those of the run.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from polycom_ext.activations import parse
from polycom_ext.errors import PolycomError
from polycom_ext.integrations.megatron.native import FLAGS

OVERRIDE = "polycom_allow_other_activation"


@dataclass(frozen=True)
class Function:
    """An activation up to what it learns."""

    name: str
    constants: dict[str, Any]

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {value}" for name, value in self.constants.items())
        return f"{self.name} ({listed})" if listed else self.name


def constants(activation: str) -> dict[str, Any]:
    """What fixes the function that NAME or NAME-ORDER stands for, besides its coefficients."""
    entry, order = parse(activation)
    target = entry.load()
    fixed = {name: getattr(target, name) for name in getattr(target, "constants", ())}
    return {"order": order, **fixed} if entry.ordered else fixed


def trained_function(args: Namespace) -> Function:
    named = getattr(args, "polycom_activation", None)
    if named is not None:
        saved = getattr(args, "polycom_constants", None)
        return Function(parse(named)[0].name, constants(named) if saved is None else saved)
    for name, flags in FLAGS.items():
        if flags and all(
            getattr(args, flag.replace("-", "_"), None) == value for flag, value in flags.items()
        ):
            return Function(name, {})
    return Function("quick_geglu" if getattr(args, "quick_geglu", False) else "gelu", {})


def check_activation(args: Namespace, checkpoint_args: Namespace | None) -> None:
    """Raise PolycomError if the checkpoint's activation is another than the run's.

    Called by the patched `load_checkpoint` where either is one of PolyCom's; Megatron's own among themselves
    are left to Megatron, and a checkpoint without arguments does not tell. `--polycom-allow-other-activation`
    lets anything pass.
    """
    if checkpoint_args is None or getattr(args, OVERRIDE, False):
        return
    ours, theirs = trained_function(args), trained_function(checkpoint_args)
    if ours != theirs:
        raise PolycomError(
            f"the checkpoint's activation is {theirs}, the arguments ask for {ours}: name the checkpoint's, "
            f"or pass --{OVERRIDE.replace('_', '-')} to go on from it with another"
        )

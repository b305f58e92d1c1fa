"""OLMo's Trainer, cancelled by who tells this process to stop, as upstream does at its time limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from olmo.train import Trainer

from polycom_ext.runs import entry


class StoppingTrainer(Trainer):
    """OLMo's Trainer; once `hear_stop` was called, all ranks save and end after the step of a stop."""

    _stopped: Callable[[], bool] | None = None
    _group: dist.ProcessGroup | None = None
    _check_interval: int | None = None
    """The configuration's, while a stop has this very step checked."""

    def hear_stop(self) -> None:
        """Called on all ranks: they agree by the CPU, so that none waits every step for its GPU."""
        if dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        self._stopped = entry.hear_stop()

    def train_step(self, batch: dict[str, Any], reduce_global_loss: bool = True) -> dict[str, float]:
        metrics: dict[str, float] = super().train_step(batch, reduce_global_loss)
        if self._stopped is not None:
            flag = torch.tensor(self._stopped(), dtype=torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MAX, self._group)
            if flag:
                self._check_interval, self.cfg.canceled_check_interval = self.cfg.canceled_check_interval, 1
        return metrics

    def check_if_cancelled(self) -> tuple[bool, int]:
        """Whether to save and end, and how many steps after."""
        if self._check_interval is None:
            cancelled: tuple[bool, int] = super().check_if_cancelled()
            return cancelled
        self.cfg.canceled_check_interval = self._check_interval  # as the checkpoint will have it
        return True, 0

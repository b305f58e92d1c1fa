"""How well a run uses its devices: tokens a second, the share of the devices' peak (MFU), memory.

A trainer's entry measures on its own ranks, as only these know the device for certain, and the record keeps
the values by step; what they were reckoned from stands in efficiency.json.
"""

from __future__ import annotations

import json
import resource
from dataclasses import asdict, dataclass

from polycom_ext.errors import PolycomError
from polycom_ext.files import write_text
from polycom_ext.machine.peaks import peak_flops
from polycom_ext.runs import record

CPU = "CPU"


def model_flops(weights: float, layers: int, attention_width: int, sequence: int) -> float:
    """Floating-point operations that training needs for a token, whatever is computed twice to save memory.

    6 weights + 6 layers · attention_width · sequence: two for each multiply-add of a product of matrices,
    forward once, backward twice. Of attention only what lies under the causal mask counts: half of the
    12 · layers · heads · head size · sequence of the PaLM paper (arXiv 2204.02311, appendix B). So reckons
    Megatron-LM, too (`num_floating_point_operations`). Norms, activations, softmax, router: not counted.

    Args:
        weights: of the matrices that a token is multiplied with: attention, FFN (of experts those that are
            chosen for it, and shared ones), output layer; no embedding that is looked up.
        attention_width: heads · head size, of the queries.
    """
    return 6.0 * (weights + layers * attention_width * sequence)


@dataclass(frozen=True)
class Efficiency:
    """What MFU is reckoned from, as efficiency.json holds it."""

    device: str
    """The driver's name of a GPU, or CPU."""
    devices: int
    flops_per_token: float
    """`model_flops`"""
    peak_flops: float | None
    """FLOP/s of one device in dense bfloat16, whatever the run computes in; None where none is known."""

    @classmethod
    def here(cls, flops_per_token: float) -> Efficiency:
        """On the device of this rank, of which every rank has one."""
        import torch

        devices = torch.distributed.get_world_size()
        if not torch.cuda.is_available():
            return cls(CPU, devices, flops_per_token, None)
        name = torch.cuda.get_device_name()
        return cls(name, devices, flops_per_token, peak_flops(name))

    def metrics(self, tokens_per_second: float) -> dict[str, float]:
        """The record's values of a step that was so fast."""
        values = {record.TOKENS_PER_SECOND: tokens_per_second}
        if self.peak_flops is not None:
            peak = self.peak_flops * self.devices
            values[record.MFU] = self.flops_per_token * tokens_per_second / peak
        return values

    def explained(self) -> str:
        """What MFU is a share of, or why there is none."""
        if self.peak_flops is None:
            return f"no MFU: no peak is known of {self.device}"
        return f"of {self.devices} · {self.peak_flops / 1e12:.0f} TFLOP/s, {self.device} in dense bfloat16"

    def write(self, run: record.Record) -> None:
        write_text(run.efficiency, json.dumps(asdict(self), indent=2) + "\n")


def read(run: record.Record) -> Efficiency | None:
    """What a run's trainer has noted; None where it has not. Raises PolycomError if it cannot be read."""
    noted = run.read_efficiency()
    if noted is None:
        return None
    try:
        return Efficiency(**noted)
    except TypeError:
        raise PolycomError(f"{run.efficiency} cannot be read as what a run's MFU is reckoned from") from None


def peak_memory() -> float:
    """Bytes that the rank with the most has held at once: called on all ranks.

    What torch has allocated on a GPU; all that the process has in memory on a CPU.
    """
    import torch

    if torch.cuda.is_available():
        peak = torch.tensor(torch.cuda.max_memory_allocated(), dtype=torch.float64, device="cuda")
    else:
        peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, dtype=torch.float64)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    return float(peak)

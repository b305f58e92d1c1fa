"""The adapter of a trainer small enough to start in a second: real processes under the real launcher.

It is somebody else's package, and the example of docs/adding-an-upstream.md. It keeps the contracts of a run
directory: a line of metrics and a checkpoint a step, and exit status 2 with a sentence for what it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polycom_ext.activations import parse
from polycom_ext.errors import PolycomError
from polycom_ext.runs import shrinking
from polycom_ext.runs.adapter import Facts, Needs, StandIn, Upstream
from polycom_ext.runs.spec import Spec


class ToyAdapter:
    name = section = "toy"
    seed = ""
    upstreams: Mapping[str, Upstream] = {}
    token_format = "toy"

    def needs_patches(self, spec: Spec) -> bool:
        return False

    def validate(self, spec: Spec) -> None:
        if "steps" not in spec.options:
            raise PolycomError(f"{spec.name}: toy.steps is missing")

    def check_inputs(self, spec: Spec) -> None:
        needed = spec.options.get("needs")
        if needed and not Path(needed).exists():
            raise PolycomError(f"{spec.name}: toy.needs: {needed} not found")

    def needs(self, spec: Spec) -> Needs:
        return Needs(
            gpu=spec.options.get("only-on-gpus", ""),
            modules=dict.fromkeys(spec.options.get("imports", ()), "toy.imports names it"),
        )

    def arguments(self, spec: Spec, run_dir: Path) -> list[str]:
        options = [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in spec.options.items()
            if name not in ("needs", "note")
        ]
        return [str(Path(__file__).with_name("toy_worker.py")), f"--run-dir={run_dir}", *options]

    def environment(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        return {"TOY": "1", "OMP_NUM_THREADS": "1"}

    def files(self, spec: Spec, run_dir: Path) -> dict[str, str]:
        return {"toy.txt": spec.options["note"]} if "note" in spec.options else {}

    def model(self, spec: Spec) -> dict[str, Any]:
        return {"activation": spec.activation, "toy.size": spec.options.get("size")}

    def facts(self, spec: Spec) -> Facts:
        return Facts(None, None, None, 0, None, None, None, None, data=())

    def total_steps(self, spec: Spec) -> int | None:
        return int(spec.options["steps"])

    def latest_step(self, spec: Spec, run_dir: Path) -> int | None:
        path = run_dir / "checkpoints" / "step"
        return int(path.read_text()) if path.exists() else None

    def checkpoints(self, spec: Spec, run_dir: Path) -> list[tuple[int, Path]]:
        return []

    def prepare_resume(self, spec: Spec, run_dir: Path) -> list[str]:
        return []

    def is_complete(self, spec: Spec, run_dir: Path) -> bool:
        return (self.latest_step(spec, run_dir) or 0) >= int(spec.options["steps"])

    def coefficients(self, spec: Spec, run_dir: Path) -> dict[str, Any] | None:
        """As if the trained module were still as it was made."""
        _, order = parse(spec.activation)
        if order is None:
            return None
        if spec.options.get("size") == 13:
            raise ValueError("no coefficients can be\nread from size 13")
        return {
            "step": self.total_steps(spec),
            "activation": spec.activation,
            "layers": [{"weight": [1.0] * order}],
        }

    def rehearsal(self, spec: Spec, data: StandIn, on_gpus: bool) -> dict[str, Any]:
        copies = shrinking.replicas(spec.world_size)
        changes = {"nodes": 1, "processes_per_node": copies, "toy.steps": shrinking.STEPS}
        if "size" in spec.options:
            changes["toy.size"] = copies * 8
        return changes

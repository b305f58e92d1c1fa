"""A shorthand for a tiny training run on the real patched Megatron, from one forking process."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from polycom_ext import upstream
from polycom_ext.upstream import fetch, pins

from ..zygotes.forked_ranks import Zygote

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}

CPU_OPTIONS = """
    --transformer-impl local --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
    --untie-embeddings-and-output-weights --no-masked-softmax-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
    --distributed-backend gloo --use-cpu-initialization --num-workers 0
    --attention-dropout 0 --hidden-dropout 0
""".split()

BIASES = "--no-disable-bias-linear"
"""Takes --disable-bias-linear away, for which upstream has no option."""

TINY = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --seed 7
    --lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --weight-decay 0.1
    --eval-iters 0 --eval-interval 100 --log-interval 1 --dist-ckpt-strictness raise_all
    --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 2 --mock-data
""".split()


@dataclass
class Run:
    """What a run left."""

    statuses: list[int]
    log: str
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def series(self, name: str) -> dict[int, float]:
        """One metric by step."""
        return {step: values[name] for step, values in self.metrics.items() if name in values}


class Trainer:
    """Runs the training entry in forked ranks of one process that has imported it."""

    def __init__(self, tree: Path, folder: Path, environment: dict[str, str] | None = None) -> None:
        self._folder = folder
        self._count = 0
        self.log = folder
        """What the run says that has begun last."""
        environment = {**ENVIRONMENT, **(environment or {})}
        self._zygote = Zygote(Path(__file__).with_name("zygote.py"), [tree, ROOT], environment)

    def __call__(
        self,
        *options: str,
        processes: int = 1,
        iterations: int = 5,
        kill_when: str | None = None,
        stop_when: str | None = None,
    ) -> Run:
        """Train; options are Megatron's, after the tiny model's and the CPU's."""
        arguments = [*CPU_OPTIONS, *TINY, *options]
        if BIASES in options:
            arguments = [option for option in arguments if option not in (BIASES, "--disable-bias-linear")]
        return self.exactly(
            *arguments,
            processes=processes,
            iterations=iterations,
            kill_when=kill_when,
            stop_when=stop_when,
        )

    def exactly(
        self,
        *options: str,
        processes: int = 1,
        iterations: int = 5,
        kill_when: str | None = None,
        stop_when: str | None = None,
    ) -> Run:
        """Train with these options and no others but for the length and the metrics."""
        self._count += 1
        metrics, self.log = self._folder / f"{self._count}.jsonl", self._folder / f"{self._count}.log"
        arguments = ["--train-iters", str(iterations), "--polycom-metrics", str(metrics), *options]
        request = {
            "arguments": arguments,
            "processes": processes,
            "log": str(self.log),
            "timeout": 240,
            "kill_when": kill_when,
            "stop_when": stop_when,
        }
        run = Run(self._zygote.run(request), self.log.read_text())
        if metrics.exists():
            for line in metrics.read_text().splitlines():
                record = json.loads(line)
                run.metrics.setdefault(record["step"], {}).update(record["metrics"])
        if kill_when is None and any(run.statuses) and 2 not in run.statuses:
            pytest.fail(f"training failed with {run.statuses}:\n{run.log[-6000:]}")
        return run

    def script(self, name: str, *arguments: str) -> Any:
        """What a script beside this file prints last, as JSON; it finds Megatron imported."""
        return json.loads(self._scripted(name, arguments, 1).splitlines()[-1])

    def ranks(self, name: str, folder: Path, *arguments: str, processes: int) -> list[Any]:
        """What each rank of such a script, which is told the folder first, leaves there as RANK.json."""
        self._scripted(name, (str(folder), *arguments), processes)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]

    def _scripted(self, name: str, arguments: tuple[str, ...], processes: int) -> str:
        self._count += 1
        log = self._folder / f"{self._count}-{name}.log"
        request: dict[str, Any] = {"script": str(Path(__file__).with_name(name)), "arguments": arguments}
        request |= {"processes": processes, "log": str(log)}
        statuses = self._zygote.run({**request, "timeout": 120})
        assert statuses == [0] * processes, log.read_text()[-6000:]
        return log.read_text()

    def close(self) -> None:
        """End the forking process."""
        self._zygote.close()


@pytest.fixture(scope="session")
def tree() -> Path:
    """The patched Megatron."""
    return upstream.ensure_applied("megatron")


@pytest.fixture(scope="session")
def train(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Run the training entry on the patched Megatron."""
    trainer = Trainer(tree, tmp_path_factory.mktemp("runs"))
    yield trainer
    trainer.close()


@pytest.fixture(scope="session")
def train_unpatched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """The same entry on Megatron as it was."""
    folder = tmp_path_factory.mktemp("unpatched")
    fetch.build(pins.get("megatron"), folder / "megatron")
    trainer = Trainer(folder / "megatron", folder)
    yield trainer
    trainer.close()

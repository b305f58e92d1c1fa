"""What nvidia-smi tells, from one that runs: rows, fields that it does not know, and broken GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polycom_ext.machine import nvidia

from .conftest import GPU, H100

HERE = Path(__file__)
Smi = Callable[..., None]


def test_without_nvidia_smi_and_driver_there_is_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.look(loaded=tmp_path / "absent") == nvidia.Driver(None)


def test_a_driver_without_its_program_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvidia-smi is not on PATH" in nvidia.look(loaded=HERE).problem


def test_a_healthy_gpu(smi: Smi) -> None:
    smi({"gpu": [H100]})
    assert nvidia.look() == nvidia.Driver("580.95.05", (GPU,))


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_fields_that_a_driver_does_not_know_are_left_out(smi: Smi, stream: str) -> None:
    """Newer ones and the compute capability: driver 470 has neither."""
    new = ("clocks_event_reasons.active", "gpu_recovery_action", "compute_cap")
    old = {field: value for field, value in H100.items() if field not in new}
    smi({"gpu": [old | {"clocks_throttle_reasons.active": "0x0000000000000040"}]}, stream=stream)
    [found] = nvidia.look().gpus
    assert (found.capability, found.mhz, found.faults) == (None, 345, ())
    assert found.slowed == ("slowed down by heat (hardware)",)


def test_a_program_that_knows_too_few_fields_is_told(smi: Smi) -> None:
    smi({"gpu": [{field: value for field, value in H100.items() if field != "uuid"}]})
    assert nvidia.look().problem == "nvidia-smi does not know uuid"
    smi({"gpu": [{field: H100[field] for field in sorted(nvidia.NECESSARY)}]})
    [found] = nvidia.look().gpus
    assert (found.name, found.memory_mib) == (H100["name"], None)


@pytest.mark.parametrize(
    ("mask", "slowed"),
    [
        ("0x0000000000000000", ()),
        ("0x0000000000000005", ()),  # idle, power cap
        ("0x0000000000000008", ("slowed down by the hardware",)),
        ("0x0000000000000020", ("slowed down by heat (driver)",)),
        ("0x0000000000000080", ("slowed down by the power supply",)),
    ],
)
def test_reasons_for_a_low_clock_are_faults_or_not(smi: Smi, mask: str, slowed: tuple[str, ...]) -> None:
    smi({"gpu": [H100 | {"clocks_event_reasons.active": mask}]})
    assert nvidia.look().gpus[0].slowed == slowed


def test_a_clock_held_by_a_setting_and_mig_are_told(smi: Smi) -> None:
    smi({"gpu": [H100 | {"clocks_event_reasons.active": "0x2", "mig.mode.current": "Enabled"}]})
    [found] = nvidia.look().gpus
    assert found.clocks_set
    assert found.mig


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("ecc.errors.uncorrected.volatile.total", "1", "1 memory error that ECC could not correct"),
        ("ecc.errors.uncorrected.volatile.total", "2", "2 memory errors that ECC could not correct"),
        ("ecc.errors.uncorrected.volatile.total", "[Unknown Error]", "…volatile.total is [Unknown Error]"),
        ("temperature.gpu", "[GPU requires reset]", "temperature.gpu is [GPU requires reset]"),
        ("retired_pages.pending", "Yes", "memory pages wait to be retired"),
        ("gpu_recovery_action", "Reset", "the driver asks for: Reset"),
    ],
)
def test_what_asks_for_a_reset_is_a_fault(smi: Smi, field: str, value: str, fault: str) -> None:
    smi({"gpu": [H100 | {field: value}]})
    [told] = nvidia.look().gpus[0].faults
    assert told.endswith(fault.removeprefix("…"))


@pytest.mark.parametrize("action", ["N/A", "[N/A]"])
def test_what_the_driver_does_not_tell_is_no_fault(smi: Smi, action: str) -> None:
    untold = {
        "temperature.gpu": "[N/A]",
        "ecc.mode.current": "[Not Supported]",
        "ecc.errors.uncorrected.volatile.total": "N/A",
        "memory.used": "[Insufficient Permissions]",
        "gpu_recovery_action": action,
    }
    smi({"gpu": [H100 | untold]})
    [found] = nvidia.look().gpus
    assert (found.celsius, found.ecc, found.uncorrected, found.used_mib, found.faults) == (None,) * 4 + ((),)


def test_rows_of_memory_that_failed_and_processes_belong_to_their_gpu(smi: Smi) -> None:
    other = H100 | {"index": "1", "uuid": "GPU-b"}
    rows = {"gpu_uuid": "GPU-b", "remapped_rows.pending": "1", "remapped_rows.failure": "Yes"}
    process = {"gpu_uuid": H100["uuid"], "pid": "77", "process_name": "python", "used_memory": "512"}
    smi({"gpu": [H100, other], "remapped-rows": [rows], "compute-apps": [process]})
    first, second = nvidia.look().gpus
    assert first.processes == (nvidia.Process(77, "python", 512),)
    assert first.faults == ()
    assert second.processes == ()
    assert second.faults == ("memory rows wait to be remapped", "memory rows could not be remapped")


def test_tables_that_hold_no_rows_are_left_out(smi: Smi) -> None:
    process = {"gpu_uuid": H100["uuid"], "pid": "[N/A]", "process_name": "x", "used_memory": "[N/A]"}
    smi({"gpu": [H100], "remapped-rows": ["No devices support it"], "compute-apps": [process]})
    assert nvidia.look().gpus == (GPU,)
    smi({"gpu": [H100], "compute-apps": ["No running processes found"]})
    assert nvidia.look().gpus == (GPU,)


def test_ecc_may_be_off(smi: Smi) -> None:
    smi({"gpu": [H100 | {"ecc.mode.current": "Disabled"}]})
    assert nvidia.look().gpus[0].ecc is False


def test_a_lost_gpu_is_told_beside_those_that_work(smi: Smi) -> None:
    lost = "Unable to determine the device handle for GPU1: 0000:4E:00.0: GPU is lost.  Reboot the system"
    smi({"gpu": [H100, lost]}, status=15)
    found = nvidia.look()
    assert found.gpus == (GPU,)
    assert found.problem == lost


FAILED = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


@pytest.mark.parametrize(
    ("says", "stream", "problem"),
    [
        (FAILED, "stdout", FAILED),
        (FAILED, "stderr", FAILED),
        ("", "stdout", "exit status 9"),
        ("\udcff broken", "stdout", "\ufffd broken"),
    ],
)
def test_a_driver_that_does_not_answer_is_told_in_its_words(
    smi: Smi, says: str, stream: str, problem: str
) -> None:
    smi({}, status=9, says=says, stream=stream)
    assert nvidia.look() == nvidia.Driver(None, problem=f"nvidia-smi: {problem}")


def test_one_that_hangs_is_given_up(smi: Smi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(nvidia, "SECONDS", 0.2)
    assert nvidia.look().problem == "nvidia-smi has not answered for 0.2 s"


def test_one_that_cannot_be_run_is_told(smi: Smi, tmp_path: Path) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/no/such/interpreter\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    assert "cannot be run" in nvidia.look().problem

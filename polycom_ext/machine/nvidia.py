"""What NVIDIA's driver says of the GPUs, by the program that comes with it, nvidia-smi."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIELDS = (
    *("index", "uuid", "name", "compute_cap", "driver_version", "memory.total", "memory.used"),
    *("temperature.gpu", "clocks.sm", "clocks.max.sm", "mig.mode.current", "ecc.mode.current"),
    *("ecc.errors.uncorrected.volatile.total", "retired_pages.pending", "gpu_recovery_action"),
    *("clocks_event_reasons.active", "clocks_throttle_reasons.active"),
)
"""Of --query-gpu; a driver that does not know one yet, or any more, is asked for the rest."""
NECESSARY = {"index", "uuid", "name", "driver_version"}
ROW_FIELDS = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
PROCESS_FIELDS = ("gpu_uuid", "pid", "process_name", "used_memory")
SLOWED = {
    0x08: "slowed down by the hardware",
    0x20: "slowed down by heat (driver)",
    0x40: "slowed down by heat (hardware)",
    0x80: "slowed down by the power supply",
}
"""Bits of the reasons for a clock (nvmlClocksEventReasons) that tell of a fault; idling and caps are none."""
SETTING = 0x02
FAULT = re.compile(r"\[.*(error|lost|reset).*\]", re.IGNORECASE)
"""In place of a value; `[N/A]`, `[Not Supported]` and `[Insufficient Permissions]` tell of no fault."""
SECONDS = 60


@dataclass(frozen=True)
class Process:
    """One that computes on a GPU."""

    pid: int
    name: str
    mib: int | None


@dataclass(frozen=True)
class Gpu:
    """A GPU; None for what the driver does not tell."""

    index: int
    uuid: str
    name: str
    capability: str | None
    memory_mib: int | None
    used_mib: int | None
    celsius: int | None
    mhz: int | None
    max_mhz: int | None
    clocks_set: bool
    """Clocks are held by a setting of somebody's."""
    mig: bool
    ecc: bool | None
    uncorrected: int | None
    """ECC errors that could not be corrected, since the driver was loaded."""
    slowed: tuple[str, ...]
    faults: tuple[str, ...]
    """What asks for a reset or for another GPU."""
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Driver:
    """The driver, and the GPUs that it knows."""

    version: str | None
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    """Why nothing, or not all, is known; nothing where there is neither driver nor GPU."""


def look(loaded: Path = Path("/proc/driver/nvidia/version")) -> Driver:
    """Ask nvidia-smi. `loaded` is there where the kernel has the driver."""
    if shutil.which("nvidia-smi") is None:
        if not loaded.exists():
            return Driver(None)
        return Driver(None, problem="the driver is loaded, but nvidia-smi is not on PATH")
    try:
        rows = list(_query("gpu", FIELDS))
        remapped = {row["gpu_uuid"]: row for row in _optional("remapped-rows", ROW_FIELDS)}
        busy = list(_optional("compute-apps", PROCESS_FIELDS))
    except _Failed as error:
        return Driver(None, problem=str(error))
    complete = [row for row in rows if row.keys() >= NECESSARY and row["index"].isdecimal()]
    gpus = tuple(_gpu(row, remapped.get(row["uuid"], {}), busy) for row in complete)
    broken = "; ".join(next(iter(row.values())) for row in rows if row not in complete)
    return Driver(complete[0]["driver_version"] if complete else None, gpus, broken)


class _Failed(Exception):
    """nvidia-smi gave no answer; says why."""


def _query(what: str, fields: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows; one that is no row (a GPU that the driver has lost) holds its text as the first field."""
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _Failed(f"nvidia-smi has not answered for {SECONDS} s") from None
    except OSError as error:
        raise _Failed(f"nvidia-smi cannot be run: {error.strerror}") from None
    unknown = set(re.findall(r'Field "([^"]+)" is not a valid field', told.stdout + told.stderr))
    known = tuple(field for field in fields if field not in unknown)
    if unknown.intersection(fields):
        if not known or unknown & NECESSARY:
            raise _Failed(f"nvidia-smi does not know {', '.join(sorted(unknown))}")
        yield from _query(what, known)
        return
    lines = told.stdout.strip().splitlines()
    rows = list(csv.reader(lines, skipinitialspace=True))
    if told.returncode and not any(len(row) == len(fields) for row in rows):
        reason = (*lines, *told.stderr.strip().splitlines(), f"exit status {told.returncode}")[0]
        raise _Failed(f"nvidia-smi: {reason.strip()}")
    for row, line in zip(rows, lines, strict=True):
        yield dict(zip(fields, row, strict=True)) if len(row) == len(fields) else {fields[0]: line.strip()}


def _optional(what: str, fields: tuple[str, ...]) -> list[dict[str, str]]:
    """The same of what not every driver and GPU tells."""
    try:
        return [row for row in _query(what, fields) if len(row) == len(fields)]
    except _Failed:
        return []


def _gpu(row: dict[str, str], rows: dict[str, str], busy: list[dict[str, str]]) -> Gpu:
    reasons = _reasons(row)
    return Gpu(
        index=int(row["index"]),
        uuid=row["uuid"],
        name=row["name"],
        capability=row["compute_cap"] if "." in row.get("compute_cap", "") else None,
        memory_mib=_integer(row.get("memory.total")),
        used_mib=_integer(row.get("memory.used")),
        celsius=_integer(row.get("temperature.gpu")),
        mhz=_integer(row.get("clocks.sm")),
        max_mhz=_integer(row.get("clocks.max.sm")),
        clocks_set=bool(reasons & SETTING),
        mig=row.get("mig.mode.current") == "Enabled",
        ecc={"Enabled": True, "Disabled": False}.get(row.get("ecc.mode.current", "")),
        uncorrected=_integer(row.get("ecc.errors.uncorrected.volatile.total")),
        slowed=tuple(text for bit, text in SLOWED.items() if reasons & bit),
        faults=tuple(_faults(row, rows)),
        processes=tuple(
            Process(int(one["pid"]), one["process_name"], _integer(one["used_memory"]))
            for one in busy
            if one["gpu_uuid"] == row["uuid"] and one["pid"].isdecimal()
        ),
    )


def _faults(row: dict[str, str], rows: dict[str, str]) -> Iterator[str]:
    for field, value in row.items():
        if FAULT.fullmatch(value):
            yield f"{field} is {value}"
    if errors := _integer(row.get("ecc.errors.uncorrected.volatile.total")):
        yield f"{errors} memory error{'' if errors == 1 else 's'} that ECC could not correct"
    if _is_yes(row.get("retired_pages.pending")):
        yield "memory pages wait to be retired"
    if _is_yes(rows.get("remapped_rows.pending")):
        yield "memory rows wait to be remapped"
    if _is_yes(rows.get("remapped_rows.failure")):
        yield "memory rows could not be remapped"
    action = row.get("gpu_recovery_action", "None")
    if not action.startswith("[") and action not in ("None", "N/A"):
        yield f"the driver asks for: {action}"


def _reasons(row: dict[str, str]) -> int:
    for field in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
        if re.fullmatch(r"0x[0-9a-fA-F]+", row.get(field, "")):
            return int(row[field], 16)
    return 0


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _is_yes(text: str | None) -> bool:
    return text is not None and text.lower() in ("yes", "1")

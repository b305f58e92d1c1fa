"""What a compiled library asks of the machine that loads it, and what code it holds for GPUs."""

from __future__ import annotations

import re
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

from auditwheel.architecture import Architecture
from auditwheel.libc import Libc
from auditwheel.policy import WheelPolicies
from elftools.elf.elffile import ELFFile

TORCH = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
"""Every build of torch has them."""
_CONTAINER = 0xBA55ED50
_KINDS = {1: "compute", 2: "sm"}


def _section(library: Path, name: str) -> Any:
    return ELFFile(BytesIO(library.read_bytes())).get_section_by_name(name)


def needed(library: Path) -> set[str]:
    """The libraries that the loader must find."""
    return {tag.needed for tag in _section(library, ".dynamic").iter_tags("DT_NEEDED")}


def search_paths(library: Path) -> list[Any]:
    """What the library adds to where the loader looks."""
    tags = (tag.entry for tag in _section(library, ".dynamic").iter_tags())
    return [entry for entry in tags if entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]


def of_every_linux(name: str) -> bool:
    """Whether a wheel may take it for granted: the loader, and what auditwheel's newest policy has."""
    policy = WheelPolicies(libc=Libc.GLIBC, arch=Architecture.detect()).highest
    return name in policy.whitelist or name.startswith("ld-linux")


def symbols_of_torchs_cpp(library: Path) -> list[str]:
    """Names of torch's namespaces that the loader must find; its stable ABI, for later versions, is C."""
    symbols = _section(library, ".dynsym").iter_symbols()
    undefined = [symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF"]
    return [name for name in undefined if re.match(r"_ZT?[A-Z]*K?(2at|3c10|5torch)\d", name)]


def device_code(library: Path) -> list[set[str]]:
    """What each linked source holds, such as sm_80 (machine code) and compute_80 (PTX).

    nvcc writes a container a source: 0xBA55ED50, version, the sizes of this header and of what follows: one
    after the other kind, flags, the sizes of header and code; the header has the architecture at byte 28.
    """
    data = _section(library, ".nv_fatbin").data()
    found: list[set[str]] = []
    at = 0
    while at < len(data):
        magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
        assert magic == _CONTAINER, f"no container of nvcc at byte {at}"
        entry, at = at + header, at + header + size
        held = set()
        while entry < at:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + 28)
            held.add(f"{_KINDS[kind]}_{architecture}")
            entry += header + size
        found.append(held)
        at += -at % 8
    return found

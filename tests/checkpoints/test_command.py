"""`polycom convert` asks for no more packages than the forms that it reads and writes."""

from __future__ import annotations

import subprocess
import sys

HELP = """
import sys
for package in ("torch", "tokenizers", "safetensors", "transformers"):
    sys.modules[package] = None
from polycom_ext import cli
cli.main(["convert", "--help"])
"""


def test_what_it_can_do_is_told_without_the_packages_of_any_form() -> None:
    said = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    listed = " ".join(said.stdout.split()).partition("the form to write: ")[2].partition(" --")[0]
    assert set(listed.split(", ")) == {"megatron", "olmo", "hf"}, said

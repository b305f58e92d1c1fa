"""The page of the ablations shows what was measured of each of them."""

from __future__ import annotations

import csv
import re
from itertools import permutations
from statistics import mean, stdev

from polycom_ext import activations
from polycom_ext.runs.spec import load_each

from ..scripts import script
from .conftest import TOP

RESULTS = max((TOP / "benchmarks" / "results").glob("*-cpu-ablations"))
SPECS = [path for path in (TOP / "configs" / "ablations" / "tiny").glob("*.yaml") if path.stem != "base"]


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def said(text: str) -> str:
    return text.rpartition("Results\n")[2]


def test_its_tables_are_those_of_the_csv_files() -> None:
    groups, runs = rows("groups.csv"), rows("results.csv")
    families = dict.fromkeys(row["family"] for row in groups)
    made = [
        script("ablations").table([row for row in groups if row["family"] == one], runs) for one in families
    ]
    for page in (RESULTS / "README.md", TOP / "docs" / "ablations.md"):
        shown = re.findall(r"^\|.*", said(page.read_text()), re.MULTILINE)
        assert shown == [line for lines in made for line in lines], page


def test_the_differences_that_it_names_are_those_between_runs_of_one_seed() -> None:
    runs = [row for row in rows("results.csv") if row["run"].startswith("ablation-dense-")]
    smaller = [row for row in runs if not row["run"].startswith("ablation-dense-larger-")]
    losses: dict[str, dict[str, float]] = {}
    for row in smaller:
        losses.setdefault(row["group"], {})[row["seed"]] = float(row["validation_loss"])
    between = [[one[seed] - other[seed] for seed in one] for one, other in permutations(losses.values(), 2)]
    measured = {(f"{mean(values):.3f}", f"{stdev(values):.3f}") for values in between}
    prose = re.sub(r"^\|.*", "", said((TOP / "docs" / "ablations.md").read_text()), flags=re.MULTILINE)
    named = set(re.findall(r"(\d\.\d{3}) ± (\d\.\d{3})", prose))
    assert named
    assert named <= measured


def test_every_activation_that_is_trained_has_its_row_of_three_seeds() -> None:
    found = sorted((row["activation"], row["order"], row["seeds"]) for row in rows("groups.csv"))
    compared = [
        activations.parse(spec.activation) for path in SPECS for spec in load_each(path, ["megatron.seed=1"])
    ]
    assert found == sorted((entry.name, str(order or ""), "3") for entry, order in compared)


def test_readme_quotes_them() -> None:
    polynorm = next(row for row in rows("groups.csv") if row["activation"] == "polynorm")
    quoted = re.findall(
        r"PolyNorm comes to SwiGLU's final\s+loss (.*) times as early", (TOP / "README.md").read_text()
    )
    assert quoted == [script("ablations").spread(polynorm, "speedup_in_tokens", 2)]

"""The tables of results: generated from docs/results, of the last epochs, and honest about seeds."""

import importlib.util
import re
from pathlib import Path

import pytest

from dyconvert.finetuning.sweeps.schema import load_sweep

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def results():
    """benchmarks/results.py, as a module of this test's own."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_say_what_was_measured(results):
    for page, text in results.pages().items():
        assert text == page.read_text(encoding="utf-8"), f"{page.name}: run `python benchmarks/results.py tables`"


def test_results_are_of_the_last_epochs(results):
    for name in results.names():
        curves = {(row["run"], row["seed"], row["epoch"]): row["top1"] for row in results.read(f"{name}-curves")}
        runs = {run.name for run in load_sweep(results.sweep_of(name)).runs}
        for row in results.read(name):
            assert row["run"] in runs
            assert row["top1"] == curves[row["run"], row["seed"], row["epochs"]]
            assert (row["run"], row["seed"], row["epochs"] + 1) not in curves


def row(run, seed, top1, parameters, static=False):
    kept = {"run": run, "seed": seed, "static": static, "epochs": 12, "original": 87.19, "converted": None}
    return kept | {"top1": top1, "training": 90.0, "parameters": parameters, "macs": 12_500_000, "seconds": 100}


def test_a_table(results, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    rows = [row("static, l1", seed, 80.0 + seed, 78_190, static=True) for seed in range(3)]
    rows += [row("static", seed, 87.0 + seed / 10, 78_190, static=True) for seed in range(3)]
    rows += [row("dynet g=6", 0, 88.6, 512_300)]
    results.write("x", results.ROWS, rows)
    costs = [dict(zip(results.COSTS, ("dynet g=6", 0.381, 1_134_319, 0.42, 319_693), strict=True))]
    results.write("x-costs", results.COSTS, costs)
    lines = results.table("x").splitlines()
    assert lines[2:] == [
        "| original | 87.19 |  |  |  |  | 0.42 | 320 |",
        "| static | 87.10 ± 0.10 |  | 90.0 | 78.19 k | 12.50 M |  |  |",
        "| static, l1 | 81.00 ± 1.00 |  | 90.0 | 78.19 k | 12.50 M |  |  |",
        "| dynet g=6 (1 seed) | 88.60 | +1.50 | 90.0 | 512.30 k | 12.50 M | 0.38 | 1134 |",
        "",
        "12 epochs, the last one's weights; mean and standard deviation over 3 seeds, where not said otherwise.",
    ]
    assert results.table("nothing") == "No run of `nothing` is finished yet.\n"


def test_tables_stand_between_marks(results, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- results: x -->\nold\n<!-- end of results -->\nb <!-- results: --> c\n")
    monkeypatch.setattr(results, "PAGES", (page,))
    expected = (
        "a\n<!-- results: x -->\nNo run of `x` is finished yet.\n<!-- end of results -->\nb <!-- results: --> c\n"
    )
    assert results.pages() == {page: expected}


def test_commands_of_results_name_shipped_sweeps(results):
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in re.findall(r"<!-- results: ([\w.-]+) -->", text):
        assert f"recipes sweep {results.sweep_of(name)}" in text, "each table by one command"

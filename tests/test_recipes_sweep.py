"""Sweeps: every run with every seed, rows saved as the runs end, and gone on with after a stop."""

import csv
import json

import pytest

from dyconvert import RecipeError
from dyconvert.finetuning.sweeps.runner import Runner
from dyconvert.finetuning.sweeps.schema import load_sweep
from dyconvert.finetuning.sweeps.table import markdown, table_rows

pytest.importorskip("lightning")

SWEEP = """\
description: small
recipe: quickstart
overrides:
  - pretrain=null
  - model.arguments={}
  - model.weights=default
  - data.limit_train=64
  - data.limit_val=40
  - train.batch=32
runs:
  - name: static
    overrides: [convert=null]
  - name: dynet g=2
    overrides: [convert.g=2]
seeds: [0, 1]
"""
FAST = ["train.epochs=1", "train.warmup_epochs=0.0"]


@pytest.fixture
def sweep_file(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SWEEP)
    return file


def rows_in(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_runs_every_seed_and_goes_on_after_a_stop(sweep_file, tmp_path):
    sweep = load_sweep(sweep_file, FAST)
    first = Runner(sweep, tmp_path / "out", seeds=[0])
    assert first.run() == []
    assert [(row["run"], row["seed"], row["g"], row["static"]) for row in rows_in(first.csv)] == [
        ("static", "0", "", "True"),
        ("dynet g=2", "0", "2", "False"),
    ]
    untouched = (tmp_path / "out" / "static-seed0" / "summary.json").stat().st_mtime_ns

    lines = []
    whole = Runner(sweep, tmp_path / "out")
    assert [whole.is_done(job) for job in whole.jobs] == [True, True, False, False]
    assert whole.run(workers=2, report=lines.append) == []
    assert "4 runs, 2 of them done" in lines[0]
    assert (tmp_path / "out" / "static-seed0" / "summary.json").stat().st_mtime_ns == untouched
    rows = whole.rows()
    assert [(row["run"], row["seed"]) for row in rows] == [
        ("static", 0), ("static", 1), ("dynet g=2", 0), ("dynet g=2", 1),
    ]  # fmt: skip
    # At full width a conversion changes nothing; training does.
    assert rows[2]["converted"] == pytest.approx(rows[2]["original"])
    assert rows[2]["parameters"] > rows[0]["parameters"]

    # A row that was lost, as by a kill before it was written, is read from the finished run.
    whole.csv.unlink()
    again = Runner(sweep, tmp_path / "out", seeds=[0])
    assert again.run() == []
    assert [row["finetuned"] for row in again.rows()] == [row["finetuned"] for row in rows if row["seed"] == 0]


def test_another_recipes_rows_are_not_taken(sweep_file, tmp_path):
    sweep = load_sweep(sweep_file, FAST)
    assert Runner(sweep, tmp_path / "out", only=["static"], seeds=[0]).run() == []
    changed = load_sweep(sweep_file, [*FAST, "train.lr=0.001"])
    with pytest.raises(RecipeError, match="another recipe made"):
        Runner(changed, tmp_path / "out", only=["static"], seeds=[0])


def test_a_failed_run_does_not_stop_the_others(sweep_file, tmp_path):
    sweep_file.write_text(SWEEP.replace("[convert.g=2]", "[data.dataset=imagefolder, data.root=missing]"))
    runner = Runner(load_sweep(sweep_file, FAST), tmp_path / "out", seeds=[0])
    (failed,) = runner.run()
    assert failed.startswith("dynet g=2, seed 0: ")
    assert "missing" in failed
    assert [row["run"] for row in runner.rows()] == ["static"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("runs:", "rums:", "has no runs"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "a seed is given twice"),
        ("name: dynet g=2", "name: static", "different names; static is there twice"),
        ("[convert.g=2]", "[convert.gg=2]", "convert.gg=2 (command line): unknown key; did you mean convert.g?"),
        ("recipe: quickstart", "recipe: nothing", "There is no recipe"),
        ("seeds: [0, 1]", "seed: [0, 1]", "did you mean seeds?"),
    ],
)
def test_sweeps_that_are_refused(sweep_file, old, new, expected):
    sweep_file.write_text(SWEEP.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_sweep(sweep_file).recipes()
    assert expected in str(caught.value)


def test_two_processes_that_run_parts_of_a_sweep_keep_both_rows(sweep_file, tmp_path, monkeypatch):
    figures = {"original": 50.0, "converted": None, "finetuned": 60.0, "ema": None, "parameters": 1, "macs": None}
    monkeypatch.setattr("dyconvert.finetuning.sweeps.runner.run_job", lambda *_, **__: figures | {"seconds": 1.0})
    sweep = load_sweep(sweep_file, FAST)
    (tmp_path / "out" / ".dyconvert-part-0").mkdir(parents=True)
    runners = [Runner(sweep, tmp_path / "out", only=[name], seeds=[0]) for name in ("static", "dynet*")]
    for runner in runners:
        assert runner.run() == []
    assert {row["run"] for row in rows_in(runners[0].csv)} == {"static", "dynet g=2"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep.csv"]


def test_only_names_a_run(sweep_file, tmp_path):
    sweep = load_sweep(sweep_file)
    assert {job.run for job in Runner(sweep, tmp_path, only=["dynet*"]).jobs} == {"dynet g=2"}
    with pytest.raises(RecipeError, match="The runs are static, dynet g=2"):
        Runner(sweep, tmp_path, only=["condconv"])


def row(run, seed, finetuned, **changes):
    figures = {"original": 90.0, "converted": 90.0, "finetuned": finetuned, "ema": None}
    return {"run": run, "seed": seed, "parameters": 1000.0, "macs": 2e6, "seconds": 1.5, **figures, **changes}


def test_the_table_has_means_and_standard_deviations():
    rows = [row("a", 0, 91.0), row("a", 1, 92.0), row("a", 2, 93.0), row("b", 0, 95.0)]
    table = table_rows(rows, count=lambda number: f"{number:g}")
    assert table[0][:3] == ["run", "converted", "fine-tuned"]
    assert table[1][:2] == ["original", "90.00"]
    assert table[2][:4] == ["a", "90.00 ± 0.00", "92.00 ± 1.00", "3"]
    assert table[3][:4] == ["b", "90.00", "95.00", "1"]
    other = [*rows, row("c", 0, 80.0, original=95.0)]
    table = table_rows(other, count=str)
    assert table[0][:2] == ["run", "original"]
    assert [cells[1] for cells in table[1:]] == ["90.00 ± 0.00", "90.00", "95.00"]
    assert markdown(rows, str).splitlines()[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"


def test_the_command(cli, sweep_file, tmp_path):
    listed = cli("recipes", "sweep", sweep_file, "--dry-run", "--seeds", "0,5")
    assert listed.code == 0
    assert "dynet g=2 seed 5: to do" in listed.said
    ran = cli("recipes", "sweep", sweep_file, *FAST, "--seeds", 0, "--output", tmp_path / "out")
    assert ran.code == 0, ran.said
    assert "fine-tuned" in ran.stdout
    assert (tmp_path / "out" / "sweep.md").read_text().startswith("| run |")
    again = cli("recipes", "sweep", sweep_file, *FAST, "--seeds", 0, "--output", tmp_path / "out", "--json")
    assert [row["run"] for row in json.loads(again.stdout)] == ["static", "dynet g=2"]
    assert cli("recipes", "sweep", sweep_file, "--seeds", "a").code == 2

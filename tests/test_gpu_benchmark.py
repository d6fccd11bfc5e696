"""`benchmarks/gpu.py`, the command for the day a GPU is there: it runs, here on a CPU, and judges what it found."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dry_run(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    report = folder / "gpu.json"
    command = [sys.executable, FILE, "--device", "cpu", "--quick", "--json", report, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(report.read_text()), done.stdout


def test_what_it_measures(tmp_path: Path) -> None:
    for library in ("timm", "lightning"):
        pytest.importorskip(library)
    found, said = dry_run(tmp_path, "--only", "layers", "models", "recipes")
    assert not found["errors"]
    assert not found["left out"]
    assert (
        {row["mode"] for row in found["layers"]}
        == {row["mode"] for row in found["models"]}
        == {"inference", "training"}
    )
    for row in found["layers"]:
        assert {"static", "dynamic", "timm", "features", "recompute_groups"} <= set(row["figures"])
        assert row["chosen"] in {"native", "tiled", "groups", "unfold"}
    assert [row["recipe"] for row in found["recipes"]] == ["quickstart", "cifar10-resnet20"]
    assert min(row["seconds"] for row in found["recipes"]) > 0
    assert "A step of each shipped recipe" in said


@pytest.mark.sweep
def test_all_of_it(tmp_path: Path) -> None:
    found, _ = dry_run(tmp_path)
    assert found["tests"]["tests"] - found["tests"]["skipped"] > 30


def test_bars(gpu: ModuleType) -> None:
    def figure(seconds: float, memory: int = 0) -> dict[str, float]:
        return {"seconds": seconds, "memory": memory}

    resnet50 = {"model": "torchvision:resnet50", "batch": 64, "mode": "training"}
    models = [
        resnet50 | {"figures": {"static": figure(1.0, 100), "ours": figure(1.75, 125)}},
        resnet50 | {"batch": 1, "mode": "inference", "figures": {"static": figure(1.0)}},  # ours ran out of memory
    ]
    layers = [{"figures": {"dynamic": figure(1.0), "timm": figure(4.0)}}, {"figures": {"dynamic": figure(1.0)}}]
    found = gpu.bars({"models": models, "layers": layers})
    assert [(value, most) for _, value, most in found] == [(1.75, 2.0), (1.25, 1.3), (0.25, 0.5)]


def test_out_of_memory_and_errors_are_told_apart(gpu: ModuleType) -> None:
    def fail(error: Exception) -> Any:
        def call() -> None:
            raise error

        return call

    run = gpu.Run(torch.device("cpu"), quick=True)
    calls = {"large": fail(torch.OutOfMemoryError("CUDA out of memory")), "wrong": fail(ValueError("no")), "fine": int}
    assert set(run.measure(calls, "layer")) == {"fine"}
    assert run.left_out == ["layer: large (out of memory)"]
    (error,) = run.errors
    assert error.startswith("layer: wrong: ")


def test_parts_have_their_time(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(gpu.SHARES.values()) < 8 * 60
    monkeypatch.setitem(gpu.SHARES, "layers", 0)
    run = gpu.Run(torch.device("cpu"), quick=True)
    with run.part("layers"):
        gpu.layers(run)
    assert run.found["layers"] == []
    assert len(run.left_out) == 6


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr

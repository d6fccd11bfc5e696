"""What several test files share: the data of real models, and the command line."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which torch.compile does as well: Triton's kernels run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nets import ResidualNet, seeded
from torch import nn

from dyconvert import models

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many workers as cores: more threads each would wait for one another.
    torch.set_num_threads(1)

# Read here, where the working directory is still the one that a relative path was meant for.
DATA = Path(os.environ["DYCONVERT_DATA"]).resolve() if os.environ.get("DYCONVERT_DATA") else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real weights and images that the environment variable DYCONVERT_DATA names."""
    if DATA is None:
        pytest.skip("DYCONVERT_DATA isn't set: it names the folder with the real weights")
    if not DATA.is_dir():
        pytest.fail(f"DYCONVERT_DATA={DATA} is no folder")
    return DATA


@pytest.fixture
def net() -> nn.Module:
    """A static model with two residual blocks."""
    return seeded(ResidualNet)


@pytest.fixture
def trained() -> dict[str, torch.Tensor]:
    """The state dict of the model that comes with the package."""
    return models.create("digits-resnet8")[0].state_dict()


@dataclass
class Ran:
    """What a command printed, and how it ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        """All of it on one line: where lines are broken depends on the terminal."""
        return " ".join(f"{self.stdout} {self.stderr}".split())


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys) -> Callable[..., Ran]:
    """Run `dyconvert ARGUMENTS` in this process, in an empty folder."""
    from dyconvert.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["dyconvert", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def dyconvert_process(tmp_path) -> Callable[..., Ran]:
    """Run the installed console command in a process of its own, in an empty folder, 80 columns wide."""
    script = Path(sys.executable).with_name("dyconvert")

    def run(*arguments: object, **options: object) -> Ran:
        done = subprocess.run(
            [script, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "80"},
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def no_downloads(monkeypatch, tmp_path_factory) -> None:
    """Whatever would be downloaded fails as without a network, and nothing of this machine's caches is found."""
    from urllib.error import URLError

    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch_home")))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr("torch.hub.urlopen", fail)


# Factories, as a user has them in a file of their own.
FACTORIES = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from nets import FlatNet, ResidualNet, seeded
import dyconvert

def net(width=8):
    return seeded(ResidualNet, width)

def mlp():
    return torch.nn.Linear(2, 2)

def converted():
    return dyconvert.convert(net())

def parallel():
    return torch.nn.DataParallel(net())

def compiled():
    return torch.compile(net())

def broken():
    raise ValueError("out of order")
"""


@pytest.fixture
def models_file(cli, monkeypatch, tmp_path) -> str:
    """A file with factories, in the folder that `cli` runs in."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # tests compare what is in the folder
    (tmp_path / "mine.py").write_text(FACTORIES)
    return "mine.py"

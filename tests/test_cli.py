"""The command line: what it prints and writes."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import Ran
from nets import ResidualNet, image, listed, same, seeded
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

import dyconvert
from dyconvert.builtin import accuracy
from dyconvert.cli.app import EXAMPLES

pytestmark = pytest.mark.usefixtures("no_downloads")

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def converted(ran: Ran, directory: Path) -> nn.Module:
    """The model that a command has saved."""
    assert ran.code == 0, ran.said
    return dyconvert.load(directory, trust_code=True)


# ---- The main job ----


def test_the_readmes_first_command(dyconvert_process, tmp_path):
    ran = dyconvert_process("digits-resnet8", "--g", 6)
    assert ran.code == 0, ran.stderr
    before, after = re.search(r"accuracy.* ([\d.]+) % +([\d.]+) %", ran.stdout).groups()
    assert before == after
    assert float(before) > 95
    assert f"{accuracy(dyconvert.load(tmp_path / 'digits-resnet8-dynet-g6')):.2f}" == after
    for said in (
        "9 convs: 8 converted, 1 skipped",
        "the stem, which reads the image",
        "parameters",
        "MACs",
        "largest difference",
        "saved to digits-resnet8-dynet-g6",
    ):
        assert said in ran.said
    # The next command stands on a line of its own, to be copied, and works.
    command = re.search(r'^Next: python -c "(.*)"$', ran.stdout, re.MULTILINE)[1]
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(command, names)
    assert accuracy(names["model"]) == pytest.approx(float(after), abs=0.005)  # as printed
    assert max(len(line) for line in ran.stdout.splitlines() if not line.startswith("Next:")) <= 80
    assert not ran.stderr.strip()


def test_convert_is_the_commands_long_name(cli, models_file, tmp_path):
    short = cli(f"{models_file}:net", "--input-size", 16, "--output", "short")
    long = cli("convert", f"{models_file}:net", "--input-size", 16, "--output", "long")
    assert "saved to short" in short.said
    assert same(converted(short, tmp_path / "short"), converted(long, tmp_path / "long"))
    plans = [
        cli(*start, "--dry-run", "--json") for start in (["digits-resnet8"], ["convert", "builtin:digits-resnet8"])
    ]
    assert plans[0].code == plans[1].code == 0
    assert plans[0].stdout == plans[1].stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"name": "dynet", "g": 6, "scope": "block"}),
        (["--method", "condconv"], {"name": "condconv", "g": 8, "scope": "layer"}),
        (["--method", "dyconv"], {"name": "dyconv", "g": 4, "scope": "layer"}),
        (["-m", "dyconv", "--g", "2", "--scope", "block"], {"name": "dyconv", "g": 2, "scope": "block"}),
        (["--reduction", "2", "--temperature", "3"], {"reduction": 2, "temperature": 3.0}),
        (["--reduction", "0"], {"reduction": None}),
    ],
)
def test_options_of_the_method(options, expected, cli):
    ran = cli("digits-resnet8", *options, "--dry-run", "--json")
    assert ran.code == 0, ran.said
    method = json.loads(ran.stdout)["method"]
    assert {key: method[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--include-stem"], 9),
        (["--include", "layer3.*"], 3),
        (["--include", "layer2", "--include", "layer3"], 6),
        (["--exclude", "*.shortcut.*", "--exclude", "layer1"], 4),
    ],
)
def test_options_of_what_is_converted(options, count, cli):
    ran = cli("digits-resnet8", *options, "--dry-run", "--json")
    plan = dyconvert.Plan.from_json(ran.stdout)
    assert len(plan.converted) == count
    assert len(plan.convs) == 9


def test_a_dry_run_writes_nothing(cli, tmp_path):
    ran = cli("resnet18", "--dry-run", "--input-size", 64)  # and downloads nothing
    assert ran.code == 0, ran.said
    assert "20 convs: 19 converted, 1 skipped" in ran.said
    assert "layer4.1.conv2" in ran.stdout
    assert "nothing was written" in ran.said
    assert "parameters 11.69 M" in ran.said
    assert not listed(tmp_path)


def test_json_is_all_that_is_on_stdout(dyconvert_process, tmp_path):
    ran = dyconvert_process("digits-resnet8", "--json", "--output", "out", "--method", "dyconv")
    result = json.loads(ran.stdout)
    assert result["model"]["specifier"] == "builtin:digits-resnet8"
    assert result["plan"]["method"]["name"] == "dyconv"
    assert result["parameters"][0] < result["parameters"][1]
    assert result["macs"][0] < result["macs"][1]
    assert result["accuracy"][0] == result["accuracy"][1] > 95
    assert result["difference"]["relative"] < 1e-4  # the tolerance for float32
    assert result["output"] == "out"
    assert dyconvert.load(tmp_path / "out").layer1.conv1.g == 4


def test_progress_is_on_stderr(cli, models_file, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(stderr=True, force_terminal=True, force_interactive=True)
    monkeypatch.setattr("dyconvert.console.err", terminal)
    ran = cli(f"{models_file}:net", "--input-size", 16, "--json", "--output", "out")
    assert f"loading {models_file}:net" in ran.stderr
    assert json.loads(ran.stdout)["output"] == "out"


def test_force_replaces_what_is_there(cli, models_file, tmp_path):
    for options in ([], ["--g", 2, "--force"]):
        ran = cli(f"{models_file}:net", "--input-size", 16, "--output", "out", *options)
    assert converted(ran, tmp_path / "out").layer1[0].conv1.g == 2
    assert len(listed(tmp_path / "out")) == 3


# ---- Factories and weights files ----


def wrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"module.{key}": tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("name", "dump"),
    [
        ("plain.pth", torch.save),
        ("nested.pt", lambda state, file: torch.save({"epoch": 3, "state_dict": state}, file)),
        ("wrapped.th", lambda state, file: torch.save({"state_dict": wrapped(state)}, file)),
        ("wrapped.pth", lambda state, file: torch.save(wrapped(state), file)),
        ("w.safetensors", save_file),
    ],
)
def test_weights_files(name, dump, cli, models_file, tmp_path):
    model = seeded(ResidualNet, 4, seed=5)
    dump(model.state_dict(), tmp_path / name)
    ran = cli(f"{models_file}:net", "--model-arg", "width=4", "--weights", name, "--input-size", "3,16,16", "-o", "out")
    dynamic = converted(ran, tmp_path / "out")
    assert dyconvert.verify(model, dynamic, image()).relative < 1e-4  # the tolerance for float32


def test_next_command_for_a_factory_trusts_its_code(cli, models_file):
    ran = cli(f"{models_file}:net", "--input-size", 16, "-o", "out")
    exec(re.search(r'Next: python -c "(.*)"', ran.said)[1], names := {})
    assert isinstance(names["model"], nn.Module)


def test_weights_that_were_saved_on_another_device(cli, data_dir, tmp_path):
    weights = data_dir / "cifar10_resnets" / "resnet20-12fca82f.th"
    ran = cli("cifar-resnet20", "--weights", weights, "--input-size", 32, "-o", "out")
    dynamic = converted(ran, tmp_path / "out")
    saved = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    assert torch.equal(dynamic.linear.weight, saved["module.linear.weight"])


# ---- The other commands ----


def test_ls(cli):
    everything = json.loads(cli("ls", "--json").stdout)
    assert {"torchvision", "builtin"} <= set(everything)
    assert "resnet50" in everything["torchvision"]
    assert "digits-resnet8" in cli("ls", "digits").said
    some = cli("ls", "resnet*", "--source", "torchvision").said
    assert "resnet152" in some
    assert "densenet" not in some


def test_methods(cli):
    said = cli("methods").said
    assert all(name in said and method.paper in said for name, method in dyconvert.METHODS.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["convert", "ls", "methods", "dyconvert MODEL"]),
        (["convert", "--help"], ["--method", "--g", "--scope", "--reduction", "--include-stem", "--weights", "--json"]),
        (["resnet50", "-h"], ["--input-size", "--output", "--dry-run", "--force", "--model-arg", "--exclude"]),
        (["ls", "--help"], ["--source"]),
        (["methods", "--help"], ["paper"]),
        (["--version"], [f"dyconvert {dyconvert.__version__}"]),
    ],
)
def test_help(arguments, words, cli):
    ran = cli(*arguments)
    assert ran.code == 0
    assert all(word in ran.said for word in words), ran.said
    assert max(map(len, ran.stdout.splitlines())) <= 80


def test_no_help_is_cut_or_without_examples(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    commands = ["convert", "finetune", "collapse", "export", "inspect", "report", "ls", "methods", "predict", "push"]
    commands += [
        "bench layers",
        "bench model",
        "recipes ls",
        "recipes show",
        "recipes cp",
        "recipes validate",
        "recipes sweep",
    ]
    for command in commands:
        ran = cli(*command.split(), "--help")
        assert ran.code == 0
        assert "…" not in ran.stdout, command
        assert all(option in ran.said for option in ("--quiet", "--verbose", "--help"))
        if command in EXAMPLES:
            assert all(example in ran.said for example in EXAMPLES[command]), command


def test_a_width_of_one_changes_nothing(cli, models_file):
    pytest.importorskip("torch_pruning")
    ran = cli(f"{models_file}:net", "--input-size", 16, "--width", 1, "-o", "out")
    assert ran.code == 0, ran.said
    assert "needs fine-tuning" not in ran.said
    assert "(allowed 0.0001)" in ran.said

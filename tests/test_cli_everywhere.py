"""What every command has: Ctrl-C, -q, -v, --device, --json, completion, words of its own options, plain text."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from nets import ResidualNet, equal, listed, seeded
from torch import nn

import dyconvert
from dyconvert import console
from dyconvert.cli.messages import in_options
from dyconvert.installation import install_command

pytestmark = pytest.mark.usefixtures("no_downloads")

# ---- Ctrl-C ----

# Ctrl-C at a moment that a name stands for: when a module is imported, or a function called.
INTERRUPTED = """
import signal, sys
from dyconvert.cli import main
moment, sys.argv = {moment!r}, ["dyconvert", *{arguments!r}]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

def now(*args, **kwargs):
    signal.raise_signal(signal.SIGINT)

class Forgotten:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def forgotten(*args, **kwargs):
    Forgotten()
    for _ in range(1000):
        pass

if moment == "saving":
    import dyconvert.checkpoint.tensors
    dyconvert.checkpoint.tensors.save_file = now
elif moment == "callback":
    import dyconvert.differences
    dyconvert.differences.verify = forgotten
else:
    sys.meta_path.insert(0, Finder())
main()
"""


@pytest.mark.parametrize(
    ("arguments", "moment"),
    [
        (["--help"], "rich.markdown"),
        (["recipes", "ls"], "yaml"),
        (["digits-resnet8"], "torch"),
        (["digits-resnet8"], "torch.nn"),
        (["digits-resnet8"], "numpy"),
        (["digits-resnet8"], "dyconvert.checkpoint"),
        (["digits-resnet8"], "saving"),
        (["digits-resnet8"], "callback"),
        (["finetune", "quickstart"], "lightning"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_ctrl_c_at_any_moment(arguments, moment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(arguments=arguments, moment=moment)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines() == ["Error: Stopped. Nothing half-written was left."]
    assert not listed(tmp_path)


# ---- -q, -v, --device, --json ----


def test_quiet_prints_nothing_but_what_was_asked_for(cli, models_file, tmp_path):
    ran = cli("-q", f"{models_file}:net", "--input-size", 16, "-o", "out")
    assert (ran.code, ran.stdout, ran.stderr) == (0, "", "")
    assert (tmp_path / "out" / "dyconvert.json").is_file()
    assert json.loads(cli("inspect", "out", "--trust-code", "-q", "--json").stdout)["convs"]
    assert "resnet18" in cli("ls", "resnet18", "-q").stdout
    assert "no dyconvert.json" in cli("inspect", "nothing", "--quiet").stderr
    # The next command isn't quiet for it.
    assert "saved to" in cli(f"{models_file}:net", "--input-size", 16, "-o", "out2").stdout


def test_verbose_says_where_an_error_is_from(cli):
    assert "Traceback" not in cli("inspect", "nothing").stderr
    for arguments in (("-v", "inspect", "nothing"), ("inspect", "nothing", "--verbose")):
        ran = cli(*arguments)
        assert ran.code == 2
        assert "Traceback" in ran.stderr
        assert "in describe" in ran.stderr


@pytest.mark.parametrize(
    ("device", "says"),
    [("tpu", "no device 'tpu'"), ("cuda:99", "--device cuda:99"), ("cuda:-1", "no device"), ("", "saved to")],
)
def test_devices(device, says, cli, models_file):
    ran = cli(f"{models_file}:net", "--input-size", 16, *(["--device", device] if device else ["--device", "cpu"]))
    assert says in ran.said
    assert ran.code == (2 if device else 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("command", [["inspect"], ["export", "--to", "torch"], ["collapse", "-o", "a.pth"]], ids=str)
def test_commands_on_a_gpu(command, cli, models_file, tmp_path):
    assert cli(f"{models_file}:net", "--input-size", 16, "-o", "out", "--device", "cuda").code == 0
    name, *rest = command
    ran = cli(name, "out", *rest, "--trust-code", "--input-size", 16, "--device", "cuda")
    assert ran.code == 0, ran.said


def test_json_is_one_object_in_every_command(cli, models_file):
    assert cli(f"{models_file}:net", "--input-size", 16, "-o", "out").code == 0
    for arguments in (
        ["ls"],
        ["methods"],
        ["recipes", "ls"],
        ["recipes", "validate", "quickstart"],
        ["inspect", "out", "--trust-code"],
        ["collapse", "out", "-o", "static.pth", "--trust-code", "--input-size", 16],
        ["export", "out", "--to", "torch", "--trust-code", "--input-size", 16],
    ):
        ran = cli(*arguments, "--json")
        assert ran.code == 0, ran.said
        assert isinstance(json.loads(ran.stdout), dict)


def test_json_has_no_nan(capsys):
    console.write_json({"best": float("nan"), "of": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"best": None, "of": [None, 1.5]}


# ---- Completion ----


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [
        (["con"], 1, {"convert"}),
        (["resnet1"], 1, {"resnet18", "resnet101", "resnet152"}),
        (["recipes", "sh"], 2, {"show"}),
        (["convert", "resnet1"], 2, {"resnet18", "resnet101", "resnet152"}),
        (["resnet18", "--inc"], 2, {"--include", "--include-stem"}),
        (["resnet18", "--method", "dy"], 3, {"dynet", "dyconv"}),
        (["resnet18", "--device", "c"], 3, {"cpu", "cuda"}),
        (["finetune", "quick"], 2, {"quickstart"}),
        (["recipes", "sweep", "abl"], 3, {"ablate-g"}),
        (["builtin:digits"], 1, {"builtin:digits-resnet8"}),
        (["builtin", ":", "digits"], 3, {"digits-resnet8"}),  # as bash splits it, and takes it back
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_tab_completion(words, at, expected, dyconvert_process, monkeypatch):
    shell = "zsh" if any(":" in word and word != ":" for word in words) else "bash"
    monkeypatch.setenv("_DYCONVERT_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", " ".join(["dyconvert", *words]))
    monkeypatch.setenv("COMP_CWORD", str(at))
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", " ".join(["dyconvert", *words]))
    found = dyconvert_process().stdout.replace("\\", "").replace('"', " ").split()
    assert expected <= set(found)
    assert all(word.startswith(words[-1]) for word in found) or shell == "zsh"


# ---- Words ----


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspekt", "x"], "Did you mean `dyconvert inspect`?"),
        (["exprot", "x"], "Did you mean `dyconvert export`?"),
        (["Report", "x"], "Did you mean `dyconvert report`?"),
        (["recipes", "shwo"], "show"),
        (["sd.pth"], "dyconvert MODEL --weights sd.pth"),
        (["last.ckpt"], "dyconvert MODEL --weights last.ckpt"),
        (["convert", "w.safetensors"], "dyconvert MODEL --weights w.safetensors"),
        (["saved"], "dyconvert inspect saved"),
        (["resnet18", "--wights", "x"], "dyconvert convert --help"),
        (["resnet18", "--weights", "none", "-o", "full"], "--force"),
        (["resnet18", "--weights", "none", "--width", "0.5", "--init", "least-squares"], "Give --data"),
        (["inspect", "coded"], "--model FILE.py:FACTORY, or, if you trust that code, --trust-code."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_say_what_to_type(arguments, says, cli, models_file, tmp_path):
    for folder in ("full", "saved"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "saved" / "dyconvert.json").write_text("{}")
    if arguments[-1] == "coded":
        assert cli(f"{models_file}:net", "--input-size", 16, "-o", "coded").code == 0
    ran = cli(*arguments)
    assert ran.code == 2
    assert says in ran.said, ran.said
    assert "`" not in ran.said.replace("`dyconvert", "").replace("`", "", ran.said.count("`dyconvert"))


def test_messages_name_arguments_in_python_and_options_in_a_command():
    def command(force: bool = False, input_size: str = "", batch: int = 1) -> None: ...

    import inspect

    said = (
        "It's there. Replace it with `force=True`; try `dynamic_batch=False`, `example=...`, train.force=True. Or else "
        "give `other=1`, `force=True`. `force=True` does it.\nNor `data=...`."
    )
    found = in_options(said, inspect.signature(command))
    assert found == (
        "It's there. Replace it with --force; try --batch N, --input-size 3,224,224, train.force=True. "
        "--force does it.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predict", "digits", "empty"], "empty holds no images"),
        (["bench", "model", "w.pth"], "w.pth holds weights"),
        (["bench", "model", "mine.py:net", "--against", "w.pth"], "w.pth holds weights"),
        (["report", "digits", "--against", "digits-resnet8", "--against-weights", "w"], "--against-weights FILE"),
        (["report", "digits", "--narrow", "resnet18", "--sizes", "none", "--seconds", "0"], ""),
        (["report", "mine.py:net", "--weights", "other.pth"], "with its arguments."),
        (["finetune", "r.yaml", "model.weights=w"], "model.weights=FILE"),
        (["finetune", "r.yaml", "model.weights=other.pth"], "model.arguments={'num_classes': 10}"),
        (["finetune", "r.yaml", "model.specifier=w.pth"], "model.weights=w.pth"),
        (["finetune", "r.yaml", "distill={teacher: resnet18, teacher_weights: w}"], "distill.teacher_weights=FILE"),
        (["finetune", "r.yaml", "output.directory=full"], "Choose another: output.directory."),
        (["finetune", "r.yaml", "output.directory=digits"], "Choose another: output.directory."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_messages_name_nothing_that_the_command_does_not_have(arguments, says, cli, models_file, tmp_path):
    if arguments[0] == "finetune":
        pytest.importorskip("lightning")
    assert cli("digits-resnet8", "-o", "digits", "-q").code == 0
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    torch.save(seeded(ResidualNet, 4).state_dict(), tmp_path / "other.pth")
    (tmp_path / "w.pth").touch()
    (tmp_path / "r.yaml").write_text(
        "model: {specifier: digits-resnet8, weights: none}\ndata: {dataset: fake, size: 8, channels: 1, mean: [0], "
        "std: [1], images: 40, workers: 0, num_classes: 10}\ntrain: {batch: 8, max_steps: 1, accelerator: cpu}\n"
    )
    ran = cli(*arguments)
    assert ran.code == (2 if says else 0), ran.said
    assert says in ran.said, ran.said
    assert "=..." not in ran.said
    assert "--force" not in ran.said
    if "--against-weights" not in arguments:
        assert "--weights" not in ran.said


def test_install_commands(monkeypatch, tmp_path):
    root = os.path.dirname(os.path.dirname(dyconvert.__file__))
    if os.path.isfile(os.path.join(root, "pyproject.toml")):
        monkeypatch.chdir(root)
        assert install_command("train") == "pip install '.[train]'"
        monkeypatch.chdir(tmp_path)
        assert install_command("train", "onnx") == f"pip install '{root}[train,onnx]'"
    folder = tmp_path / "clone"
    folder.mkdir()
    monkeypatch.setattr("dyconvert.installation._ROOT", tmp_path)
    for origin, command in (
        (None, "pip install 'dyconvert[train]'"),
        ({"url": folder.as_uri(), "dir_info": {}}, f"pip install '{folder}[train]'"),
        (
            {"url": "https://example.org/d.git", "vcs_info": {"vcs": "git", "requested_revision": "v1"}},
            "pip install 'dyconvert[train] @ git+https://example.org/d.git@v1'",
        ),
        ({"url": "https://example.org/d.whl", "archive_info": {}}, "'dyconvert[train] @ https://example.org/d.whl'"),
    ):
        monkeypatch.setattr("dyconvert.installation._origin", lambda origin=origin: origin)
        assert command in install_command("train")
    # The folder is gone: the packages themselves.
    monkeypatch.setattr("dyconvert.installation._origin", lambda: {"url": (tmp_path / "gone").as_uri()})
    assert "lightning" in install_command("train")


# ---- Plain text ----


@pytest.mark.parametrize("name", ["run[lr0.1]", "run[/lr]", "run[bold]x", ":smile:", "a\x1b[31mb", "b\u202ec"])
def test_names_are_printed_as_they_are(name, cli, models_file):
    ran = cli(f"{models_file}:net", "--input-size", 16, "-o", name)
    assert ran.code == 0, ran.stderr
    shown = name.encode("unicode_escape").decode() if not name.isprintable() else name
    assert f"saved to {shown}" in ran.stdout
    assert "\x1b" not in ran.stdout + ran.stderr
    ran = cli("inspect", name)
    assert f"{shown}" in ran.said
    assert "\x1b" not in ran.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_encoding_of_stdout(encoding, dyconvert_process, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    for arguments in (["digits-resnet8", "--dry-run"], ["ls", "resnet18"], ["recipes", "show", "quickstart"]):
        ran = dyconvert_process(*arguments)
        assert ran.code == 0, ran.stderr
        assert ran.stdout


class Noisy(nn.Module):
    """Warns as libraries do."""

    def forward(self, x):
        warnings.warn_explicit("internal of a library", UserWarning, f"{os.sep}site-packages{os.sep}torch.py", 1)
        warnings.warn("the user's own")  # noqa: B028
        return x


def test_noise_of_libraries(cli, models_file, tmp_path):
    (tmp_path / "noisy.py").write_text(
        "import mine, torch\nfrom test_cli_everywhere import Noisy\n"
        "def net():\n    return torch.nn.Sequential(mine.net(), Noisy())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "dyconvert", "noisy.py:net", "--input-size", "16"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "internal" not in ran.stderr
    assert "warning: the user's own" in ran.stderr


# ---- Lightning's state dicts ----


@pytest.mark.parametrize(
    ("extra", "warned"), [({}, False), ({"criterion.weight": torch.ones(2)}, True)], ids=["plain", "with a loss"]
)
@pytest.mark.parametrize("prefix", ["model.", "net.", "module.model.", "student.backbone."])
def test_state_dicts_of_a_module_around_the_model(prefix, extra, warned, tmp_path, models_file):
    model = seeded(ResidualNet, seed=5)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, **extra}, "epoch": 1, "pytorch-lightning_version": "2"}, tmp_path / "last.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded, _ = dyconvert.models.create(f"{models_file}:net", str(tmp_path / "last.ckpt"))
    assert equal(model.state_dict(), loaded.state_dict())
    assert any("criterion.weight" in str(each.message) for each in caught) is warned


def test_a_guess_of_the_input_size_is_said(cli, models_file):
    ran = cli(f"{models_file}:net", "--dry-run")
    assert "3x224x224 is assumed. Say it with --input-size" in " ".join(ran.said.split())
    ran = cli(f"{models_file}:net", "--input-size", 16, "-o", "sized")
    assert "assumed" not in ran.said
    # Afterwards the plan knows it.
    ran = cli("inspect", "sized", "--trust-code")
    assert "one image of 3x16x16" in ran.said
    assert "assumed" not in ran.said
    assert "assumed" not in cli("digits-resnet8", "--dry-run").said


def test_half_precision_says_what_the_inputs_are(cli):
    pytest.importorskip("onnxruntime")
    assert cli("digits-resnet8", "-o", "digits", "-q").code == 0
    said = " ".join(cli("export", "digits", "--fp16").said.split())
    assert "in float32, and computes in float16" in said


def test_a_directory_that_is_a_link_to_itself(cli, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for command in ("export", "inspect", "report"):
        ran = cli(command, "loop")
        assert ran.code == 2, ran.said
        assert "Error:" in ran.said


def test_where_the_code_has_moved(cli, models_file, tmp_path):
    assert cli(f"{models_file}:net", "--input-size", 16, "-o", "first", "-q").code == 0
    (tmp_path / "elsewhere").mkdir()
    Path(models_file).rename(tmp_path / "elsewhere" / "code.py")
    (tmp_path / "first").rename(tmp_path / "elsewhere" / "saved")
    factory = "elsewhere/code.py:net"
    commands = {
        "inspect": ["inspect", "elsewhere/saved"],
        "export": ["export", "elsewhere/saved", "--to", "torch", "-o", "x.pt2"],
        "collapse": ["collapse", "elsewhere/saved", "-o", "x.pth"],
        "report": ["report", "elsewhere/saved", "--sizes", "none", "--seconds", "0"],
    }
    for name, command in commands.items():
        ran = cli(*command)
        assert ran.code == 2, name
        assert "--model FILE.py:FACTORY" in " ".join(ran.said.split())
        ran = cli(*command, "--model", factory)
        assert ran.code == 0, f"{name}: {ran.said}"
    for wrong, says in (("elsewhere/code.py:mlp", "has no convs"), ("nothing.py:net", "nothing.py"), ("x", "'x'")):
        ran = cli("inspect", "elsewhere/saved", "--model", wrong)
        assert ran.code == 2
        assert says in " ".join(ran.said.split()), ran.said

"""The command line on bad input: exit code 2, a message that says what to do, and nothing written."""

import pickle
import sys

import pytest
import torch
from nets import ResidualNet, listed, seeded
from safetensors.torch import save_file
from torch import nn

import dyconvert
from dyconvert import ModelError

pytestmark = pytest.mark.usefixtures("no_downloads")


class RunsCode:
    def __reduce__(self):
        return open, ("ran", "w")


BAD_INPUT = [
    (["resnet5o"], ["'resnet5o'", "torchvision:resnet50", "dyconvert ls"]),
    (["timm:rezzznet"], ["There is no model 'rezzznet'"]),
    (["nowhere.at_all:net"], ["no model source or module 'nowhere.at_all'", "file.py:FACTORY"]),
    (["mine.py:nett"], ["no factory 'nett'", "mine.py:net"]),
    (["mine.py"], ["mine.py:FACTORY"]),
    (["mine.py:broken"], ["ValueError: out of order"]),
    (["mine.py:net", "--model-arg", "width"], ["name=value"]),
    (["mine.py:net", "--model-arg", "depth=3"], ["depth=3"]),
    (["digits-resnet8", "--method", "dynt"], ["Did you mean 'dynet'?"]),
    (["digits-resnet8", "--g", "0"], ["g:", "greater than or equal to 1"]),
    (["digits-resnet8", "--g", "six"], ["--g", "integer"]),
    (["digits-resnet8", "--scope", "stage"], ["'layer' or 'block'"]),
    (["digits-resnet8", "--include", "layer9"], ["'layer9'", "layer1.conv1"]),
    (["digits-resnet8", "--exclude", "*"], ["Not one conv"]),
    (["digits-resnet8", "--input-size", "big"], ["'big'", "3,224,224"]),
    (["digits-resnet8", "--input-size", "5,8,8"], ["rejects the example input", "5"]),
    (["digits-resnet8", "--input-size", "²"], ["'²'", "3,224,224"]),
    (["digits-resnet8", "--temperature", "1e39"], ["temperature", "less than or equal to"]),
    (["digits-resnet8", "--temperature", "1e-320"], ["temperature", "greater than or equal to"]),
    (["bench", "layers", "--batch", "²"], ["no list of batch sizes"]),
    (["bench", "layers", "--layer", "9" * 5000 + ",4,3,8"], ["is no conv"]),
    (["bench", "layers", "--batch", "1", "--layer", "4,4,3,100000"], ["values in its input", "fewer images"]),
    (["bench", "layers", "--batch", "1", "--layer", "100000,100000,3,8"], ["values in its experts"]),
    (["bench", "model", "digits-resnet8", "--batch", "1", "--input-size", "-5"], ["--input-size", "equal to 1"]),
    (["bench", "model", "digits-resnet8", "--batch", "1300000", "--input-size", "224"], ["values", "--input-size"]),
    (["digits-resnet8", "--wights", "x"], ["No such option", "--weights"]),
    (["digits-resnet8", "--output", "taken"], ["taken holds a model already", "--force", "--output"]),
    (["digits-resnet8", "--output", "full"], ["full holds other files", "--force"]),
    (["digits-resnet8", "--output", "mine.py"], ["mine.py is a file"]),
    (["mine.py:mlp"], ["no convs", "nothing to convert"]),
    (["mine.py:mlp", "--dry-run"], ["no convs", "nothing to convert"]),
    (["mine.py:converted"], ["already converted", "static model"]),
    (["mine.py:parallel"], ["DataParallel", "model.module"]),
    (["mine.py:compiled"], ["compiled", "_orig_mod"]),
    (["resnet18"], ["can't be downloaded", "--weights none", "--weights FILE"]),
    (["resnet18", "--weights", "IMAGENET1K_V9"], ["IMAGENET1K_V1", "--weights none"]),
    (["mine.py:net", "--weights", "nothing.pth"], ["There is no weights file", "nothing.pth"]),
    (["mine.py:net", "--weights", "other.pth"], ["doesn't fit", "stem.weight", "--model-arg"]),
    (["mine.py:net", "--weights", "code.pth"], ["would run code", "model.state_dict()"]),
    (["mine.py:net", "--weights", "pickle.pt"], ["can't be read"]),
    (["mine.py:net", "--weights", "short.pth"], ["cut short, damaged"]),
    (["mine.py:net", "--weights", "short.safetensors"], ["cut short, damaged"]),
    (["ls", "rezzznet"], ["'rezzznet'", "dyconvert ls"]),
    (["ls", "--source", "keras"], ["'keras'", "torchvision, timm, builtin"]),
]


@pytest.mark.parametrize(("arguments", "says"), BAD_INPUT, ids=[" ".join(case[0]) for case in BAD_INPUT])
def test_bad_input(arguments, says, cli, models_file, tmp_path):
    for folder in ("taken", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "taken" / "dyconvert.json").write_text("{}")
    state = seeded(ResidualNet).state_dict()
    torch.save(seeded(ResidualNet, 4).state_dict(), tmp_path / "other.pth")
    torch.save({"state_dict": RunsCode()}, tmp_path / "code.pth")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(RunsCode()))
    torch.save(state, tmp_path / "short.pth")
    save_file(state, tmp_path / "short.safetensors")
    for name in ("short.pth", "short.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2000])
    files = sorted(tmp_path.rglob("*"))
    ran = cli(*arguments)
    assert ran.code == 2
    assert not ran.stdout
    assert "Traceback" not in ran.stderr
    assert all(word in ran.said for word in says), ran.said
    assert sorted(tmp_path.rglob("*")) == files


def test_a_full_disk(cli, models_file, monkeypatch, tmp_path):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dyconvert.checkpoint.tensors.save_file", full)
    before = listed(tmp_path)
    ran = cli(f"{models_file}:net", "--input-size", 16)
    assert ran.code == 2
    assert "No space left on device" in ran.said
    assert "Free some space" in ran.said
    assert listed(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits on this system")
def test_a_full_disk_in_a_process_of_its_own(dyconvert_process, tmp_path):
    import resource

    ran = dyconvert_process(
        "digits-resnet8", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    )
    assert ran.code == 2
    assert "Traceback" not in ran.stderr
    assert "can't be written" in ran.said
    assert not listed(tmp_path)


def test_an_interrupt(cli, models_file, monkeypatch, tmp_path):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dyconvert.checkpoint.tensors.save_file", interrupted)
    before = listed(tmp_path)
    assert cli(f"{models_file}:net", "--input-size", 16).code == 130
    assert listed(tmp_path) == before


@pytest.mark.parametrize("verb", [dyconvert.plan, dyconvert.convert])
def test_wrapped_models(verb):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ModelError, match=r"DistributedDataParallel\. Convert model\.module"):
            verb(nn.parallel.DistributedDataParallel(seeded(ResidualNet)))
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ModelError, match="compiled"):
        verb(torch.compile(seeded(ResidualNet)))

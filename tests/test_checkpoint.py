"""save and load: what comes back, and what is refused."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from nets import FlatNet, ResidualNet, image, listed, outputs, same, seeded, trained
from safetensors.torch import load_file
from torch import nn

import dyconvert
from dyconvert import CheckpointError, ModelError, models

WHOLE = ["README.md", "dyconvert.json", "model.safetensors"]


@pytest.fixture
def saved(tmp_path, net) -> tuple[Path, nn.Module]:
    """A directory and the model in it."""
    dynamic = trained(net)
    return dyconvert.save(dynamic, tmp_path / "saved"), dynamic


# ---- What comes back ----


@pytest.mark.parametrize(
    ("specifier", "x"),
    [("builtin:digits-resnet8", torch.ones(2, 1, 8, 8)), ("torchvision:squeezenet1_1", torch.ones(1, 3, 64, 64))],
)
def test_a_source_builds_the_model_again(specifier, x, tmp_path):
    static, source = models.create(specifier, "none")
    dynamic = trained(static, method="dyconv")
    assert dyconvert.save(dynamic, tmp_path / "saved", source=source) == tmp_path / "saved"
    loaded = dyconvert.load(tmp_path / "saved")
    assert type(loaded) is type(static)
    assert not loaded.training
    assert same(loaded, dynamic)
    # The kernel may depend on the batch, but not on where the model came from: bit for bit.
    assert torch.equal(outputs(loaded, x), outputs(dynamic, x))
    # What was loaded knows its source, and can be saved without it.
    assert same(dyconvert.load(dyconvert.save(loaded, tmp_path / "again")), dynamic)


@pytest.mark.parametrize("method", dyconvert.METHODS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_users_model_is_passed_to_load(method, dims, tmp_path):
    dynamic = trained(seeded(ResidualNet, dims=dims), method=method, g=2)
    dyconvert.save(dynamic, tmp_path / "saved")
    mine = seeded(ResidualNet, dims=dims, seed=1).train()
    before = {key: tensor.clone() for key, tensor in mine.state_dict().items()}
    loaded = dyconvert.load(tmp_path / "saved", mine)
    assert same(loaded, dynamic)
    assert torch.equal(outputs(loaded, image(dims=dims)), outputs(dynamic, image(dims=dims)))
    assert mine.training
    assert type(mine.layer1[0].conv1) is type(mine.stem)
    assert same(mine, before)


def test_an_edited_plan_and_the_temperature_survive(tmp_path, net):
    plan = dyconvert.plan(net, "dyconv", scope="block", temperature=12.0)
    plan.skip("layer1.1.shortcut")
    plan.unshare("layer1.0.*")
    dynamic = dyconvert.convert(net, plan)
    dynamic.layer1[1].conv1.block_predictor.temperature.fill_(5.0)  # as annealing does
    loaded = dyconvert.load(dyconvert.save(dynamic, tmp_path / "saved"), net)
    assert loaded.layer1[1].conv1.block_predictor.temperature.item() == 5.0
    assert loaded.layer1[0].conv1.coefficient_predictor.temperature.item() == 12.0
    assert type(loaded.layer1[1].shortcut) is nn.Conv2d
    assert same(loaded, dynamic)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_survive(dtype, tmp_path):
    static, source = models.create("digits-resnet8")
    dynamic = trained(static).to(dtype)
    loaded = dyconvert.load(dyconvert.save(dynamic, tmp_path / "saved", source=source))
    assert same(loaded, dynamic)
    x = torch.ones(2, 1, 8, 8, dtype=dtype)
    assert torch.equal(outputs(loaded, x), outputs(dynamic, x))


def test_channels_last_and_tied_tensors(tmp_path):
    class Tied(FlatNet):
        def __init__(self):
            super().__init__()
            self.other_head = self.head

    dynamic = trained(seeded(Tied)).to(memory_format=torch.channels_last)
    loaded = dyconvert.load(dyconvert.save(dynamic, tmp_path / "saved"), Tied())
    assert same(loaded, dynamic)
    assert loaded.other_head.weight is loaded.head.weight


def test_code_of_ones_own_runs_only_where_trusted(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\n\ndef net(width):\n    return nn.Conv2d(8, width, 3)\n")
    static, source = models.create(f"{file}:net", arguments={"width": 4})
    directory = dyconvert.save(dyconvert.convert(static), tmp_path / "saved", source=source)
    with pytest.raises(CheckpointError, match=r"(?s)mine\.py:net.*model=.*trust_code=True"):
        dyconvert.load(directory)
    assert type(dyconvert.load(directory, trust_code=True)) is dyconvert.DynamicConv2d
    assert type(dyconvert.load(directory, nn.Conv2d(8, 4, 3))) is dyconvert.DynamicConv2d


def test_what_is_in_the_directory(saved):
    directory, dynamic = saved
    assert listed(directory) == WHOLE
    assert set(load_file(directory / "model.safetensors")) == set(dynamic.state_dict())
    description = json.loads((directory / "dyconvert.json").read_text())
    assert description["dyconvert"] == dyconvert.__version__
    assert description["torch"] == torch.__version__
    assert description["plan"]["convs"][0]["name"] == "stem"
    assert description["source"] is None


def test_an_older_save_is_replaced(saved, net):
    directory, _ = saved
    for seed in (1, 2):  # twice, as the weights' file name alternates
        newer = trained(net, seed=seed)
        dyconvert.save(newer, directory)
        assert same(dyconvert.load(directory, net), newer)
        assert len(listed(directory)) == 3


# ---- What is refused ----


def edit(**changes: object):
    def apply(directory: Path) -> None:
        file = directory / "dyconvert.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return apply


def edit_plan(directory: Path) -> None:
    plan = json.loads((directory / "dyconvert.json").read_text())["plan"]
    plan["method"]["activation"] = "softmax"  # every tensor would still fit
    edit(plan=plan)(directory)


def flip_a_bit(directory: Path) -> None:
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (directory / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: os.truncate(d / "model.safetensors", 1000), "truncated or altered"),
        (lambda d: os.truncate(d / "model.safetensors", 0), "truncated or altered"),
        (flip_a_bit, "truncated or altered"),
        (lambda d: (d / "model.safetensors").unlink(), "is missing"),
        (lambda d: (d / "dyconvert.json").unlink(), "has no dyconvert.json"),
        (lambda d: os.truncate(d / "dyconvert.json", 300), "can't be read"),
        (lambda d: (d / "dyconvert.json").write_text("[]"), "isn't what dyconvert writes"),
        (lambda d: (d / "dyconvert.json").write_bytes(b"\xff\xfe"), "can't be read"),
        (edit(schema_version=2), r"schema version 2.*pip install -U"),
        (edit(schema_version="one"), "schema_version"),
        (edit(surprise=1), "surprise"),
        (edit(weights="../elsewhere.safetensors"), "altered"),
        (edit(sha256="0" * 64), "altered"),
        (edit(source={"specifier": "torchvision:resnet18"}), "source"),
        (edit(source={"specifier": 3, "arguments": {}, "weights": None, "input_size": None}), "source"),
        (edit(plan={}), r"plan\."),
        (edit_plan, "plan .*altered"),
    ],
)
def test_damaged_checkpoints(damage, says, saved, net):
    directory, _ = saved
    damage(directory)
    with pytest.raises(CheckpointError, match=f"(?s){says}"):
        dyconvert.load(directory, net)


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (None, CheckpointError, r"Pass it as `model=\.\.\.`"),
        (FlatNet, CheckpointError, r"isn't the one that was saved.*layer1\.0\.conv1.*model="),
        (lambda: ResidualNet(width=4), CheckpointError, "isn't the one that was saved"),
        (lambda: nn.Linear(2, 2), ModelError, "no convs"),
        (lambda: dyconvert.convert(ResidualNet()), ModelError, "already converted"),
    ],
)
def test_load_with_another_architecture(model, error, says, saved):
    with pytest.raises(error, match=f"(?s){says}"):
        dyconvert.load(saved[0], model and model())


def test_load_from_nowhere(tmp_path, net):
    with pytest.raises(CheckpointError, match=r"no dyconvert\.json"):
        dyconvert.load(tmp_path / "nothing", net)


@pytest.mark.parametrize(
    ("place", "says"),
    [("full", "holds other files.*force=True"), ("file", "is a file"), ("file/under", "file is a file")],
)
def test_save_into_what_is_not_ours(place, says, tmp_path, net):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=says):
        dyconvert.save(trained(net), tmp_path / place)
    assert listed(tmp_path) == ["file", "full"]
    assert listed(tmp_path / "full") == ["notes.txt"]


def test_folders_that_may_not_be_read(saved, net, monkeypatch):
    def forbidden(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.listdir", forbidden)
    with pytest.raises(CheckpointError, match=r"can't be used: .*Permission denied"):
        dyconvert.save(trained(net), saved[0])
    monkeypatch.setattr("dyconvert.checkpoint.loading.check_ordinary", forbidden)
    with pytest.raises(CheckpointError, match=r"can't be read: .*Permission denied"):
        dyconvert.load(saved[0], net)


def test_save_what_was_not_converted(tmp_path, net):
    for model in (net, nn.DataParallel(dyconvert.convert(net))):
        with pytest.raises(ModelError, match=r"isn't what dyconvert\.convert or dyconvert\.load returned"):
            dyconvert.save(model, tmp_path / "saved")
    assert not listed(tmp_path)

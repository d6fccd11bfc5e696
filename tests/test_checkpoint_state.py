"""What a state dict may hold, and what a directory may: ties, extra state, the meta device; others' files, links."""

import json
import multiprocessing
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from nets import BasicBlock, FlatNet, ResidualNet, image, listed, outputs, same, seeded, trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from varied import randomised

import dyconvert
from dyconvert import CheckpointError, DyconvertError, ModelError, models


class TwoNames(nn.Module):
    """A block that is registered twice, as nnU-Net's, LPIPS's and DynUNet's are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = BasicBlock(8, 8)
        self.blocks = nn.ModuleList([self.first, BasicBlock(8, 8)])
        self.all = nn.ModuleDict({"first": self.first})

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.stem(x)))


class TiedConvs(nn.Module):
    """Heads that share a weight, and a buffer that is part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = BasicBlock(8, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("part", self.whole[2:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x)).mean((2, 3))
        return self.b(self.a(x)) + self.part.sum()


class Counting(FlatNet):
    """A model with extra state."""

    def __init__(self, value: object = None) -> None:
        super().__init__()
        self.value = {"steps": [1, 2], "name": "é"} if value is None else value

    def get_extra_state(self) -> object:
        return self.value

    def set_extra_state(self, state: object) -> None:
        self.value = state


class Versioned(nn.Module):
    """As torchvision's MNASNet: its second version keeps the scale itself, and the first kept its inverse."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = BasicBlock(8, 8)
        self.scale = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.block(self.stem(x))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: object) -> None:
        if local_metadata.get("version") not in (1, 2):
            raise ValueError(f"version should be 1 or 2, not {local_metadata.get('version')}")
        if local_metadata["version"] == 1:
            state_dict[f"{prefix}scale"] = 1 / state_dict[f"{prefix}scale"]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_versions_of_modules(tmp_path, monkeypatch):
    model = seeded(Versioned).eval()
    dynamic = dyconvert.convert(model, g=2)
    dyconvert.save(dynamic, tmp_path / "second")
    assert same(dyconvert.load(tmp_path / "second", seeded(Versioned)), dynamic)
    # What the first version wrote, the second reads as such.
    monkeypatch.setattr(Versioned, "_version", 1)
    dyconvert.save(dynamic, tmp_path / "first")
    monkeypatch.setattr(Versioned, "_version", 2)
    assert dyconvert.load(tmp_path / "first", seeded(Versioned)).scale.item() == pytest.approx(1 / 3)


class LoadsItself(FlatNet):
    """A model with a `load_state_dict` of its own, as CompressAI's, which takes no `assign`."""

    def load_state_dict(self, state_dict: dict, strict: bool = True) -> object:
        return super().load_state_dict(state_dict, strict=strict)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_load_state_dict_of_the_models_own(device, tmp_path):
    dynamic = trained(seeded(LoadsItself), g=2)
    dyconvert.save(dynamic, tmp_path / "saved")
    assert same(dyconvert.load(tmp_path / "saved", seeded(LoadsItself, seed=1).to(device)), dynamic)


def test_a_module_that_rejects_its_state(tmp_path, monkeypatch):
    dyconvert.save(dyconvert.convert(seeded(Versioned), g=2), tmp_path / "saved")

    def rejects(self: nn.Module, *args: object) -> None:
        raise ValueError("not mine")

    monkeypatch.setattr(Versioned, "_load_from_state_dict", rejects)
    with pytest.raises(CheckpointError, match=r"Versioned rejects the state that was saved: .*not mine"):
        dyconvert.load(tmp_path / "saved", seeded(Versioned))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_versions_in_weights_files(suffix, tmp_path, monkeypatch):
    model = seeded(Versioned)
    file = tmp_path / f"weights.{suffix}"
    monkeypatch.setattr(Versioned, "_version", 1 if suffix == "pt" else 2)
    save_file(model.state_dict(), file) if suffix == "safetensors" else torch.save(model.state_dict(), file)
    monkeypatch.setattr(Versioned, "_version", 2)
    other = seeded(Versioned)
    models.load_state_dict_into(other, models.read_state_dict(file), file)
    assert other.scale.item() == pytest.approx(3 if suffix == "safetensors" else 1 / 3)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("architecture", [TwoNames, TiedConvs, ResidualNet])
def test_saved_and_loaded(architecture, convert, meta, tmp_path):
    model = seeded(architecture)
    model = trained(model, g=2) if convert else model
    dyconvert.save(model, tmp_path / "saved", static=True)
    with torch.device("cpu"):
        static = seeded(architecture, seed=1)
    if meta:
        for module in static.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(value.detach().to("meta"))
        if architecture is TiedConvs:
            static.b.weight = static.a.weight
    loaded = dyconvert.load(tmp_path / "saved", static)
    assert same(loaded, model)
    assert torch.equal(outputs(loaded, image()), outputs(model, image()))
    if architecture is TiedConvs:
        assert loaded.a.weight is loaded.b.weight
    if architecture is TwoNames:
        assert loaded.blocks[0] is loaded.first is loaded.all["first"]
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("value", [None, torch.arange(3.0), {"a": {"b": [1.5, None, True]}}])
def test_extra_state(value, tmp_path):
    model = seeded(Counting, value)
    dyconvert.save(dyconvert.convert(model), tmp_path / "saved")
    loaded = dyconvert.load(tmp_path / "saved", Counting(value if isinstance(value, Tensor) else "other"))
    expected = model.value
    assert torch.equal(loaded.value, expected) if isinstance(expected, Tensor) else loaded.value == expected


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, object(), float("nan"), {"x": torch.ones(1)}])
def test_extra_state_that_needs_pickle(value, tmp_path):
    with pytest.raises(ModelError, match=r"_extra_state is a .* without pickle.*get_extra_state"):
        dyconvert.save(dyconvert.convert(Counting(value)), tmp_path / "saved")
    assert listed(tmp_path) == []


def test_a_dtype_that_a_file_cannot_hold(tmp_path):
    model = dyconvert.convert(seeded(FlatNet))
    model.register_buffer("odd", torch.ones(1, dtype=torch.complex128))
    with pytest.raises(ModelError, match="odd is a tensor of complex128"):
        dyconvert.save(model, tmp_path / "saved")


def test_a_buffer_that_is_nowhere(tmp_path):
    class Anchored(FlatNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("anchors", torch.ones(3), persistent=False)

    dyconvert.save(dyconvert.convert(Anchored()), tmp_path / "saved")
    with torch.device("meta"):
        bare = Anchored()
    with pytest.raises(CheckpointError, match=r"anchors .* meta device"):
        dyconvert.load(tmp_path / "saved", bare)


# ---- Others' files ----


def test_weights_of_others_stay(tmp_path):
    dynamic, net = trained(seeded(ResidualNet)), seeded(ResidualNet)
    save_file({"theirs": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(3):
        dyconvert.save(dynamic, tmp_path, force=True)
        assert same(dyconvert.load(tmp_path, net), dynamic)
    (tmp_path / "dyconvert.json").unlink()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_both_names_are_taken(tmp_path):
    for name in ("model.safetensors", "model-1.safetensors"):
        save_file({"theirs": torch.ones(3)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="which dyconvert didn't write"):
        dyconvert.save(trained(seeded(FlatNet)), tmp_path, force=True)
    assert listed(tmp_path) == ["model-1.safetensors", "model.safetensors"]
    assert list(load_file(tmp_path / "model.safetensors")) == ["theirs"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on this system")
@pytest.mark.parametrize(
    "name", ["dyconvert.json", "model.safetensors", "model-1.safetensors", "dyconvert.json.part", ".dyconvert-part-x"]
)
def test_links_are_not_followed(name, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("not yours")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / name).symlink_to(outside)
    for _ in range(3):
        dyconvert.save(trained(seeded(FlatNet)), tmp_path / "saved", force=True)
    assert outside.read_text() == "not yours"
    assert not (tmp_path / "saved" / "dyconvert.json").is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="no umask on this system")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        directory = dyconvert.save(trained(seeded(FlatNet)), tmp_path / "saved")
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o666 & ~mask}


def test_paths_are_kept_relative(tmp_path, monkeypatch):
    here = tmp_path / "project"
    here.mkdir()
    (here / "mine.py").write_text("from torch import nn\n\ndef net():\n    return nn.Conv2d(8, 4, 3)\n")
    static, source = models.create(f"{here / 'mine.py'}:net")
    dyconvert.save(dyconvert.convert(static), here / "runs" / "saved", source=source)
    assert json.loads((here / "runs" / "saved" / "dyconvert.json").read_text())["source"]["specifier"] == (
        "../../mine.py:net"
    )
    moved = here.rename(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    loaded = dyconvert.load(moved / "runs" / "saved", trust_code=True)
    # Moved again without its code, which is still where it was.
    alone = dyconvert.save(loaded, tmp_path / "other").rename(tmp_path / "deep")
    assert type(dyconvert.load(alone, trust_code=True)) is dyconvert.DynamicConv2d


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of files are text on this system")
def test_folders_whose_names_are_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xe9")
    folder.mkdir()
    (folder / "mine.py").write_text("from torch import nn\n\ndef net():\n    return nn.Conv2d(8, 4, 3)\n")
    static, source = models.create(f"{folder / 'mine.py'}:net")
    dyconvert.save(dyconvert.convert(static), tmp_path / "saved", source=source)
    assert type(dyconvert.load(tmp_path / "saved", trust_code=True)) is dyconvert.DynamicConv2d


# ---- Several processes ----


def test_a_model_that_is_replaced_twice_while_it_is_read(tmp_path, net, monkeypatch):
    """Then the description is again the one that was read first, and the weights that it names are gone."""
    from dyconvert.checkpoint import loading

    model, read = trained(net), loading.load_weights
    dyconvert.save(model, tmp_path / "saved")

    def replaced(*arguments: object) -> None:
        monkeypatch.setattr(loading, "load_weights", read)
        for _ in range(2):
            dyconvert.save(model, tmp_path / "saved")
        raise RuntimeError("unable to open file <...>: No such file or directory")

    monkeypatch.setattr(loading, "load_weights", replaced)
    assert same(dyconvert.load(tmp_path / "saved", net), model)


@pytest.mark.skipif(os.name == "nt", reason="no locks on this system")
def test_what_a_killed_save_left_is_nothing(tmp_path, net):
    left = tmp_path / "saved" / ".dyconvert-part-0"
    left.mkdir(parents=True)
    (left / "half").touch()
    dyconvert.save(trained(net), tmp_path / "saved")
    assert not left.exists()


def _save(directory: Path, seed: int, rounds: int, queue: object) -> None:
    torch.set_num_threads(1)
    model = trained(seeded(FlatNet), seed=seed)
    for _ in range(rounds):
        try:
            dyconvert.save(model, directory, force=True)
        except DyconvertError as error:
            queue.put(str(error))


@pytest.mark.skipif(os.name == "nt", reason="no locks on this system")
@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=pytest.mark.sweep)])
def test_two_savers_and_a_reader(rounds, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    directory = tmp_path / "race"
    savers = [context.Process(target=_save, args=(directory, seed, rounds, queue)) for seed in (1, 2)]
    known = [trained(seeded(FlatNet), seed=seed) for seed in (1, 2)]
    net = seeded(FlatNet)
    for saver in savers:
        saver.start()
    read = 0
    while any(saver.is_alive() for saver in savers):
        if (directory / "dyconvert.json").exists():
            loaded = dyconvert.load(directory, net)
            assert any(same(loaded, each) for each in known)
            read += 1
    assert [saver.exitcode for saver in savers] == [0, 0]
    assert queue.empty()
    assert read
    assert any(same(dyconvert.load(directory, net), each) for each in known)
    assert len(listed(directory)) == 3
    assert listed(tmp_path) == ["race"]


class Blocks(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Pair() for _ in range(count))
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


def test_a_model_that_lost_a_block_after_the_conversion(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = dyconvert.convert(seeded(Blocks), example=x)
    randomised(model)
    del model.blocks[2]
    model.last = nn.Conv2d(8, 8, 1)
    dyconvert.save(model, tmp_path / "saved")
    loaded = dyconvert.load(tmp_path / "saved", Blocks(2))
    assert torch.equal(loaded(x), model(x))
    assert dyconvert.Plan.from_json(loaded.dyconvert_plan.to_json())["last"].reason == "replaced after the conversion"
    model.blocks[0].b = nn.Conv2d(8, 8, 3, padding=1)
    with pytest.raises(dyconvert.ModelError, match=r"blocks\.0\.b was taken out or replaced"):
        dyconvert.save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()

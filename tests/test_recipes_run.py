"""Shipped recipes run: two steps each on fake images; the quickstart whole, as README has it."""

import json

import pytest

import dyconvert
from dyconvert import load_recipe
from dyconvert.finetuning.recipes.shipped import shipped_recipes

pytest.importorskip("lightning")

# Small enough for a run of two steps to take seconds; of the others, the shape is all that costs.
TINY = [
    "model.weights=none",
    "data.dataset=fake",
    "data.size=32",
    "data.resize=32",
    "data.images=16",
    "data.workers=0",
    "train.batch=4",
    "train.lr=0.001",  # the recipes' are for a thousand images a batch
    "train.max_steps=2",
    "train.precision=32-true",
    "train.devices=1",
    "train.accelerator=cpu",
]
NARROWED = ["narrow.calibration_images=8"]
# Ten seconds and more each; what they are of is tried by others.
LONG = {"segmentation-fcn-resnet50", "dy-resnet50", "dy-shufflenetv2"}
DRY = ["quickstart", "cifar10-resnet20", "dy-mobilenetv3-small", "dyconv-mobilenetv2"]


def tiny(name, directory):
    changes = [*TINY, f"output.directory={directory}"]
    recipe = load_recipe(name)
    if recipe.data.channels == 1:
        changes += ["data.size=8", "data.resize=8"]
    if recipe.pretrain is not None:
        changes.append("pretrain.epochs=1")
    if recipe.narrow is not None:
        changes += NARROWED
    if name == "dy-shufflenetv2":
        # On smaller images mixing the kernels alone takes more multiply-adds than the recipe leaves.
        changes += ["data.size=160", "data.resize=160"]
    return load_recipe(name, changes)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.sweep) if name in LONG else name for name in shipped_recipes()],
)
def test_two_steps_of_every_shipped_recipe(name, tmp_path):
    recipe = tiny(name, tmp_path / "out")
    summary = dyconvert.finetune(recipe, progress=False, trust_code=True)
    assert 0 <= summary.finetuned <= 100
    assert summary.metric == ("mIoU" if recipe.data.task == "segmentation" else "top-1")
    assert (summary.ema is not None) == (recipe.train.ema is not None)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["finetuned"] == summary.finetuned
    model = dyconvert.load(tmp_path / "out", trust_code=True)
    assert any(isinstance(module, dyconvert.DynamicConv) for module in model.modules())


@pytest.mark.parametrize("name", DRY)
def test_dry_run_of_a_shipped_recipe(name, cli, tmp_path):
    changes = [*TINY, *(["data.size=8", "data.resize=8"] if name == "quickstart" else [])]
    ran = cli("finetune", name, *changes, "--dry-run", "--json")
    assert ran.code == 0, ran.said
    found = json.loads(ran.stdout)
    assert found["steps"] == 2
    assert found["plan"]["convs"]
    assert found["schedule"][0]["lr"] > 0
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def quickstart(dyconvert_process, tmp_path, *changes):
    ran = dyconvert_process("finetune", "quickstart", *changes)
    assert ran.code == 0, ran.said
    for row in ("original", "converted", "fine-tuned"):
        assert row in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80 + len(str(tmp_path))
    directory = tmp_path / "runs" / "quickstart"
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["converted"] == pytest.approx(summary["original"]), "a conversion changes nothing"
    assert dyconvert.load(directory).fc.out_features == 10
    return summary


def test_a_short_quickstart(dyconvert_process, tmp_path):
    changes = ["pretrain.epochs=1", "train.epochs=1"]
    summary = quickstart(dyconvert_process, tmp_path, *changes)
    again = dyconvert_process("finetune", "quickstart", *changes, "--resume", "--json")
    assert json.loads(again.stdout)["finetuned"] == summary["finetuned"], "a finished run isn't run again"


@pytest.mark.sweep
def test_the_readmes_quickstart(dyconvert_process, tmp_path):
    summary = quickstart(dyconvert_process, tmp_path)
    assert summary["finetuned"] > summary["original"] + 1


def test_a_new_head_is_part_of_the_result(tmp_path):
    changes = [*TINY, "data.size=8", "data.resize=8", "pretrain=null", "model.weights=default"]
    changes += ["model.arguments={}", "model.num_classes=4", f"output.directory={tmp_path / 'out'}"]
    summary = dyconvert.finetune("quickstart", changes, progress=False, trust_code=True)
    assert dyconvert.load(summary.directory).fc.out_features == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data.dataset=imagefolder", "data.root=nowhere"], "no data folder"),
        (["model.weights=missing.pth"], "missing.pth"),
        (["model.specifier=resnet81"], "resnet81"),
        (["model.num_classes=7"], "The data has 10 classes"),
        (["train.batch=5000"], "5000"),
        (["train.devices=64", "train.batch=64", "train.accelerator=gpu"], "devices"),
        (["convert.include=[nothing.*]"], "nothing.*"),
    ],
)
def test_what_is_refused_before_any_training(cli, tmp_path, changes, expected):
    ran = cli("finetune", "quickstart", *changes)
    assert ran.code == 2
    assert expected in ran.said
    assert "Traceback" not in ran.said
    assert "epoch" not in ran.stderr
    assert not (tmp_path / "runs" / "quickstart" / "summary.json").exists()

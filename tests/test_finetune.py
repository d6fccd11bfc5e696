"""Fine-tuning by a recipe, end to end, on small networks."""

import copy
import csv
import io
import math
from pathlib import Path

import pytest
import torch
from finetune_nets import FILE, recipe
from torch import nn
from torchvision import models as tv

import dyconvert
from dyconvert import finetune
from dyconvert.finetuning.data.augment import train_transform
from dyconvert.finetuning.data.datasets import load_split
from dyconvert.finetuning.data.loading import train_loader, val_loader
from dyconvert.finetuning.recipes.schema import Dynamic, Train
from dyconvert.finetuning.training.module import distillation
from dyconvert.finetuning.training.optim import lr_factor, parameter_groups
from dyconvert.nn import CoefficientPredictor, DynamicConv


def load(directory: Path) -> nn.Module:
    return dyconvert.load(directory, trust_code=True)


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_digits_learn_and_every_result_loads(tmp_path):
    """From random weights, a static network and then a dynamic one that is better."""
    made = dyconvert.load_recipe(
        "quickstart",
        ["train.epochs=2", "pretrain.epochs=2", "train.ema=0.9", f"output.directory={tmp_path / 'run'}"],
    )
    found = dyconvert.finetune(made, progress=False, trust_code=True)
    assert found.original > 30  # of 10 classes; two epochs of the static network
    assert found.converted == pytest.approx(found.original, abs=0.3)  # one of 360 images
    assert found.finetuned > found.original
    assert found.parameters[1] > 5 * found.parameters[0]
    images, labels = dyconvert.builtin.load_digits_test()
    for part, value in ((".", found.best), ("last", found.finetuned), ("ema", found.ema)):
        model = dyconvert.load(tmp_path / "run" / part)
        assert any(isinstance(module, DynamicConv) for module in model.modules())
        with torch.no_grad():
            measured = 100 * (model(images).argmax(1) == labels).float().mean().item()
        assert measured == pytest.approx(value, abs=0.3)
    assert dyconvert.load_recipe(tmp_path / "run/recipe.yaml") == made
    assert [row["val_metric"] for row in rows(tmp_path / "run") if row["val_metric"]]
    assert not (tmp_path / "run/resume.ckpt").exists()


def test_static_control_is_the_same_run_without_dynamic_convs(tmp_path):
    found = finetune(recipe(tmp_path, convert=None, distill={}), progress=False, trust_code=True)
    assert found.converted is None
    assert found.parameters[0] == found.parameters[1]
    model = load(tmp_path / "run")
    assert not any(isinstance(module, DynamicConv) for module in model.modules())
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize("override", ["convert.g=2", "convert=null"])
def test_narrowed_networks_train_and_load(tmp_path, override):
    made = recipe(tmp_path, override, narrow={"width": 0.5, "round_to": 2, "calibration_images": 32})
    found = finetune(made, progress=False, trust_code=True)
    assert found.converted is not None
    model = load(tmp_path / "run")
    assert model[3].out_channels == 4
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert found.macs[1] < found.macs[0]


def test_segmentation_has_masks_an_auxiliary_head_and_mean_iou(tmp_path):
    made = recipe(
        tmp_path,
        model="Segmenter",
        data={"task": "segmentation", "num_classes": 3, "augment": "segmentation", "images": 20},
        train={"batch": 4, "epochs": 1},
        distill={},
    )
    found = finetune(made, progress=False, trust_code=True)
    assert found.metric == "mIoU"
    assert 0 < found.finetuned < 100


def test_max_steps_ends_within_an_epoch_and_is_validated(tmp_path):
    found = finetune(recipe(tmp_path, "train.max_steps=2"), progress=False, trust_code=True)
    assert found.epochs == pytest.approx(2 / 6)
    assert found.best == found.finetuned
    assert load(tmp_path / "run").training is False


def test_temperature_falls_and_experts_wait(tmp_path):
    made = recipe(
        tmp_path,
        convert={"method": "dyconv", "g": 3},
        dynamic={"temperature": {"start": 20, "end": 2, "epochs": 1}, "freeze_experts_epochs": 5},
        train={"weight_decay": 0.1},
    )
    finetune(made, progress=False, trust_code=True)
    assert [float(row["temperature"]) for row in rows(tmp_path / "run") if row["temperature"]] == [5.0, 2.0]
    model = load(tmp_path / "run/last")
    start = recipe_start(made)
    for name, module in model.named_modules():
        if isinstance(module, CoefficientPredictor):
            assert module.temperature == 2
            assert module.linear.weight.abs().sum() > 0
        if isinstance(module, DynamicConv):
            assert torch.equal(module.weight, start.get_submodule(name).weight)
    assert not torch.equal(model[0].weight, start[0].weight)


def test_a_late_conversion_trains_as_the_static_network_until_then(tmp_path):
    for name in ("frozen", "static", "turned"):
        (tmp_path / name).mkdir()
    frozen = recipe(tmp_path / "frozen", dynamic={"freeze_predictors_epochs": 2, "predictor_adam": 0.01}, model="plain")
    finetune(frozen, progress=False, trust_code=True)
    finetune(recipe(tmp_path / "static", convert=None, model="plain"), progress=False, trust_code=True)
    dynamic, static = (load(tmp_path / name / "run/last") for name in ("frozen", "static"))
    convs = [module for module in dynamic.modules() if isinstance(module, DynamicConv)]
    assert len(convs) == 2
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(dynamic(x), static(x), rtol=1e-4, atol=1e-5)
    assert all(not m.linear.weight.any() for m in dynamic.modules() if isinstance(m, CoefficientPredictor))
    turned = recipe(tmp_path / "turned", dynamic={"freeze_predictors_epochs": 1.5, "predictor_adam": 0.01})
    finetune(turned, progress=False, trust_code=True)
    found = [m for m in load(tmp_path / "turned/run/last").modules() if isinstance(m, CoefficientPredictor)]
    assert all(m.linear.weight.any() for m in found)


@pytest.mark.parametrize("factor", [0.0, 1.0, 10.0])
def test_decay_of_experts(tmp_path, factor):
    made = recipe(tmp_path, dynamic={"expert_decay": factor}, train={"weight_decay": 0.1, "lr": 0.01})
    groups = {group["name"]: group for group in parameter_groups(recipe_start(made), made.train, made.dynamic)}
    # What a step takes off a weight: rate times decay.
    assert groups["experts"]["lr"] * groups["experts"]["weight_decay"] == pytest.approx(factor * 0.001)
    assert groups["weights"]["lr"] * groups["weights"]["weight_decay"] == pytest.approx(0.001)


def recipe_start(made: dyconvert.Recipe) -> nn.Module:
    """The converted network before training."""
    from dyconvert.finetuning.network import create_original, transform

    return transform(create_original(made)[0], made)


def test_the_same_seed_gives_the_same_run_and_workers_do_not_matter(tmp_path):
    results = []
    for index, override in enumerate(("data.workers=0", "data.workers=2", "train.seed=1")):
        folder = tmp_path / str(index)
        folder.mkdir()
        finetune(recipe(folder, override, train={"epochs": 1, "cutmix": 1.0}), progress=False, trust_code=True)
        results.append(load(folder / "run/last").state_dict())
    first, workers, other = results
    assert all(torch.equal(first[name], workers[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_fine_tuning_does_not_touch_the_global_generator(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    made = recipe(tmp_path, train={"epochs": 1})
    torch.manual_seed(5)
    finetune(made, progress=False, trust_code=True)
    assert torch.equal(torch.rand(3), expected)


def test_norms_biases_and_predictors_are_not_decayed_and_predictors_have_a_rate_of_their_own():
    model = dyconvert.convert(tv.mobilenet_v2(num_classes=4), g=2)
    groups = parameter_groups(model, Train(lr=0.1, weight_decay=1e-4), Dynamic(predictor_lr=0.5, expert_lr=1))
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(of) == len(list(model.parameters()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            decayed = name == "weight" and isinstance(module, nn.Conv2d | DynamicConv | nn.Linear)
            group = of[id(parameter)]
            if group["lr"] == 0.05:
                assert isinstance(module, nn.Linear)
                assert group["weight_decay"] == 0
            else:
                assert group["weight_decay"] == (1e-4 if decayed else 0)
    predictors = sum(len(list(m.parameters())) for m in model.modules() if isinstance(m, CoefficientPredictor))
    assert sum(len(group["params"]) for group in groups if group["lr"] == 0.05) == predictors


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.5), ("poly", 0.5**0.9), ("constant", 1.0)])
def test_the_learning_rate_rises_and_falls(schedule, middle):
    factor = lr_factor(Train(schedule=schedule, warmup_epochs=0.5), 100, 20)
    assert [round(factor(step), 6) for step in (0, 9)] == [round(1 / 11, 6), round(10 / 11, 6)]
    assert factor(10) == 1
    assert factor(55) == pytest.approx(middle)
    assert factor(100) == pytest.approx(1 if schedule == "constant" else 0, abs=1e-12)


def test_distillation_is_zero_for_the_teacher_itself_and_kl_otherwise():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 7, dtype=torch.float64)
    assert distillation(teacher, teacher, 4.0).item() == pytest.approx(0, abs=1e-6)  # it computes in float32
    p = (teacher / 4).softmax(1)
    expected = 16 * (p * (p.log() - (student / 4).log_softmax(1))).sum(1).mean()
    assert distillation(student, teacher, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_batches_of_several_processes_are_those_of_one(tmp_path):
    made = recipe(tmp_path)
    part = load_split(made, "train", 4, print)
    [one] = [list(train_loader(made, part, 0, 1))]
    two = [list(train_loader(made, part, rank, 2)) for rank in (0, 1)]
    for batch, *shares in zip(one, *two, strict=True):
        for whole, *parts in zip(batch, *shares, strict=True):
            assert torch.equal(whole, torch.cat(parts))
    resumed = list(train_loader(made, part, 0, 1, epoch=0, done=4))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one[4:], resumed, strict=True))
    other = next(iter(train_loader(made, part, 0, 1, epoch=1)))
    assert not torch.equal(one[0][0], other[0])


def test_every_validation_image_counts_once_with_three_processes(tmp_path):
    made = recipe(tmp_path)
    part = load_split(made, "val", 4, print)
    loaders = [val_loader(made, part, rank, 3) for rank in range(3)]
    assert len({len(loader) for loader in loaders}) == 1
    targets = torch.cat([targets for loader in loaders for _, targets in loader])
    assert (targets >= 0).sum() == len(part) == 20


def test_subsets_are_balanced_and_the_same_for_the_same_seed(tmp_path):
    def chosen(*overrides: str) -> list[int]:
        made = recipe(tmp_path, "data.limit_train=22", *overrides)
        part = load_split(made, "train", 4, print)
        counts = torch.bincount(torch.from_numpy(part.images.labels[part.chosen]))
        assert counts.max() - counts.min() <= 1
        return part.chosen.tolist()

    assert chosen() == chosen()
    assert chosen() != chosen("data.subset_seed=1")


@pytest.mark.parametrize(
    "augment", ["none", "flip", "shift", "cifar", "imagenet", "imagenet-randaugment", "imagenet-trivialaugment"]
)
def test_presets_give_images_of_the_size(tmp_path, augment):
    made = recipe(tmp_path, f"data.augment={augment}", "data.size=24")
    for shape in ((3, 24, 24), (3, 30, 50), (3, 16, 16)):
        image = torch.randint(256, shape, dtype=torch.uint8)
        assert train_transform(made.data)(image).shape == (3, 24, 24)


def test_teacher_is_the_original_and_is_not_saved(tmp_path, monkeypatch):
    """With all the weight on distillation and no learning rate to speak of, the loss is that of the start: none."""
    made = recipe(
        tmp_path,
        "train.lr=1e-9",
        "output.checkpoint_steps=2",
        train={"epochs": 1},
        distill={"weight": 1.0},
        model="plain",
    )
    keys = []
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda content, *rest: (keys.extend(content["state_dict"]), save(content, *rest))
    )
    finetune(made, progress=False, trust_code=True)
    [loss] = [float(row["epoch_loss"]) for row in rows(tmp_path / "run") if row["epoch_loss"]]
    assert math.isclose(loss, 0, abs_tol=1e-5)
    assert keys
    assert all(key.startswith("model.") for key in keys)
    expected = copy.deepcopy(recipe_start(made)).state_dict()
    assert {key.removeprefix("model.") for key in keys} == expected.keys()


def test_summary_is_a_table_of_eighty_columns(tmp_path):
    from rich.console import Console

    found = finetune(recipe(tmp_path, "train.ema=0.5", train={"epochs": 1}), progress=False, trust_code=True)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    for word in ("original", "converted", "fine-tuned", "EMA", "parameters", "MACs", "top-1", "run"):
        assert word in text
    assert FILE.name not in text

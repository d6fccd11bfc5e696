"""Teachers: any network with weights, its outputs live or kept, and the features that its head reads."""

import itertools

import pytest
import torch
from nets import equal

import dyconvert
from dyconvert import finetune, load_recipe, models
from dyconvert.errors import DyconvertError, RecipeError
from dyconvert.finetuning.network import create_original, transform
from dyconvert.finetuning.training import teacher as teachers
from dyconvert.finetuning.training.teacher import Teacher, feature_distillation

QUICK = [
    "pretrain=null",
    "model.specifier=builtin:digits-resnet8",
    "model.arguments={}",
    "model.weights=default",
    "data.limit_train=128",
    "data.limit_val=50",
    "data.views=3",
    "train.batch=32",
    "train.epochs=2",
    "train.lr=0.02",
    "distill={teacher: 'builtin:digits-resnet8', weight: 0.9}",
]


def recipe(tmp_path, *overrides, name="run"):
    return load_recipe("quickstart", [*QUICK, f"output.directory={tmp_path / name}", *overrides])


def last(tmp_path, name="run"):
    return dyconvert.load(tmp_path / name / "last").state_dict()


def cache(tmp_path):
    return ["distill.cache=true", f"distill.cache_directory={tmp_path / 'cache'}"]


@pytest.fixture
def calls(monkeypatch):
    """How many images teachers have seen."""
    seen = []
    ask = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, images: seen.append(len(images)) or ask(self, images))
    return seen


@pytest.mark.parametrize("features", [0.0, 0.5])
def test_a_cached_run_is_the_uncached_one(tmp_path, features, calls):
    more = [f"distill.features={features}", "narrow.width=0.5"]
    live = finetune(recipe(tmp_path, *more, name="live"), progress=False)
    kept = finetune(recipe(tmp_path, *more, *cache(tmp_path), name="kept"), progress=False)
    for key, tensor in last(tmp_path, "live").items():
        # Rounded to float16, the teacher's outputs have errors of 5e-4.
        torch.testing.assert_close(last(tmp_path, "kept")[key], tensor, rtol=0.02, atol=2e-3)
    assert abs(live.finetuned - kept.finetuned) <= 2.0  # one image of 50
    # Another seed sees the same views, in another order, and doesn't ask the teacher again.
    calls.clear()
    finetune(recipe(tmp_path, *more, *cache(tmp_path), "train.seed=1", name="other"), progress=False)
    assert sum(calls) <= 50 + 4, "but for its score, and the width of its features"
    assert len(list((tmp_path / "cache").glob("*/view-*.safetensors"))) == 3


@pytest.mark.parametrize("harm", ["cut short", "changed", "of another key", "empty"])
def test_what_was_kept_is_checked(tmp_path, harm, calls):
    finetune(recipe(tmp_path, *cache(tmp_path)), progress=False)
    [file] = (tmp_path / "cache").glob("*/view-1.safetensors")
    whole = file.read_bytes()
    if harm == "cut short":
        file.write_bytes(whole[:-10])
    elif harm == "changed":
        file.write_bytes(whole[:-10] + bytes(10))
    elif harm == "of another key":
        file.write_bytes(whole.replace(file.parent.name.encode(), b"0" * len(file.parent.name)))
    else:
        file.write_bytes(b"")
    calls.clear()
    finetune(recipe(tmp_path, *cache(tmp_path), name="again"), progress=False)
    assert sum(calls) == 50 + 2 + 128, "one view is made anew"
    assert len(file.read_bytes()) == len(whole)
    assert equal(last(tmp_path), last(tmp_path, "again"))


def test_a_key_is_of_all_that_the_outputs_depend_on(tmp_path):
    changes = [
        [],
        ["data.augment=cifar"],
        ["data.limit_train=96"],
        ["distill.teacher_mean=[0.1]"],
        ["distill.features=0.1"],
    ]
    for index, change in enumerate(changes):
        finetune(recipe(tmp_path, *cache(tmp_path), *change, "train.epochs=1", name=str(index)), progress=False)
        assert len(list((tmp_path / "cache").iterdir())) == index + 1
    for index, change in enumerate([["train.lr=0.1"], ["data.views=2"], ["convert.g=2"]]):
        finetune(recipe(tmp_path, *cache(tmp_path), *change, "train.epochs=1", name=f"same{index}"), progress=False)
    assert len(list((tmp_path / "cache").iterdir())) == len(changes)


def test_a_stop_while_outputs_are_made_keeps_those_that_are(tmp_path, monkeypatch):
    from dyconvert.finetuning.training import teacher_cache

    numbers = itertools.count()

    def make(self, number):
        if next(numbers) == 1:
            raise KeyboardInterrupt
        return whole(self, number)

    whole = teacher_cache._Maker.make
    monkeypatch.setattr(teacher_cache._Maker, "make", make)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe(tmp_path, *cache(tmp_path)), progress=False)
    assert len(list((tmp_path / "cache").glob("*/view-*.safetensors"))) == 1
    finetune(recipe(tmp_path, *cache(tmp_path)), resume=True, progress=False)
    assert next(numbers) == 4, "two more, of three"
    assert not list((tmp_path / "cache").glob("*/*.part"))


def test_a_teacher_gets_images_of_its_own_normalisation(tmp_path):
    images = torch.rand(4, 1, 8, 8)
    theirs = recipe(
        tmp_path, "data.mean=[0.3]", "data.std=[0.2]", "distill.teacher_mean=[0.1]", "distill.teacher_std=[2]"
    )
    module, _ = models.create("digits-resnet8")
    taught = Teacher(module, theirs)((images - 0.3) / 0.2)
    torch.testing.assert_close(taught.logits, module((images - 0.1) / 2))
    assert taught.features is None


def test_features_of_the_original_start_equal(tmp_path):
    ours = recipe(tmp_path, "distill={features: 1.0}", "convert.g=2")
    original, _ = create_original(ours)
    teacher = Teacher(original, ours)
    student = transform(original, ours).eval()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    distilled = feature_distillation(ours, original, student, teacher)
    assert not list(distilled.parameters()), "nothing to map: they are the same features"
    with teachers.reading(distilled.head_in(student)) as read:
        student(images)
    taught = teacher(images).features
    assert distilled(read[0], taught) < 1e-8
    # A constant answer, the mean, has the error 1 or less: the variance of the teacher's, over images of noise.
    assert 0.01 < distilled(taught.mean(0, keepdim=True).expand_as(taught), taught) <= 1


def test_a_run_with_features_resumes_bit_for_bit(tmp_path):
    more = ["distill.features=0.5", "narrow.width=0.5", "train.epochs=3"]
    finetune(recipe(tmp_path, *more, name="whole"), progress=False)

    class Stop(Exception):
        pass

    def stop(self, *arguments):
        save(self, *arguments)
        if arguments[0].current_epoch == 1:
            raise Stop

    from dyconvert.finetuning.training.checkpoints import Checkpoints

    save = Checkpoints.on_train_epoch_end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_epoch_end", stop)
        with pytest.raises(Stop):
            finetune(recipe(tmp_path, *more, name="parts"), progress=False)
    finetune(recipe(tmp_path, *more, name="parts"), resume=True, progress=False)
    assert equal(last(tmp_path, "whole"), last(tmp_path, "parts"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["distill.teacher=builtin:nosuch"], "The teacher .*no model 'nosuch'"),
        (["distill.teacher=builtin:cifar-resnet20"], "The teacher .*don't come with dyconvert.*resnet20"),
        (["distill.teacher=builtin:cifar-resnet20", "distill.teacher_weights=none"], "can't take images of 1x8x8"),
        (["distill.cache=true", "data.views=null"], r"distill\.cache needs data\.views"),
        (["distill.cache=true", "train.mixup=0.2"], r"distill\.cache is of single images"),
        (["distill.features=1", "train.compile=true"], r"distill\.features doesn't go with train\.compile"),
        (["data.augment=imagenet"], r"data\.views goes with data\.augment = none, flip, shift, cifar"),
        (["data.resize=12"], r"data\.views needs images that fit into memory, all of 8 x 8"),
        (["distill.teacher_std=[1, 2, 3]"], r"distill\.teacher_std has 3 numbers for 1 channels"),
        (["distill.cache=true", "distill.cache_directory=/dev/null/x"], r"can't be kept in .*distill\.cache_directory"),
    ],
)
def test_bad_teachers(tmp_path, overrides, says):
    with pytest.raises(DyconvertError, match=f"(?s){says}"):
        finetune(recipe(tmp_path, *overrides), progress=False)


def test_a_teacher_of_other_classes(tmp_path):
    with pytest.raises(RecipeError, match="tells 10 classes apart, and the network 7"):
        teachers.create_teacher(recipe(tmp_path), torch.nn.Identity(), 7)

"""Recipes: read whole, with every error at once; shipped ones; and the commands around them."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

import dyconvert
from dyconvert import RecipeError, load_recipe
from dyconvert.finetuning.recipes.recipe import json_schema
from dyconvert.finetuning.recipes.shipped import shipped_recipes, shipped_sweeps
from dyconvert.finetuning.sweeps.schema import load_sweep

MINIMAL = """\
model:
  specifier: builtin:digits-resnet8
data:
  dataset: digits
  size: 8
  channels: 1
  mean: [0.0]
  std: [1.0]
  augment: shift
"""


@pytest.fixture
def recipe_file(tmp_path):
    def write(text, name="mine.yaml"):
        file = tmp_path / name
        file.write_text(textwrap.dedent(text))
        return file

    return write


def errors_of(*arguments):
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments)
    return str(caught.value)


def test_what_a_recipe_does_not_say_has_its_default(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL))
    assert recipe.name == "mine"
    assert recipe.convert.resolved().g == 6
    assert recipe.narrow is None
    assert recipe.train.decay_exclude == ["norm", "bias", "predictor"]
    assert recipe.input_size == (1, 8, 8)


def test_a_resolved_recipe_reads_back_the_same(recipe_file):
    recipe = load_recipe("cifar10-resnet20", ["narrow.width=0.5", "dynamic.temperature={start: 10.0}"])
    assert load_recipe(recipe_file(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.lr=5e-3", "train", "lr", 0.005),
        ("train.lr=1", "train", "lr", 1.0),
        ("train.batch=64", "train", "batch", 64),
        ("data.mean=[0.5]", "data", "mean", (0.5,)),
        ("convert.include=[layer1.*, 'layer2.*']", "convert", "include", ["layer1.*", "layer2.*"]),
        ("narrow.flops=0.3", "narrow", "flops", 0.3),
        ("distill={weight: 1.0}", "distill", "weight", 1.0),
        ("output.directory=a=b", "output", "directory", "a=b"),
    ],
)
def test_overrides(recipe_file, override, section, key, value):
    recipe = load_recipe(recipe_file(MINIMAL), [override])
    assert getattr(getattr(recipe, section), key) == value


def test_null_takes_a_section_away(recipe_file):
    assert load_recipe(recipe_file(MINIMAL), ["convert=null"]).convert is None
    assert load_recipe(recipe_file(MINIMAL), ["convert=null", "convert.g=2"]).convert.g == 2


def test_all_errors_at_once_with_path_line_and_nearest_name(recipe_file):
    file = recipe_file("""\
        model:
          specifier: resnet18
          wieghts: default
        convert:
          method: dynett
          scope: blok
        data:
          dataset: digits
          root: 3
        train:
          epochs: ten
          lr: true
          devices: many
          lr: 0.1
        lr: 0.2
        distil: {}
        """)
    message = errors_of(file, ["train.batch=x", "nonsense", "train.epohs=3", "data.size=["])
    for expected in (
        "model.wieghts (line 3): unknown key; did you mean model.weights?",
        "convert.method (line 5): There is no method 'dynett'. Did you mean 'dynet'?",
        "convert.scope (line 6): input should be 'layer' or 'block' (did you mean 'block'?), not \"blok\"",
        "data.root (line 9): input should be a valid string, not 3",
        'train.epochs (line 11): input should be a valid integer, not "ten"',
        "train.devices (line 13)",
        "train.lr (line 14): given twice, first on line 12",
        "lr (line 15): unknown key; did you mean pretrain.lr or train.lr?",
        "distil (line 16): unknown key; did you mean distill?",
        'train.batch=x (command line): input should be a valid integer, not "x"',
        "nonsense (command line): isn't of the form",
        "train.epohs=3 (command line): unknown key; did you mean train.epochs?",
        "data.size=[ (command line): its value isn't YAML",
    ):
        assert expected in message
    assert str(file) in message
    assert "13 errors" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["train.lr=true"], "valid number, not true"),
        (["train.lr='0.1'"], 'valid number, not "0.1"'),
        (["train.lr=-1"], "greater than 0"),
        (["train.lr=.nan"], "train.lr=.nan"),
        (["train.epochs=1.5"], "valid integer"),
        (["model=null"], "model=null (command line)"),
        (["data.channels=3"], "mean has 1 numbers for 3 channels"),
        (["data.std=[0.0]"], "std has to be above 0"),
        (["data.dataset=imagefolder"], "data.root is missing"),
        (["data.dataset=imagenet"], "'torchvision:NAME'"),
        (["data.task=segmentation"], "data.augment = shift doesn't go with data.task = segmentation"),
        (["convert.method=dyconv", "convert.g=1"], "softmax over one expert"),
        (["narrow={}"], "give one of width"),
        (["narrow.width=0.5", "narrow.flops=0.5"], "give one of width"),
        (["narrow.width=1.5"], "less than or equal to 1"),
        (["train.accumulate=3"], "batch = 128 can't be split evenly among 1 processes and 3"),
        (["model.input_size=[3, 8, 8]"], "model.input_size has 3 channels"),
        (["model.new_head=true", "distill={}"], "distill needs a teacher"),
        (["name=a/b"], "name=a/b (command line)"),
        (["train.lr.x=3"], "train.lr.x=3 (command line)"),
    ],
)
def test_what_is_refused(recipe_file, changes, expected):
    assert expected in errors_of(recipe_file(MINIMAL), changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds nothing"),
        ("- a\n- b\n", "holds a list"),
        ("model: [1, 2\n", "isn't YAML at line"),
        ("model: {specifier: a, arguments: {day: 2020-01-01}}\n", "put it into quotes"),
        ("name: x\n", "model: missing"),
    ],
)
def test_files_that_are_no_recipe(recipe_file, text, expected):
    assert expected in errors_of(recipe_file(text))


def test_names_and_files_that_are_not_there(tmp_path):
    assert "Did you mean quickstart?" in errors_of("quikstart")
    assert "doesn't exist" in errors_of(tmp_path / "none.yaml")
    assert "is a sweep" in errors_of("ablate-g")


def test_a_models_file_is_found_beside_the_recipe(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text("")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    text = MINIMAL.replace("builtin:digits-resnet8", "net.py:make")
    assert load_recipe(recipe_file(text)).model.specifier == f"{tmp_path / 'net.py'}:make"
    # Where it isn't there, it is meant from the current folder, as on the command line.
    assert load_recipe(recipe_file(text), ["model.specifier=x.py:f"]).model.specifier == f"{elsewhere / 'x.py'}:f"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes(name):
    recipe = load_recipe(name)
    text = shipped_recipes()[name].read_text()
    assert recipe.name == name
    assert recipe.description
    assert f"dyconvert finetune {name}" in text, "a recipe opens with the commands that run it"
    # What it names exists: the model, its weights, the method.
    source = dyconvert.models.Source(recipe.model.specifier, recipe.model.arguments, recipe.model.weights, None)
    if recipe.data.task == "classification" and name != "cifar10-resnet20":
        assert dyconvert.models.build(source) is not None


@pytest.mark.parametrize("name", shipped_sweeps())
def test_shipped_sweeps(name):
    sweep = load_sweep(name)
    assert len(sweep.recipes()) == len(sweep.runs)
    assert sweep.seeds == [0, 1, 2]


def test_json_schema_describes_every_section():
    schema = json_schema()
    assert set(schema["properties"]) >= {"model", "convert", "narrow", "data", "train", "dynamic", "distill", "output"}
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Train"]["properties"]["lr"]["description"]


def test_the_commands(cli, tmp_path):
    listed = json.loads(cli("recipes", "ls", "--json").stdout)
    assert {"quickstart", "dy-resnet50"} <= set(listed["recipes"])
    assert "ablate-g" in listed["sweeps"]
    assert cli("recipes", "show", "quickstart").stdout == shipped_recipes()["quickstart"].read_text()

    mine = tmp_path / "mine.yaml"
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "net.py").write_text("")
    (theirs / "net.yaml").write_text(MINIMAL.replace("builtin:digits-resnet8", "net.py:make"))
    copied = cli("recipes", "cp", theirs / "net.yaml", mine)
    assert copied.code == 0
    assert (tmp_path / "net.py").is_file(), "the model's file goes with it"
    assert load_recipe(mine).model.specifier == f"{tmp_path / 'net.py'}:make"
    again = cli("recipes", "cp", "quickstart", mine)
    assert again.code == 2
    assert "exists already" in again.said

    bad = tmp_path / "bad.yaml"
    bad.write_text("model: {specifer: x}\n")
    checked = cli("recipes", "validate", mine, bad, "ablate-g")
    assert checked.code == 2
    assert f"{mine}: ok" in checked.stdout.replace("\n", " ")
    assert "ablate-g: ok" in checked.stdout
    assert "did you mean model.specifier?" in checked.said


def test_importing_dyconvert_imports_no_trainer():
    code = "import sys, dyconvert; dyconvert.load_recipe; print([m for m in ('lightning', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.skipif(os.name == "nt", reason="a current folder can't be deleted on this system")
def test_a_current_folder_that_was_deleted(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(RecipeError, match="current folder was deleted"):
        _ = load_recipe("quickstart").directory

"""Models from every kind of specifier, with every kind of weights, and what is said when that fails."""

import json
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from nets import equal

from dyconvert.builtin import MODELS, accuracy, load_digits_test
from dyconvert.errors import ModelError
from dyconvert.models import (
    Source,
    build,
    create,
    list_models,
    parse_arguments,
    read_state_dict,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    """Whatever is downloaded fails, and nothing that this machine downloaded before is found."""

    def fail(url, *args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


# ---- Specifiers ----


def test_builtin_model_reads_digits():
    model, source = create("digits-resnet8")
    assert source == Source("builtin:digits-resnet8", {}, "digits", (1, 8, 8))
    assert not model.training
    images, labels = load_digits_test()
    assert images.shape == (360, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.shape == (360,)
    assert labels.dtype == torch.int64
    assert labels.bincount().min() >= 34
    assert accuracy(model) >= 98.5
    model.train()
    assert accuracy(model) >= 98.5
    assert model.training


@pytest.mark.parametrize("specifier", ["resnet18", "torchvision:resnet18"])
def test_torchvision_model(specifier):
    model, source = create(specifier, weights="none")
    assert isinstance(model, torchvision.models.ResNet)
    assert source == Source("torchvision:resnet18", {}, None, (3, 224, 224))
    assert not model.training


@pytest.mark.parametrize(
    ("name", "input_size"),
    [
        ("inception_v3", (3, 299, 299)),
        ("quantized_resnet18", (3, 224, 224)),
        ("lraspp_mobilenet_v3_large", (3, 520, 520)),
        ("r3d_18", (3, 16, 112, 112)),
        ("ssdlite320_mobilenet_v3_large", None),
    ],
)
def test_torchvision_models_of_every_kind_without_a_download(name, input_size):
    with torch.device("meta"):  # the architecture alone, for speed
        model, source = create(name, weights="none")
    assert source.input_size == input_size
    assert any(type(module) in (torch.nn.Conv2d, torch.nn.Conv3d) for module in model.modules())


def test_random_weights_are_initialised_as_the_library_does():
    torch.manual_seed(0)
    model, _ = create("torchvision:googlenet", weights="none")
    assert model.conv1.conv.weight.std().item() == pytest.approx(0.01, rel=0.05)  # PyTorch's own default: 0.048


def test_timm_model_and_its_tags():
    model, source = create("timm:resnet18", weights="none", arguments={"num_classes": 7})
    assert model.fc.out_features == 7
    assert source == Source("timm:resnet18", {"num_classes": 7}, None, (3, 224, 224))
    # The tag decides the class count and the input size.
    _, source = create("timm:convnext_atto.d2_in1k", weights="none", arguments={"in_chans": 1})
    assert source == Source("timm:convnext_atto.d2_in1k", {"in_chans": 1}, None, (1, 224, 224))
    tagged = Source("timm:efficientnet_b5", {}, "sw_in12k", (3, 416, 416))
    with torch.device("meta"):
        assert build(tagged).classifier.out_features == 11821


FACTORIES = """
    import torch
    from neighbour import WIDTH

    class Net(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.fc = torch.nn.Linear(1, width)
        def forward(self, x):
            return self.fc(x)

    def make(width=WIDTH):
        import later_neighbour
        return Net(width).train()

    def make_list():
        return [1]

    def fail():
        raise RuntimeError("out of cheese")
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A folder with `nets.py`, which imports its neighbours; the current one; its modules forgotten after."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(FACTORIES))
    (tmp_path / "neighbour.py").write_text("WIDTH = 3")
    (tmp_path / "later_neighbour.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in ("nets", "neighbour", "later_neighbour"):
        sys.modules.pop(name, None)


def test_factory_of_a_module(factories):
    model, source = create("nets:make", arguments={"width": 2})
    assert model.fc.out_features == 2
    assert not model.training
    assert source == Source("nets:make", {"width": 2}, None, None)
    assert build(source).fc.out_features == 2


def test_factory_of_a_file_from_elsewhere(factories, tmp_path_factory, monkeypatch):
    model, source = create("nets.py:make")
    assert source.specifier == f"{factories / 'nets.py'}:make"
    assert equal(pickle.loads(pickle.dumps(model)).state_dict(), model.state_dict())
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = build(source)
    assert again.fc.out_features == 3
    assert type(again) is type(model)


def test_factory_with_a_weights_file(factories, trained):
    torch.save({"fc.weight": torch.ones(3, 1), "fc.bias": torch.zeros(3)}, "net.ckpt")
    model, source = create("nets.py:make", weights="net.ckpt")
    assert model.fc.weight.sum() == 3
    assert source.weights == str(factories / "net.ckpt")
    Path("net.ckpt").unlink()
    build(source)


@pytest.mark.parametrize(
    ("specifier", "message"),
    [
        ("nets.py:mke", "no factory 'mke'; use .*nets.py:make"),
        ("nets.py", "nets.py:FACTORY"),
        ("nets:make_list", "nets:make_list returns a list"),
        ("nets.py:fail", "fail can't be built with no arguments: RuntimeError: out of cheese"),
        ("broken.py:make", "can't be run: ModuleNotFoundError: No module named 'no_such'"),
        ("broken:make", "broken can't be imported: ModuleNotFoundError: No module named 'no_such'"),
        ("leaves.py:make", "can't be run: SystemExit"),
        ("absent.py:make", "absent.py can't be read: No such file"),
        ("absent.models:make", "no model source or module 'absent.models'.* path/to/file.py:FACTORY"),
        ("tim:resnet18", "'tim'. Is it `timm:`?"),
    ],
)
def test_wrong_factories(factories, specifier, message):
    (factories / "broken.py").write_text("import no_such")
    (factories / "leaves.py").write_text("import sys; sys.exit(1)")
    with pytest.raises(ModelError, match=message):
        create(specifier)


def test_errors_of_a_factory_keep_their_cause(factories):
    with pytest.raises(ModelError) as caught:
        create("nets:fail")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_factories_have_no_named_weights(factories):
    with pytest.raises(ModelError, match="no weights named 'IMAGENET1K_V1'"):
        create("nets:make", weights="IMAGENET1K_V1")


@pytest.mark.parametrize(
    ("specifier", "nearest"),
    [
        ("resnt50", "torchvision:resnet50"),
        ("ResNet50", "torchvision:resnet50"),
        ("tf_efficientnet_lite0", "timm:tf_efficientnet_lite0"),
        ("torchvision:tf_efficientnet_lite0", "timm:tf_efficientnet_lite0"),
        ("timm:digits-resnet9", "builtin:digits-resnet8"),
        ("builtin:digit-resnet8", "builtin:digits-resnet8"),
        ("timm:", "There is no model ''"),
    ],
)
def test_unknown_models_name_the_nearest(specifier, nearest):
    with pytest.raises(ModelError, match=nearest):
        create(specifier)


def test_list_models():
    names = list_models()
    assert names["torchvision"] == torchvision.models.list_models()
    assert "resnet18" in names["timm"]
    assert names["builtin"] == sorted(MODELS)
    assert list_models("builtin") == {"builtin": names["builtin"]}
    assert list_models("torchvision").keys() == {"torchvision"}
    with pytest.raises(ModelError, match="no model source 'keras'"):
        list_models("keras")


def test_importing_models_leaves_timm_alone():
    code = "import dyconvert.models, sys; sys.exit('timm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert list_models().keys() == {"torchvision", "builtin"}
    create("digits-resnet8")
    for call in (lambda: create("timm:resnet18"), lambda: list_models("timm")):
        with pytest.raises(ModelError, match=r"pip install .*\[timm\]"):
            call()
    with pytest.raises(ModelError, match="the nearest are torchvision:resnet50"):
        create("resnt50")


# ---- Arguments ----


def test_parse_arguments():
    pairs = ["a=1", "b = 0.5", "c=(1, 2)", "d=avg", "e=True", "f=false", "g=a=b", "h=None", "i='1'", "j="]
    assert parse_arguments(pairs) == {
        "a": 1, "b": 0.5, "c": (1, 2), "d": "avg", "e": True, "f": False, "g": "a=b", "h": None, "i": "1", "j": ""
    }  # fmt: skip


@pytest.mark.parametrize("pairs", [["a"], ["=1"], ["a b=1"], ["a=1", "a=2"]])
def test_malformed_arguments(pairs):
    with pytest.raises(ModelError, match=r"model argument"):
        parse_arguments(pairs)


@pytest.mark.parametrize("specifier", ["torchvision:resnet18", "timm:resnet18", "builtin:digits-resnet8"])
def test_rejected_arguments_are_named(specifier):
    with pytest.raises(ModelError, match=r"can't be built with no_such=1: TypeError: .*no_such"):
        create(specifier, weights="none", arguments={"no_such": 1})


def test_arguments_that_contradict_the_weights():
    with pytest.raises(ModelError, match=r"num_classes=10: ValueError: .*expected value 1000 but got 10"):
        create("torchvision:resnet18", arguments={"num_classes": 10})


def test_source_through_json():
    source = Source("timm:x", {"sizes": (1, (2, 3)), "name": "a", "none": None}, "tag", (3, 8, 8))
    assert Source.from_json(json.loads(json.dumps(source.to_json()))) == source
    without = Source("timm:x", {}, None, None)
    assert Source.from_json(json.loads(json.dumps(without.to_json()))) == without
    _, source = create("resnet50", "none", {"replace_stride_with_dilation": [False, False, True]})
    assert Source.from_json(json.loads(json.dumps(source.to_json()))) == source
    _, source = create("resnet18", "none", {"norm_layer": torch.nn.BatchNorm2d})
    with pytest.raises(ModelError, match=r"norm_layer=.* can't be saved"):
        source.to_json()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tiny-resnet8", 78_186),
        ("cifar-resnet20", 269_722),
        ("cifar-resnet32", 464_154),
        ("cifar-resnet44", 658_586),
        ("cifar-resnet56", 853_018),
    ],
)
def test_builtin_models_whose_weights_the_user_has(name, parameters, tmp_path):
    model, source = create(name, "none")
    assert source == Source(f"builtin:{name}", {}, None, (3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    torch.fx.symbolic_trace(model)
    file_name = MODELS[name].file_name
    with pytest.raises(ModelError, match=rf"don't come with dyconvert. Give {file_name} of https://.*'none'"):
        create(name)
    with pytest.raises(ModelError, match=rf"folder .* has no {file_name}"):
        create(name, f"{tmp_path}/")
    torch.save(model.state_dict(), tmp_path / file_name)
    for weights in (tmp_path / file_name, tmp_path):
        again, source = create(name, str(weights))
        assert equal(model.state_dict(), again.state_dict())
        assert source.weights == str(tmp_path / file_name)
    (tmp_path / file_name).unlink()
    assert type(build(source)) is type(model), "a saved model needs the file no more"


def test_builtin_models_have_arguments():
    assert create("tiny-resnet8", "none", {"num_classes": 7})[0](torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert create("cifar-resnet20", "none", {"num_classes": 7})[0](torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("folder", ["cifar10_resnets", "mlperf_tiny_resnet8"])
def test_published_weights_of_builtin_models(folder, data_dir):
    for name, entry in MODELS.items():
        if entry.file_name and (data_dir / folder / entry.file_name).is_file():
            model, _ = create(name, str(data_dir / folder))
            last = list(read_state_dict(data_dir / folder / entry.file_name))[-2:]
            assert [key for key in model.state_dict()][-2:] == last


# ---- Pretrained weights ----


@pytest.mark.parametrize(
    ("specifier", "weights", "address"),
    [
        ("torchvision:resnet18", "default", "https://download.pytorch.org/models/resnet18-"),
        ("torchvision:resnet50", "IMAGENET1K_V1", "https://download.pytorch.org/models/resnet50-0676ba61"),
        ("torchvision:quantized_resnet18", "default", "https://download.pytorch.org/models/resnet18-"),
        ("timm:resnet18", "default", "https://huggingface.co/timm/resnet18.a1_in1k"),
        ("timm:resnet18", "a2_in1k", "https://huggingface.co/timm/resnet18.a2_in1k"),
        ("timm:resnet18.a3_in1k", "default", "https://huggingface.co/timm/resnet18.a3_in1k"),
    ],
)
def test_failed_download(specifier, weights, address, capsys):
    with pytest.raises(ModelError) as caught:
        create(specifier, weights=weights)
    message = str(caught.value)
    assert f"can't be downloaded from {address}" in message
    assert "`weights='none'`" in message
    assert "`weights=FILE`" in message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("specifier", "weights", "message"),
    [
        ("torchvision:resnet50", "IMAGENET1K_V3", "IMAGENET1K_V1"),
        ("timm:resnet18", "a9_in1k", "a1_in1k"),
        ("timm:resnet18.a9_in1k", "none", "a1_in1k"),
        ("timm:resnet18.a1_in1k", "a2_in1k", "already names its weights"),
        ("timm:beit3_giant_patch14_224", "default", "no pretrained weights for timm:beit3.*`weights='none'`"),
        ("digits-resnet8", "mnist", "'mnist', but digits"),
    ],
)
def test_unknown_weights(specifier, weights, message):
    with pytest.raises(ModelError, match=message):
        create(specifier, weights=weights)


# What torchvision's own file holds; None if the builder can't make it without the weight set.
PRETRAINED = {
    "googlenet": {"init_weights": False, "aux_logits": True},
    "inception_v3": {"init_weights": False},
    "fcn_resnet50": {"weights_backbone": None, "aux_loss": True},
    "fasterrcnn_resnet50_fpn": None,
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_model_is_built_again(name, tmp_path, monkeypatch):
    """`create` from a (forged) download, `create` from the same file, and `build` make the same model."""
    weight_set = torchvision.models.get_model_weights(name).DEFAULT
    built = build(Source(f"torchvision:{name}", {}, weight_set.name, None))
    settings = PRETRAINED[name]
    original = built if settings is None else torchvision.models.get_model(name, weights=None, **settings)
    path = tmp_path / Path(weight_set.url).name
    torch.save(original.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, to, *a, **k: shutil.copy(path, to))
    model, source = create(name)
    assert source.weights == weight_set.name
    assert repr(built) == repr(model)
    assert getattr(built, "transform_input", None) == getattr(model, "transform_input", None)
    assert built.load_state_dict(model.state_dict())

    from_file, source = create(name, weights=str(path))
    assert source.weights == str(path)
    assert repr(from_file) == repr(model)
    assert equal(from_file.state_dict(), model.state_dict())

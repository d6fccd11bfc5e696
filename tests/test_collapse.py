"""collapse: exact at constant coefficients, at the mean of the data otherwise, and the original model again."""

import copy
import shutil
import warnings

import numpy as np
import pytest
import torch
import torchvision
from nets import IMAGE, FlatNet, ResidualNet, seeded
from PIL import Image
from torch import nn
from varied import randomised

import dyconvert
from dyconvert.surgery.collapse import collapse

METHODS = tuple(dyconvert.METHODS)

# The weights are the sum of g experts that were rounded to float32, each by 6e-8 of about twice their size.
EXPERTS_ROUNDING = 1e-6


def images(batch: int, dims: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, *IMAGE[dims], generator=torch.Generator().manual_seed(seed))


def assert_gives_back(model: nn.Module, collapsed: nn.Module) -> None:
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in collapsed.named_modules()]
    expected, found = model.state_dict(), collapsed.state_dict()
    assert list(expected) == list(found)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        limit = EXPERTS_ROUNDING * value.abs().max().item() if value.is_floating_point() else 0
        assert (found[key] - value).abs().max() <= limit, key


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "build",
    [
        ResidualNet,
        FlatNet,
        lambda: FlatNet(dims=1),
        lambda: FlatNet(dims=3),
        lambda: torchvision.models.mobilenet_v3_small(weights=None),
        lambda: torchvision.models.shufflenet_v2_x0_5(weights=None),
    ],
    ids=["residual", "flat", "1d", "3d", "mobilenet_v3", "shufflenet_v2"],
)
def test_an_untrained_conversion_gives_back_the_original(build, method):
    model = seeded(build)
    assert_gives_back(model, collapse(dyconvert.convert(model, method=method)))


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0", "googlenet", "vgg11"])
def test_torchvision_models_come_back(name, method):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    assert_gives_back(model, collapse(dyconvert.convert(model, method=method, g=2)))


def test_the_given_model_stays_as_it_is(net):
    dynamic = randomised(dyconvert.convert(net))
    before = copy.deepcopy(dynamic)
    collapse(dynamic, [images(2)])
    assert {k: v.tolist() for k, v in before.state_dict().items()} == {
        k: v.tolist() for k, v in dynamic.state_dict().items()
    }
    assert [len(m._forward_hooks) for m in dynamic.modules()] == [len(m._forward_hooks) for m in before.modules()]
    assert [m.training for m in before.modules()] == [m.training for m in dynamic.modules()]
    collapsed = collapse(dynamic)
    shared = {t.data_ptr() for t in dynamic.state_dict().values()} & {
        t.data_ptr() for t in collapsed.state_dict().values()
    }
    assert not shared


def test_convs_keep_what_the_user_has_put_on_them(net):
    net.to(torch.float64, memory_format=torch.channels_last)
    conv = net.layer1[0].conv1
    conv.label = "mine"
    conv.weight.requires_grad_(False)
    conv.register_forward_hook(lambda module, args, output: output * 2)
    net.layer1[1].eval()
    dynamic = dyconvert.convert(net)
    collapsed = collapse(dynamic)
    back = collapsed.layer1[0].conv1
    assert type(back) is nn.Conv2d
    assert back.label == "mine"
    assert not back.weight.requires_grad
    assert back.weight.dtype == torch.float64
    assert back.weight.stride() == conv.weight.stride()
    assert not collapsed.layer1[1].conv1.training
    assert collapsed.layer1[1].conv2.weight.requires_grad
    difference = dyconvert.verify(net, collapsed, images(2).double())  # the hook doubles in both
    assert difference.relative < 1e-12
    assert not [key for key in vars(collapsed) if key.startswith("dyconvert")]
    assert isinstance(dyconvert.convert(collapsed), type(net))


@pytest.mark.parametrize("method", METHODS)
def test_where_all_images_are_the_same_it_is_exact(net, method):
    dynamic = randomised(dyconvert.convert(net, method=method), std=1).double()
    same = images(1).double().expand(6, -1, -1, -1)
    collapsed = collapse(dynamic, [same[:4], same[4:]])
    assert dyconvert.verify(dynamic, collapsed, same[:2]).relative < 1e-12
    other = 3 * images(2, seed=5).double() + 1
    # Where the coefficients differ, so do the outputs: it isn't exact in general.
    assert dyconvert.verify(dynamic, collapsed, other).relative > 1e-3


def test_the_mean_is_over_images_not_over_batches():
    dynamic = randomised(dyconvert.convert(seeded(FlatNet), method="dynet"))
    data = images(7)
    at_once = collapse(dynamic, [data])
    uneven = collapse(dynamic, [data[:1], data[1:7]])
    for key, value in at_once.state_dict().items():
        torch.testing.assert_close(uneven.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    # By hand, for the conv that reads the stem; its bias is mixed as its weight is.
    dynamic.eval()
    with torch.no_grad():
        conv = dynamic.conv1
        eta = conv.coefficient_predictor(dynamic.stem(data).relu())[0].experts.mean(0)  # [g, C_out]
        weight = (conv.weight.unflatten(0, (conv.g, -1)) * eta[..., None, None, None]).sum(0)
        bias = (conv.bias.unflatten(0, (conv.g, -1)) * eta).sum(0)
    torch.testing.assert_close(at_once.conv1.weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(at_once.conv1.bias, bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "batches",
    [
        lambda x: [(x, torch.zeros(len(x)))],
        lambda x: [[x, "labels"]],
        lambda x: [{"x": x, "label": torch.zeros(len(x))}],
        lambda x: [{"image": x, "label": torch.zeros(len(x))}],
        lambda x: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2),
        lambda x: (each for each in x.split(3)),
        lambda x: [x.double()],
    ],
    ids=["tuple", "list", "dict of arguments", "dict", "loader", "generator", "other dtype"],
)
def test_batches_come_in_many_forms(net, batches):
    dynamic = randomised(dyconvert.convert(net))
    data = images(4)
    expected = collapse(dynamic, [data]).state_dict()
    for key, value in collapse(dynamic, batches(data)).state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_batch_norm_is_not_trained_by_the_data(net):
    net.train()
    dynamic = dyconvert.convert(net)
    collapsed = collapse(dynamic, [images(4)])
    assert torch.equal(collapsed.layer1[0].bn1.running_mean, net.layer1[0].bn1.running_mean)
    assert collapsed.training


class _WithAuxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.auxiliary = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv(self.stem(x))
        return (x, self.auxiliary(x)) if self.training else x


def test_a_conv_that_the_data_never_reaches_is_named():
    model = _WithAuxiliary()
    dynamic = randomised(dyconvert.convert(model, method="condconv"))
    with pytest.warns(UserWarning, match="never reached auxiliary"):
        collapsed = collapse(dynamic, [images(2)])
    torch.testing.assert_close(collapsed.auxiliary.weight, model.auxiliary.weight, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(collapsed.conv.weight, model.conv.weight, rtol=1e-2)


def test_timm_padding_comes_back():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers.Conv2dSame(8, 8, 3, stride=2), layers.StdConv2dSame(8, 8, 3, 2))
    model.eval()
    collapsed = collapse(dyconvert.convert(model))
    assert type(collapsed[1]) is layers.Conv2dSame
    assert type(collapsed[2]) is layers.Conv2dSame  # its standardised weight, which isn't standardised again
    assert dyconvert.verify(model, collapsed, images(2)).relative < 1e-5


def test_one_conv_alone():
    conv = nn.Conv2d(8, 4, 3, padding="same", padding_mode="reflect", dilation=2, groups=2)
    collapsed = collapse(dyconvert.convert(conv, include_stem=True))
    assert type(collapsed) is nn.Conv2d
    assert repr(collapsed) == repr(conv)
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(collapsed(x), conv(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("coefficients", "said"),
    [
        ([], "holds no batch"),
        ("mean", "'initial' or batches"),
        ([torch.randn(2, 5, 16, 16)], "rejects batch 0"),
        ([()], "is empty"),
        ([torch.full((1, 3, 16, 16), float("nan"))], "aren't finite"),
    ],
)
def test_what_makes_no_mean_is_refused(net, coefficients, said):
    with pytest.raises(dyconvert.ModelError, match=said):
        collapse(dyconvert.convert(net), coefficients)


def test_what_is_not_dynamic_is_refused(net):
    with pytest.raises(dyconvert.ModelError, match="nothing to collapse"):
        collapse(net)
    with pytest.raises(dyconvert.ModelError, match="whole converted model"):
        collapse(dyconvert.convert(net).layer1[0].conv1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    from dyconvert import models

    model, source = models.create("digits-resnet8")
    return dyconvert.save(dyconvert.convert(model), tmp_path_factory.mktemp("digits") / "saved", source=source)


def test_cli(cli, digits, tmp_path):
    shutil.copytree(digits, "saved")
    done = cli("collapse", "saved", "--output", "static.safetensors")
    assert done.code == 0
    assert "the initial coefficients" in done.said
    assert cli("convert", "digits-resnet8", "--weights", "static.safetensors", "-o", "again").code == 0
    again = collapse(dyconvert.load(tmp_path / "again"))
    assert_gives_back(collapse(dyconvert.load(tmp_path / "saved")), again)

    done = cli("collapse", "saved", "--output", "digits.pth", "--data", "digits")
    assert (done.code, "mean coefficients of 360 images" in done.said) == (0, True)
    folder = tmp_path / "pictures" / "cats"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.fromarray(np.full((12, 10, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    done = cli("collapse", "saved", "-o", "p.pth", "--data", "pictures", "--limit", 4, "--batch-size", 3)
    assert (done.code, "mean coefficients of 4 images" in done.said) == (0, True)
    assert torch.load(tmp_path / "p.pth", weights_only=True).keys() == again.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "there.pth"), "exists already"),
        (("-o", "a.onnx"), "neither .safetensors nor .pth"),
        (("-o", "a.pth", "--data", "nowhere"), "is no folder"),
        (("-o", "a.pth", "--data", "empty"), "holds no images"),
        (("-o", "a.pth", "--data", "broken"), "can't be read as an image"),
        (("-o", "a.pth", "--data", "digits", "--coefficients", "initial"), "exclude each other"),
        (("-o", "a.pth", "--data", "broken", "--mean", "1,2"), "each of 1 channels"),
    ],
)
def test_cli_refuses(cli, digits, tmp_path, arguments, said):
    shutil.copytree(digits, "saved")
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    before = sorted(each.name for each in tmp_path.iterdir())
    done = cli("collapse", "saved", *arguments)
    assert done.code == 2
    assert said in done.said
    assert sorted(each.name for each in tmp_path.iterdir()) == before
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_nothing_is_warned_of_by_default(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collapse(dyconvert.convert(net), [images(2)])

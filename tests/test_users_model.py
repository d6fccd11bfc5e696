"""The converted model stays the user's model: class, attributes, keys, hooks, modes, copies."""

import copy
import io
import pickle

import pytest
import torch
import torchvision
import zoo
from nets import BasicBlock, FlatNet, ResidualNet, image, seeded
from torch import nn
from torch.nn import functional as F

import dyconvert
from dyconvert.nn.handing import handing_of, sharing_blocks


def convert(model: nn.Module, **choices: object) -> nn.Module:
    return dyconvert.convert(model, **choices)


def test_class_and_attributes() -> None:
    model = zoo.build("resnet18")
    model.my_note = {"trained": "by me"}
    model.layer1[0].conv1.my_flag = 7
    dynamic = convert(model)
    assert type(dynamic) is torchvision.models.ResNet
    assert len(dynamic.layer1) == 2
    assert isinstance(dynamic.layer1[0], torchvision.models.resnet.BasicBlock)
    assert isinstance(dynamic.layer1[0].conv1, dyconvert.DynamicConv2d)
    assert dynamic.layer1[0].conv1.my_flag == 7
    assert dynamic.my_note == {"trained": "by me"}
    assert dynamic.layer2[0].stride == 2
    assert dynamic.layer2[0].conv1.stride == (2, 2)


def test_a_model_that_is_one_flat_module_keeps_its_class() -> None:
    model = seeded(FlatNet)
    assert type(convert(model, example=image())) is FlatNet


def test_the_given_model_is_untouched() -> None:
    model = seeded(ResidualNet).train()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    dynamic = convert(model)
    with torch.no_grad():
        for t in dynamic.state_dict().values():
            t.zero_()
    assert [type(m) for m in model.modules()] == kinds
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert list(before) == list(model.state_dict())


def test_inplace() -> None:
    model = seeded(ResidualNet)
    original = copy.deepcopy(model)
    assert convert(model, inplace=True) is model
    assert dyconvert.verify(original, model, image()).relative < 1e-5


def test_inplace_leaves_the_model_alone_after_an_error() -> None:
    model = seeded(ResidualNet)
    plan = dyconvert.plan(model)
    plan.blocks[-1].reads = "nowhere"
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(dyconvert.PlanError, match="unshare"):
        dyconvert.convert(model, plan, inplace=True)
    assert [type(m) for m in model.modules()] == kinds


def test_state_dict_of_what_is_untouched() -> None:
    model = seeded(ResidualNet)
    dynamic = convert(model, g=3)
    static, converted = model.state_dict(), dynamic.state_dict()
    banks = {f"{conv.name}.{part}" for conv in dyconvert.plan(model).converted for part in ("weight", "bias")}
    for name, t in static.items():
        assert name in converted
        if name not in banks:
            assert torch.equal(converted[name], t)
        else:
            assert converted[name].shape == (3 * t.shape[0], *t.shape[1:])
    assert all("_predictor." in name for name in converted.keys() - static.keys())


def test_requires_grad_dtype_and_training_mode() -> None:
    model = seeded(ResidualNet).to(torch.float64)
    model.layer1[0].requires_grad_(False)
    model.layer1[1].train()
    dynamic = convert(model)
    assert not dynamic.layer1[0].conv1.weight.requires_grad
    assert dynamic.layer1[1].conv1.weight.requires_grad
    assert all(p.dtype == torch.float64 for p in dynamic.parameters())
    assert [m.training for m in dynamic.layer1[1].modules()] == [True] * len(list(dynamic.layer1[1].modules()))
    assert not dynamic.layer1[0].conv1.training


def test_channels_last() -> None:
    model = seeded(ResidualNet).to(memory_format=torch.channels_last)
    dynamic = convert(model)
    conv = dynamic.layer1[0].conv1
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    x = image().contiguous(memory_format=torch.channels_last)
    assert dyconvert.verify(model, dynamic, x).relative < 1e-5
    # And it can still be set afterwards, which a bank of five dimensions would refuse.
    later = convert(seeded(ResidualNet)).to(memory_format=torch.channels_last)
    assert dyconvert.verify(model, later, x).relative < 1e-5


def test_hooks_go_on_working() -> None:
    model = seeded(ResidualNet)
    seen = []
    for name in ("layer1.0.conv1", "layer1.1.bn1", "layer1.0", "layer1"):
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.append(name))
    dynamic = convert(model)
    assert seen == [], "planning must not call the user's hooks"
    dynamic(image())
    assert sorted(seen) == sorted(["layer1.0.conv1", "layer1.1.bn1", "layer1.0", "layer1"])


def test_hooks_on_a_container_inside_a_block_go_on_working() -> None:
    model = zoo.build("mobilenet_v2")
    seen = []
    model.features[3].conv.register_forward_hook(lambda *_: seen.append(1))
    plan = dyconvert.plan(model)
    assert plan["features.3.conv.1.0"].block == "features.3"
    dyconvert.convert(model, plan)(zoo.images("mobilenet_v2", 1))
    assert seen == [1]


def test_handles_of_hooks_work_after_an_inplace_conversion() -> None:
    model = seeded(ResidualNet)
    seen = []
    handle = model.layer1[0].conv1.register_forward_hook(lambda *_: seen.append(1))
    convert(model, inplace=True)
    model(image())
    handle.remove()
    model(image())
    assert seen == [1]


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "mobilenet_v3_small"])
def test_deepcopy_and_pickle(name: str) -> None:
    dynamic = convert(zoo.build(name))
    images = zoo.images(name, 2)
    expected = dynamic(images)
    for again in (copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):
        assert type(again) is type(dynamic)
        assert [type(m) for m in again.modules()] == [type(m) for m in dynamic.modules()]
        assert torch.equal(again(images), expected)
        parameter = next(p for n, p in again.named_parameters() if n.endswith("linear.bias") and "predictor" in n)
        with torch.no_grad():
            parameter.fill_(3.0)
    assert torch.equal(dynamic(images), expected)


def test_torch_save_and_load_of_the_state_dict() -> None:
    dynamic = convert(seeded(ResidualNet))
    with torch.no_grad():
        dynamic.layer1[0].conv1.block_predictor.linear.bias.normal_()
    buffer = io.BytesIO()
    torch.save(dynamic.state_dict(), buffer)
    buffer.seek(0)
    other = convert(seeded(ResidualNet, seed=1), seed=5)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(image()), dynamic(image()))


class DropsInside(BasicBlock):
    """Dropout by function, which tracing would fix in one mode, and by module."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.dropout(self.conv1(x), 0.5, training=self.training)
        return self.conv2(self.drop(out)) + x


def test_dropout_follows_train_and_eval_after_conversion() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), seeded(DropsInside), nn.Sequential(seeded(DropsInside)))
    plan = dyconvert.plan(model, example=image())
    assert [block.name for block in plan.blocks] == ["1", "2.0"]
    dynamic = dyconvert.convert(model.double(), plan)
    x = image(dtype=torch.float64)
    for training in (True, False, True):
        model.train(training)
        dynamic.train(training)
        outputs = []
        for m in (model, dynamic):
            torch.manual_seed(0)
            outputs.append(m(x))
        assert torch.allclose(*outputs, atol=1e-12)
        # With dropout two calls differ, without they don't.
        assert torch.equal(dynamic(x), dynamic(x)) != training
    again = pickle.loads(pickle.dumps(dynamic)).eval()
    assert torch.allclose(again(x), model.eval()(x), atol=1e-12)


def test_drop_path_follows_train_and_eval() -> None:
    timm = pytest.importorskip("timm")
    dynamic = convert(
        timm.create_model("resnet18", drop_path_rate=0.5, zero_init_last=False), example=torch.randn(1, 3, 32, 32)
    )
    x = torch.randn(4, 3, 32, 32)
    dynamic.train()
    assert not torch.equal(dynamic(x), dynamic(x))
    dynamic.eval()
    assert torch.equal(dynamic(x), dynamic(x))


def test_a_shared_conv_is_replaced_under_all_its_names() -> None:
    model = seeded(ResidualNet)
    model.layer1[1] = seeded(BasicBlock, 8, 8, seed=1)
    model.layer1[1].conv1 = model.layer1[0].conv1
    model.head = nn.Linear(8, 5)
    dynamic = convert(model, example=image())
    assert dynamic.layer1[1].conv1 is dynamic.layer1[0].conv1
    assert dynamic.layer1[0].conv1.coefficient_predictor is not None
    assert dyconvert.verify(model, dynamic, image()).relative < 1e-5


@pytest.mark.parametrize("take_out", [lambda block: nn.Conv2d(8, 8, 3, padding=1), lambda block: nn.Identity()])
def test_a_shared_conv_that_is_replaced_later(take_out) -> None:
    dynamic = convert(seeded(ResidualNet))
    block = next(block for _, block, _ in sharing_blocks(dynamic))
    first, second, *_ = handing_of(block).convs
    x = image()
    setattr(block, second, take_out(block))
    dynamic(x).sum().backward()
    setattr(block, first, take_out(block))
    with pytest.raises(RuntimeError, match=f"{first} held the predictor"):
        dynamic(x)


def test_symbolic_trace_of_the_converted_model() -> None:
    dynamic = convert(seeded(ResidualNet))
    traced = torch.fx.symbolic_trace(dynamic)
    assert torch.allclose(traced(image(3)), dynamic(image(3)))


def test_the_global_random_state_is_untouched() -> None:
    model = seeded(ResidualNet)
    state = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_model() -> None:
    model = seeded(ResidualNet)
    a, b, c = convert(model), convert(model), convert(model, seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.layer1[0].conv1.weight, c.layer1[0].conv1.weight)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_cuda_device() -> None:
    model = seeded(ResidualNet).cuda()
    dynamic = convert(model)
    assert all(t.is_cuda for t in dynamic.state_dict().values())
    # TF32 would round to ten bits; the default for convs on recent devices.
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert dyconvert.verify(model, dynamic, image().cuda()).relative < 1e-4


class Packs(nn.Module):
    """As Tacotron 2's encoder: how long each sequence is must be values, of which none may be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(8, 8, 5, padding=2), nn.Conv1d(8, 8, 5, padding=2)
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x.mul_(2)).relu()).transpose(1, 2)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]


def test_examples_of_models_that_look_at_values_keep_theirs() -> None:
    model = seeded(Packs)
    x, lengths = torch.randn(2, 8, 20), torch.tensor([20, 15])
    given = x.clone()
    plan = dyconvert.plan(model, example=(x, lengths), include_stem=True)
    assert [conv.name for conv in plan.converted] == ["conv1", "conv2"]
    assert torch.equal(x, given)
    dynamic = dyconvert.convert(model, plan)
    with torch.no_grad():
        assert torch.allclose(dynamic(x.clone(), lengths), model(x.clone(), lengths), atol=1e-5)

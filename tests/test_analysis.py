"""What an analysis computes: equal to plain numpy, and finding what was planted."""

import copy
import statistics
import weakref

import numpy as np
import pytest
import torch
from nets import ResidualNet, image, outputs, same, seeded, trained
from torch import Tensor, nn

import dyconvert
from dyconvert import DyconvertError, ModelError
from dyconvert.analysis.ablation import read_run, read_sweep
from dyconvert.analysis.coefficients import BINS, CONSTANT, UNUSED
from dyconvert.analysis.correlation import BANDS, default_layer
from dyconvert.analysis.cost import REST
from dyconvert.analysis.flops import macs, parameters
from dyconvert.analysis.images import ImageSet, read_images
from dyconvert.analysis.resolution import resolution
from dyconvert.analysis.study import Analysis, analyse
from dyconvert.surgery.watch import watch_mixtures

CLASSES = ["a", "b", "c"]
# Statistics are collected in float64; the models compute in float32, whose sums depend on the batch.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def data(count: int = 23) -> tuple[Tensor, Tensor]:
    """Images that differ by class, and labels; the number of images is no multiple of a batch's."""
    labels = torch.arange(count) % len(CLASSES)
    return image(count) + labels.view(-1, 1, 1, 1), labels


def batches(images: Tensor, labels: Tensor, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def measured(model: nn.Module, **options) -> Analysis:
    """An analysis without times, which a test can't know."""
    return analyse(model, batches(*data()), classes=CLASSES, example=image(1), sizes=(), seconds=0, **options)


def seen_at_once(model: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    """The coefficients `[N, g, C]` of each conv, kept whole."""
    found = {}
    model = copy.deepcopy(model)
    watch_mixtures(model, lambda name, seen: found.update({name: seen.experts.double().numpy()}))
    outputs(model, images)
    return found


@pytest.mark.parametrize(
    "choices",
    [
        {"method": "dynet", "g": 3},
        {"method": "condconv", "g": 4},
        {"method": "dyconv", "temperature": 2.0},
        {"method": "odconv", "temperature": 2.0},
    ],
)
def test_coefficients_equal_numpy(net, choices):
    model = trained(net, **choices)
    images, labels = data()
    whole = seen_at_once(model, images)
    result = measured(model).coefficients
    assert [conv.name for conv in result.convs] == list(whole)
    for conv in result.convs:
        eta = whole[conv.name]  # [N, g, C]
        assert (conv.g, conv.channels, conv.images) == (eta.shape[1], eta.shape[2], len(eta))
        np.testing.assert_allclose(conv.spread, np.sqrt(eta.var(0).mean()), **CLOSE)
        np.testing.assert_allclose(conv.saturated, ((eta < 0.01) | (eta > 0.99)).mean(), atol=1e-3)
        np.testing.assert_allclose(conv.constant, (eta.std(0) < CONSTANT).mean(), atol=1e-9)
        share = eta / eta.sum(1, keepdims=True)
        np.testing.assert_allclose(conv.effective, np.exp(-(share * np.log(share)).sum(1)).mean(), **CLOSE)
        means = np.stack([eta[labels == k].mean(0) for k in range(3)])  # [K, g, C]
        counts = np.bincount(labels).reshape(-1, 1, 1)
        between, total = (counts * (means - eta.mean(0)) ** 2).sum(), ((eta - eta.mean(0)) ** 2).sum()
        # Differences of coefficients that barely vary lose digits.
        np.testing.assert_allclose(conv.between_classes, between / total if total else 0, rtol=1e-2)
        assert conv.by_chance == pytest.approx(2 / 22)
        for i, expert in enumerate(conv.experts):
            np.testing.assert_allclose(expert.mean, eta[:, i].mean(), **CLOSE)
            np.testing.assert_allclose(expert.smallest, eta[:, i].min(), **CLOSE)
            np.testing.assert_allclose(expert.largest, eta[:, i].max(), **CLOSE)
            np.testing.assert_allclose(expert.class_means, means[:, i].mean(1), **CLOSE)
            histogram = np.histogram(eta[:, i], BINS, (0, 1))[0]
            # A coefficient at the edge of a bin may be rounded to the other side.
            assert np.abs(np.array(expert.histogram) - histogram).sum() <= 2
            driven = share[:, i].mean(1)
            tops = [top.image for top in expert.top]
            np.testing.assert_allclose(driven[tops], np.sort(driven)[::-1][: len(tops)], **CLOSE)


def test_factors_equal_numpy(net):
    model = trained(net, method="odconv", temperature=2.0)
    images, labels = data()
    found = {}
    runner = copy.deepcopy(model)
    watch_mixtures(runner, lambda name, seen: found.update({name: seen.map(lambda axis: axis.double())}))
    outputs(runner, images)
    for conv in measured(model).coefficients.convs:
        axes = found[conv.name].axes()
        assert list(conv.axes) == [axis for axis in axes if axis != "experts"]
        for axis, use in conv.axes.items():
            values = axes[axis].numpy()  # [N, count]
            assert use.count == values.shape[1]
            np.testing.assert_allclose(use.spread, np.sqrt(values.var(0).mean()), **CLOSE)
            np.testing.assert_allclose(use.mean, values.mean(), **CLOSE)
            np.testing.assert_allclose([use.smallest, use.largest], [values.min(), values.max()], **CLOSE)
            np.testing.assert_allclose(use.means, values.mean(0)[: len(use.means)], **CLOSE)
            means = np.stack([values[labels == k].mean(0) for k in range(3)])
            between = (np.bincount(labels).reshape(-1, 1) * (means - values.mean(0)) ** 2).sum()
            np.testing.assert_allclose(use.between_classes, between / ((values - values.mean(0)) ** 2).sum(), rtol=1e-2)


def test_correlation_equals_numpy(net):
    images, _ = data()
    model = trained(net, g=2)
    layer = "layer1.1.conv2"  # 8 x 8 maps: every position is looked at
    kept = {}
    for key, each in (("model", model), ("original", net)):
        runner = copy.deepcopy(each)
        runner.get_submodule(layer).register_forward_hook(lambda m, a, out, key=key: kept.update({key: out}))
        outputs(runner, images)
    result = measured(model, original=net, layers=[layer])
    [found] = result.correlations
    assert found.layer == layer
    for correlation, key in ((found.model, "model"), (found.original, "original")):
        maps = kept[key].double().transpose(0, 1).flatten(1).numpy()
        r = np.corrcoef(maps)[np.triu_indices(len(maps), 1)]
        assert correlation.pairs == len(r)
        assert correlation.positions == maps.shape[1]
        np.testing.assert_allclose(correlation.mean_absolute, np.abs(r).mean(), **CLOSE)
        lows = [*BANDS.values()]
        highs = [2.0, *lows[:-1]]
        for share, low, high in zip(correlation.bands.values(), lows, highs, strict=True):
            assert share == pytest.approx(((np.abs(r) >= low) & (np.abs(r) < high)).mean(), abs=1e-9)
        assert sum(correlation.bands.values()) == pytest.approx(1)
        assert sum(correlation.histogram) == len(r)
        assert abs(correlation.strongest[0].r) == pytest.approx(np.abs(r).max(), rel=1e-4)


def test_experts_equal_numpy(net):
    model = trained(net, g=3)
    for found in measured(model).experts:
        bank = model.get_submodule(found.conv).weight.detach().double().unflatten(0, (3, -1)).flatten(2).numpy()
        r = [np.corrcoef(bank[:, t])[np.triu_indices(3, 1)] for t in range(bank.shape[1])]
        np.testing.assert_allclose(found.between.mean_absolute, np.abs(r).mean(), **CLOSE)
        assert found.between.pairs == np.size(r)


def test_an_expert_that_is_never_used_is_found(net):
    model = trained(net, method="condconv", g=4)
    predictor = model.layer1[0].conv2.coefficient_predictor
    with torch.no_grad():
        predictor.linear.bias[2] = -30.0
    result = measured(model)
    found = {conv.name: conv for conv in result.coefficients.convs}
    assert found["layer1.0.conv2"].unused == [2]
    assert found["layer1.0.conv2"].experts[2].largest < UNUSED
    assert not any(conv.unused for name, conv in found.items() if name != "layer1.0.conv2")
    [warning] = [f for f in result.findings if "never used" in f.text]
    assert warning.level == "warning"
    assert "layer1.0.conv2: expert 3 of 4 is never used" in warning.text


def test_a_saturated_predictor_is_found(net):
    model = trained(net, g=2)
    with torch.no_grad():
        model.layer1[1].conv1.block_predictor.linear.weight.mul_(1e4)
    result = measured(model)
    saturated = [conv.name for conv in result.coefficients.convs if conv.is_saturated]
    assert saturated == [conv.name for conv in dyconvert.plan(net, g=2).shared("layer1.1")]
    assert any("saturated" in f.text and "layer1.1.conv1" in f.text for f in result.findings)


def test_maps_that_carry_the_same_are_found(net):
    with torch.no_grad():
        net.stem.weight[3] = -2 * net.stem.weight[1]
        net.stem.weight[5] = 0
    result = measured(net, layers=["stem"])
    [found] = result.correlations
    strongest = found.model.strongest[0]
    assert (strongest.first, strongest.second) == (1, 3)
    assert strongest.r == pytest.approx(-1)
    assert found.model.constant == [5]
    assert found.model.pairs == 7 * 6 / 2
    texts = [f.text for f in result.findings if f.level == "warning"]
    assert any("1 and 3 (r = -1.000)" in text for text in texts)
    assert any("5 never vary" in text for text in texts)


def test_an_untrained_conversion_is_said_to_be_static(net):
    result = measured(dyconvert.convert(net), original=net)
    assert all(conv.is_constant and not conv.unused for conv in result.coefficients.convs)
    assert any("wasn't fine-tuned" in f.text for f in result.findings)
    assert result.correlations[0].model.bands == pytest.approx(result.correlations[0].original.bands)


def test_predictors_that_have_learnt_little_are_named(net):
    model = dyconvert.convert(net, g=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_predictor.linear.weight"):
                parameter += 1e-4 * torch.randn(parameter.shape, generator=generator)
    result = measured(model)
    assert all(conv.is_constant and conv.spread > 0 for conv in result.coefficients.convs)
    [warning] = [f.text for f in result.findings if f.level == "warning"]
    assert "static in effect" in warning
    assert "learnt little" in warning


def test_a_static_model_has_half_an_analysis(net):
    result = measured(net)
    assert not result.dynamic
    assert result.coefficients is None
    assert "no dynamic conv" in result.left_out["coefficients"]
    assert result.correlations[0].layer == default_layer(dyconvert.plan(net))[0]
    assert result.cost.after.macs == macs(net, image(1))


def test_batches_are_let_go(net):
    alive: list[weakref.ref] = []
    most = 0

    def lazily():
        nonlocal most
        for seed in range(30):
            batch = image(4, seed=seed)
            alive.append(weakref.ref(batch))
            most = max(most, sum(ref() is not None for ref in alive))
            yield batch, torch.zeros(4, dtype=torch.long)

    analyse(trained(net), lazily(), classes=["one"], example=image(1), sizes=(), seconds=0)
    assert most <= 2  # this one, and the one before it


def test_the_models_are_left_as_they_were(net):
    model = trained(net).train()
    before = copy.deepcopy(model)
    images, labels = data()
    analyse(model, [(images, labels)], original=net, classes=CLASSES, example=image(1), sizes=(16,), seconds=0.01)
    assert same(model, before)
    assert all(module.training for module in model.modules())
    assert [len(m._forward_hooks) for m in model.modules()] == [len(m._forward_hooks) for m in before.modules()]


def test_top1(net):
    images, labels = data()
    classes = [*"abcde"]  # as many as the net has outputs
    result = analyse(net, batches(images, labels), classes=classes, example=image(1), sizes=(), seconds=0)
    right = (outputs(net, images).argmax(1) == labels).double().mean()
    assert result.accuracy.model.percent == pytest.approx(100 * float(right))
    assert measured(net).accuracy is None  # three classes: the outputs are others


def test_cost_adds_up(net):
    model = dyconvert.convert(net, g=3)
    found = measured(model, original=net).cost
    for key, each in (("before", net), ("after", model)):
        parts = [getattr(block, key) for block in found.blocks]
        assert sum(part.parameters for part in parts) == getattr(found, key).parameters == parameters(each)
        assert sum(part.macs for part in parts) == getattr(found, key).macs == macs(each, image(1))
    assert [block.name for block in found.blocks] == ["stem", "layer1.0", "layer1.1", REST]
    assert [block.dynamic for block in found.blocks] == [0, 2, 3, 0]
    banks = [m for m in model.modules() if isinstance(m, dyconvert.DynamicConv)]
    assert found.mixing == sum(m.weight.numel() for m in banks)
    # What predicting and mixing take is all that is added; one conv's bias is mixed, too.
    added = found.after.macs - found.before.macs
    assert added == found.predicting + found.mixing + sum(m.bias.numel() for m in banks if m.bias is not None)


def test_times_of_blocks(net):
    result = analyse(dyconvert.convert(net), original=net, example=image(1), sizes=(), seconds=0.05)
    for block in result.cost.blocks:
        assert block.before.seconds > 0 or block.name == REST
        assert block.after.seconds > 0 or block.name == REST
    assert result.cost.after.seconds >= sum(b.after.seconds for b in result.cost.blocks[:-1]) * 0.5


def test_resolution(net):
    dynamic, narrow = dyconvert.convert(net), seeded(ResidualNet, 4)
    found = resolution({"original": net, "dynamic": dynamic, "narrow": narrow}, (8, 32), seconds=0.05)
    assert [each.size for each in found.sizes] == [8, 32]
    for each in found.sizes:
        x = image(1)[:, :, :1, :1].expand(1, 3, each.size, each.size)
        assert each.macs == {"original": macs(net, x), "dynamic": macs(dynamic, x), "narrow": macs(narrow, x)}
        assert each.seconds.keys() == {"original", "dynamic", "narrow", "predicting", "mixing"}
        medians = {name: timing.median for name, timing in each.seconds.items()}
        assert each.latency_reduced("narrow") == pytest.approx(1 - medians["narrow"] / medians["original"])
        assert 0 < each.overhead <= 1
    assert found.sizes[1].macs_reduced("narrow") > 0.5  # half as wide


def test_sizes_that_a_model_refuses():
    class Fixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(-1, 8 * 16 * 16)

    model = Fixed(nn.Conv2d(3, 8, 3, padding=1))
    model.append(nn.Conv2d(8, 8, 3, padding=1))
    model[1].register_forward_pre_hook(lambda m, args: args[0].view(-1, 8, 16, 16) if args[0].shape[0] == 1 else None)
    found = resolution({"original": model}, (16, 24), seconds=0.01)
    assert [each.size for each in found.sizes] == [16]
    assert 24 in found.refused
    with pytest.raises(ModelError, match="none of the sizes 24"):
        resolution({"original": model}, (24,), seconds=0.01)
    with pytest.raises(ModelError, match="two-dimensional"):
        resolution({"original": seeded(ResidualNet, dims=1)}, (24,))


def test_sizes_around_the_models_own(net):
    """Where none are named: half of to twice what the example has."""
    result = analyse(trained(net), [image(6)], example=image(1), seconds=0.01)
    sizes = [each.size for each in result.resolution.sizes]
    assert min(sizes) == 8
    assert 16 in sizes
    assert max(sizes) == 32


def test_other_numbers_of_dimensions():
    net = seeded(ResidualNet, dims=1)
    result = analyse(trained(net), [image(6, dims=1)], example=image(1, dims=1), seconds=0.01)
    assert result.images == 6
    assert "two-dimensional" in result.left_out["resolution"]
    assert result.coefficients.convs[0].between_classes is None


# ---- Bad input ----


def test_nan_in_the_weights_is_named(net):
    model = trained(net)
    with torch.no_grad():
        model.layer1[0].conv1.weight[0, 0, 0, 0] = float("nan")
        model.head.bias[:2] = float("inf")
    with pytest.raises(ModelError, match=r"layer1\.0\.conv1\.weight \(1 of \d+\), head\.bias \(2 of 5\)"):
        measured(model)
    with pytest.raises(ModelError, match=r"head\.bias"):
        measured(net, original=model)


def test_bad_batches(net):
    model = trained(net)
    with pytest.raises(ModelError, match="no batch"):
        analyse(model, [], example=image(1), sizes=(), seconds=0)
    with pytest.raises(ModelError, match=r"rejects the images \(2x5x16x16\).*example="):
        analyse(model, [torch.zeros(2, 5, 16, 16)], example=image(1), sizes=(), seconds=0)
    with pytest.raises(ModelError, match="aren't finite"):
        analyse(model, [image() * float("nan")], example=image(1), sizes=(), seconds=0)
    with pytest.raises(ModelError, match=r"'layer2'.*layer1"):
        measured(model, layers=["layer2"])


# ---- Images, and what runs wrote ----


def test_images_of_folders(tmp_path):
    from PIL import Image

    for name, count in (("cat", 3), ("dog", 2), ("empty", 0)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 10), (50 * i, 0, 255)).save(tmp_path / name / f"{i}.png")
    found = read_images(str(tmp_path), (3, 8, 8), (0.5,) * 3, (0.25,) * 3)
    assert isinstance(found, ImageSet)
    assert found.classes == ["cat", "dog", "empty"]
    assert found.labels.tolist() == [0, 0, 0, 1, 1]
    [(images, labels)] = found.batches(8)
    assert images.shape == (5, 3, 8, 8)
    torch.testing.assert_close(images[1, :, 0, 0], torch.tensor([(50 / 255 - 0.5) / 0.25, -2.0, 2.0]))
    assert labels.tolist() == found.labels.tolist()
    assert found.picture(1).size == (20, 10)
    assert len(read_images(str(tmp_path), (3, 8, 8), limit=2)) == 2
    (tmp_path / "cat" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DyconvertError, match=r"3\.png can't be read as an image"):
        list(read_images(str(tmp_path), (3, 8, 8)).batches(8))


SWEEP = """run,seed,recipe,method,g,width,static,epochs,original,converted,finetuned,ema,parameters,macs,seconds
dynet g=6,0,r,dynet,6,0.5,false,3,91.7,60.0,90.0,90.5,1000,2000,10
dynet g=6,1,r,dynet,6,0.5,false,3,91.7,61.0,91.0,,1000,2000,12
"static, l1",0,r,,,0.5,true,3,91.7,55.0,88.0,88.2,500,1900,8
"""


def test_a_sweep(tmp_path):
    (tmp_path / "sweep.csv").write_text(SWEEP)
    dynamic, static = read_sweep(tmp_path / "sweep.csv").settings
    scores = dynamic.scores["finetuned"]
    assert (scores.mean, scores.runs, scores.low, scores.high) == (90.5, 2, 90.0, 91.0)
    assert scores.deviation == pytest.approx(statistics.stdev([90.0, 91.0]))
    assert dynamic.scores["ema"].runs == 1
    assert dynamic.costs == {"parameters": 1000, "macs": 2000, "seconds": 11}
    assert (dynamic.run, dynamic.static, dynamic.g, dynamic.width) == ("dynet g=6", False, 6, 0.5)
    assert (static.run, static.static, static.g) == ("static, l1", True, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no run"),
        ("a,b\n1,2\n", "no column method"),
        (SWEEP.replace("90.0", "ninety"), "'ninety' for finetuned"),
    ],
)
def test_a_bad_sweep(text, says, tmp_path):
    (tmp_path / "sweep.csv").write_text(text)
    with pytest.raises(DyconvertError, match=says):
        read_sweep(tmp_path / "sweep.csv")


def test_a_run(tmp_path):
    assert read_run(tmp_path) is None
    (tmp_path / "metrics.csv").write_text("epoch,step,val_acc,train_loss\n0,1,,2.0\n0,2,50.0,1.0\n1,3,60.0,\n")
    (tmp_path / "summary.json").write_text('{"finetuned": 60.0}')
    run = read_run(tmp_path)
    assert run.summary == {"finetuned": 60.0}
    assert {c.name: (c.epochs, c.values) for c in run.courses} == {
        "val_acc": ([0, 1], [50.0, 60.0]),
        "train_loss": ([0], [1.0]),
    }
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DyconvertError, match="can't be read"):
        read_run(tmp_path)

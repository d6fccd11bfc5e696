"""dyconvert bench: what it compares, prints and writes. That it is fast, no test can say."""

import json

import pytest
import torch

from dyconvert.analysis.timing import in_turns
from dyconvert.nn import native_library

SMALL = ("--layer", "8,8,3,8", "--layer", "8,16,1,8,2", "--batch", "1,2", "--repeats", 2)


@pytest.mark.parametrize("mode", ["--inference", "--train"])
def test_layers_against_the_static_conv_timms_and_mixing_feature_maps(cli, mode):
    pytest.importorskip("timm")
    ran = cli("bench", "layers", *SMALL, mode)
    assert ran.code == 0, ran.said
    assert "3x3 8 @8" in ran.said
    assert "1x1/2 8-16 @8" in ran.said
    assert "timm / condconv:" in ran.said
    assert "features / condconv:" in ran.said
    if native_library.library() is not None:
        assert f"compiled kernels: {native_library.target()}." in ran.said
        assert "planes: 3x3 8 @8" in ran.said
    assert max(map(len, ran.stdout.splitlines())) <= 80
    rows = json.loads(cli("bench", "layers", *SMALL, mode, "--json").stdout)["results"]
    assert [(row["layer"], row["batch"]) for row in rows] == [
        (layer, batch) for batch in (1, 2) for layer in ("3x3 8 @8", "1x1/2 8-16 @8")
    ]
    for row in rows:
        assert row["training"] is (mode == "--train")
        assert row["limit"] > row["static"]["median"] > 0
        assert min(row[name]["median"] for name in ("dynamic", "timm", "features")) > 0


def test_without_mixing_feature_maps_and_for_dynets_coefficients(cli):
    ran = cli("bench", "layers", *SMALL, "--method", "dynet", "--no-features")
    assert ran.code == 0, ran.said
    assert "features / dynet" not in ran.said
    assert "timm: left out" in ran.said  # its conv has no coefficients per channel


def test_another_device_is_waited_for_before_and_after_each_call(monkeypatch):
    happened = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: happened.append(device))
    device = torch.device("cuda", 1)
    calls = {"one": lambda: happened.append("one"), "other": lambda: happened.append("other")}
    in_turns(calls, repeats=3, device=device)
    first = happened.index(device)
    assert sorted(happened[:first]) == ["one", "other"]  # not timed
    timed = [happened[at : at + 3] for at in range(first, len(happened), 3)]
    assert len(timed) == 6
    assert all(before == after == device and name in calls for before, name, after in timed)
    happened.clear()
    in_turns(calls, repeats=3, device=torch.device("cpu"))
    assert device not in happened


def test_peak_memory(cli):
    shape = ("--layer", "16,16,3,64", "--batch", 8, "--train", "--repeats", 1)
    held = torch.ones(2**27)  # what this process holds isn't counted, though theirs were started from it
    ran = cli("bench", "layers", *shape, "--memory", "--json")
    del held
    assert ran.code == 0, ran.said
    (row,) = json.loads(ran.stdout)["results"]
    # Mixing feature maps keeps those of each of the g = 6 experts for the backward.
    maps = 8 * 16 * 64 * 64 * 4
    assert row["memory"]["static"] > maps
    assert row["memory"]["features"] > row["memory"]["dynamic"] + 4 * maps


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--fuse",),
        ("--bank-dtype", "float16"),
        ("--channels-last",),
        ("--train",),
        ("--against", "digits-resnet8"),
    ],
)
def test_a_model_against_its_original(cli, options):
    ran = cli(
        "bench",
        "model",
        "digits-resnet8",
        "--g",
        2,
        "--batch",
        "1,2",
        "--repeats",
        2,
        *options,
        "--json",
    )
    assert ran.code == 0, ran.said
    rows = json.loads(ran.stdout)["results"]
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(row["dynamic"]["median"] > 0 and row["limit"] > row["static"]["median"] for row in rows)
    assert all((row["other"] is not None) is ("--against" in options) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("layers", "--batch", "1,two"), "1,8,32"),
        (("layers", "--layer", "8,8,3"), "C_IN,C_OUT,KERNEL,SIZE"),
        (("layers", "--layer", "8,8,3,8,1,3"), "groups don't divide"),
        (("layers", "--threads", "0"), "at least one"),
        (("layers", "--method", "dinet"), "dynet"),
        (("model", "digits-resnet8", "--bank-dtype", "int8"), "float16 or bfloat16"),
        (("model", "digits-resnet8", "--fuse", "--train"), "isn't trained"),
        (("model", "digits-resnet8", "--compress", "int8", "--train"), "isn't trained"),
        (("model", "digits-resnet8", "--compress", "int8", "--bank-dtype", "float16"), "in one way"),
        (("model", "digits-resnet8", "--compress", "int4"), "int8 or bfloat16"),
    ],
)
def test_bad_input(cli, arguments, said):
    ran = cli("bench", *arguments)
    assert ran.code == 2
    assert said in ran.said
    assert not ran.stdout


def test_a_compiled_model_against_its_compiled_original(cli, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network, **options: compiled.append((network, options)))
    ran = cli("bench", "model", "digits-resnet8", "--g", 2, "--batch", "1", "--repeats", 2, "--compile")
    assert ran.code == 0, ran.said
    # Both, or the comparison isn't one; for the sizes that are timed, which a dynamic batch would slow.
    assert [type(network).__name__ for network, _ in compiled] == [type(compiled[0][0]).__name__] * 2
    assert [options for _, options in compiled] == [{"dynamic": False}] * 2


def test_compiling_without_a_compiler(cli):
    # Not monkeypatch, which would leave the option undone: the configuration has its own way back.
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        ran = cli("bench", "model", "digits-resnet8", "--g", 2, "--batch", "1", "--repeats", 2, "--compile")
    assert ran.code == 2
    assert "C++ compiler" in ran.said
    assert not ran.stdout

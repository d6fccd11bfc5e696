"""What a dynamic conv is called with and doesn't fit is refused by name, before any address is handed to C."""

import os
import subprocess
import sys
from pathlib import Path

import native_calls
import pytest
import torch

from dyconvert.errors import ArgumentError
from dyconvert.nn import DynamicConv2d, dynamic_conv, native_library
from dyconvert.nn.dispatch import force
from dyconvert.nn.running import STRATEGIES
from dyconvert.nn.transposed import dynamic_conv_transpose


def call(**changed):
    given = {
        "x": torch.zeros(2, 8, 6, 6),
        "weight": torch.zeros(3 * 4, 4, 3, 3),
        "bias": torch.zeros(12),
        "coefficients": torch.zeros(2, 3, 4),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 2,
        "shift": torch.zeros(4),
    } | changed
    return dynamic_conv(**given)


WRONG = {
    "coefficients of more images": ({"coefficients": torch.zeros(4, 3, 4)}, "4 images, and 2 images in the input"),
    "coefficients of one image for all": ({"coefficients": torch.zeros(1, 3, 4)}, "1 images, and 2 images"),
    "coefficients of other experts": ({"coefficients": torch.zeros(2, 5, 1)}, "5 experts"),
    "coefficients of no experts": ({"coefficients": torch.zeros(2, 0, 1)}, "0 experts"),
    "coefficients of other channels": ({"coefficients": torch.zeros(2, 3, 2)}, "one for each of 4 output channels"),
    "flat coefficients": ({"coefficients": torch.zeros(2, 3)}, r"\[N, g, 1\]"),
    "coefficients of another type": ({"coefficients": torch.zeros(2, 3, 4, dtype=torch.float64)}, "float64"),
    "a bank of other channels": ({"weight": torch.zeros(12, 8, 3, 3)}, "input has 8 channels, and the bank is for 16"),
    "a bank of another rank": ({"weight": torch.zeros(12, 4, 3)}, "as many in both"),
    "a bank without taps": ({"weight": torch.zeros(12, 4, 0, 3)}, "empty"),
    "a bank of whole numbers": ({"weight": torch.zeros(12, 4, 3, 3, dtype=torch.int32)}, "floating-point"),
    "a wider bank": ({"weight": torch.zeros(12, 4, 3, 3, dtype=torch.float64)}, "bank is of torch.float64"),
    "a bank elsewhere": ({"weight": torch.zeros(12, 4, 3, 3, device="meta")}, "weight is on meta"),
    "a short bias": ({"bias": torch.zeros(4)}, r"bias has the shape \[4\]"),
    "a short shift": ({"shift": torch.zeros(1)}, r"shift has the shape \[1\]"),
    "a bias elsewhere": ({"bias": torch.zeros(12, device="meta")}, "bias is on meta"),
    "an input without channels": ({"x": torch.zeros(2, 6, 6)}, "as many in both"),
    "an input without pixels": ({"x": torch.zeros(2, 8, 0, 6)}, "empty"),
    "a small input": ({"x": torch.zeros(2, 8, 2, 6), "padding": (0, 0)}, "larger than the padded input"),
    "a sparse input": ({"x": torch.zeros(2, 8, 6, 6).to_sparse()}, "dense"),
    "groups that don't divide": (
        {"weight": torch.zeros(9, 4, 3, 3), "bias": None, "shift": None, "coefficients": torch.zeros(2, 3, 1)},
        "evenly",
    ),
    "no groups": ({"groups": 0}, "groups"),
    "a stride of zero": ({"stride": (0, 1)}, "stride must be 2 whole numbers from 1 on"),
    "a stride of one number": ({"stride": (1,)}, "stride must be 2"),
    "a bare stride": ({"stride": 1}, "in"),
    "a negative padding": ({"padding": (-1, 1)}, "padding must be"),
    "a padding unknown": ({"padding": "full"}, "'full'"),
    "an endless padding": ({"padding": (2**62, 1)}, "padding must be"),
    "a dilation between numbers": ({"dilation": (1.5, 1)}, "dilation must be"),
}


@pytest.mark.parametrize(("changed", "said"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_refused(changed, said, training):
    with torch.set_grad_enabled(training):
        if training:
            changed = {"coefficients": torch.zeros(2, 3, 4)} | changed
            changed["coefficients"] = changed["coefficients"].clone().requires_grad_()
        with pytest.raises(ArgumentError, match=said):
            call(**changed)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_refuses(strategy):
    with force(strategy), pytest.raises(ArgumentError, match="4 images"):
        call(coefficients=torch.zeros(4, 3, 4))


def test_a_conv_module_refuses_coefficients_of_another_batch():
    conv = DynamicConv2d(2, 3, 3, padding=1, bias=False, g=2)
    with pytest.raises(ArgumentError, match="needs a predictor of its own"):
        conv(torch.zeros(8, 2, 5, 5), coefficients=torch.zeros(2, 2, 3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_no_images(training, kernel):
    weight = torch.zeros(12, 8, kernel, kernel, requires_grad=training)
    out = call(
        x=torch.zeros(0, 8, 6, 6),
        weight=weight,
        coefficients=torch.zeros(0, 3, 1),
        groups=1,
        padding=(kernel // 2,) * 2,
    )
    assert out.shape == (0, 4, 6, 6)
    if training:
        out.sum().backward()
        assert weight.grad.count_nonzero() == 0


def test_a_bank_whose_rows_are_one():
    # Its experts lie in the same place.
    row, x = torch.randn(1, 4, 3, 3), torch.randn(2, 8, 6, 6)
    eta = torch.rand(2, 3, 4)
    expected = call(x=x, weight=row.repeat(12, 1, 1, 1), coefficients=eta)
    torch.testing.assert_close(call(x=x, weight=row.expand(12, -1, -1, -1), coefficients=eta), expected)


def test_memory_that_was_freed():
    if native_library.library() is None:
        pytest.skip("torch itself reads it")
    weight = torch.zeros(12, 4, 3, 3)
    weight.untyped_storage().resize_(0)
    with torch.inference_mode(), pytest.raises(ArgumentError, match="no memory"):
        call(weight=weight)


def test_a_parameter_replaced_between_forward_and_backward():
    weight = torch.nn.Parameter(torch.zeros(12, 4, 3, 3))
    out = call(weight=weight)
    weight.data = torch.zeros(12, 4, 1, 1)
    with pytest.raises(RuntimeError):
        out.sum().backward()


def test_random_calls():
    ends = native_calls.main(1500)
    assert ends["refused"] > 500
    assert ends["computed"] > 200


@pytest.mark.sweep
def test_random_calls_under_address_sanitizer(tmp_path):
    """Errors, never a read outside."""
    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root))
    import hatch_build

    library = tmp_path / "native.so"
    flags = (*hatch_build.FLAGS, "-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer")
    problem = hatch_build.build(root / "dyconvert" / "nn" / "csrc", library, flags)
    assert not problem, problem
    compiler = os.environ.get("CXX", "g++")
    runtimes = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    for target in native_library.targets():
        ran = subprocess.run(
            [sys.executable, native_calls.__file__, "10000", "1", library],
            env=os.environ
            | {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "DYCONVERT_CPU": target},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]


TRANSPOSED = {
    "coefficients of more images": ({"coefficients": torch.zeros(4, 3, 4)}, "4 images, and 2 images in the input"),
    "coefficients of no images": ({"coefficients": torch.zeros(0, 3, 4)}, "0 images, and 2 images in the input"),
    "coefficients of other experts": ({"coefficients": torch.zeros(2, 5, 1)}, "5 experts"),
    "coefficients of other channels": ({"coefficients": torch.zeros(2, 3, 2)}, "one for each of 4 output channels"),
    "flat coefficients": ({"coefficients": torch.zeros(2, 3)}, r"\[N, g, 1\]"),
    "an input of other channels": ({"x": torch.zeros(2, 6, 6, 6)}, "input has 6 channels, and the bank is for 8"),
    "an input without a batch": ({"x": torch.zeros(8, 6, 6)}, "as many in both"),
    "a short bias": ({"bias": torch.zeros(4)}, r"bias has the shape \[4\]"),
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_transposed_conv_refuses_by_name(case):
    changed, said = TRANSPOSED[case]
    given = {
        "x": torch.zeros(2, 8, 6, 6),
        "weight": torch.zeros(3 * 8, 2, 3, 3),
        "bias": torch.zeros(12),
        "coefficients": torch.zeros(2, 3, 4),
        "stride": (1, 1),
        "padding": (1, 1),
        "output_padding": (0, 0),
        "groups": 2,
        "dilation": (1, 1),
    }
    assert dynamic_conv_transpose(**given).shape == (2, 4, 6, 6)
    with pytest.raises(ArgumentError, match=said):
        dynamic_conv_transpose(**(given | changed))

"""Measured choice: which strategy is the fastest is timed once for a shape, kept, and never where it would disturb."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from nets import ResidualNet, image, seeded
from torch.utils.flop_counter import FlopCounterMode

import dyconvert
from dyconvert.nn import choice, engines
from dyconvert.nn.choice import measuring, using
from dyconvert.nn.dispatch import dynamic_conv
from dyconvert.nn.measured_choices import VERSION, Choices, Key

# Each warns once: a second warning is an error.
pytestmark = pytest.mark.filterwarnings("error:.*strategy:RuntimeWarning", "error:.*measured:RuntimeWarning")
CPU = torch.device("cpu")


def a_key(batch: int = 2, device: torch.device = CPU) -> Key:
    sizes = (batch, 4, 6, 6), (12, 4, 3, 3), (batch, 3, 1)
    ones = (1, 1)
    kinds = torch.float32, torch.float32, device
    return Key(*sizes, ones, ones, ones, 1, *kinds, False, False, bias=False, training=False, threads=1, precision="")


class Bench:
    """Strategies that take the seconds they are given, on a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def trials(self, **seconds: float | Exception) -> dict[str, Callable[[], None]]:
        def trial(name: str, takes: float | Exception) -> Callable[[], None]:
            def run() -> None:
                self.calls.append(name)
                if isinstance(takes, Exception):
                    raise takes
                self.now += takes

            return run

        return {name: trial(name, takes) for name, takes in seconds.items()}


@pytest.fixture
def bench() -> Bench:
    return Bench()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_fastest_is_kept_for_the_process_and_for_the_next(bench: Bench, tmp_path: Path) -> None:
    choices = Choices(tmp_path, clock=bench.clock)
    trials = bench.trials(slow=0.5, fast=0.1, middling=0.2)
    assert choices.choose(a_key(), trials, "rule") == "fast"
    measured = len(bench.calls)
    assert choices.choose(a_key(), trials, "rule") == choices.known(a_key()) == "fast"
    assert choices.known(a_key(3)) is None
    following = Choices(tmp_path, clock=bench.clock)
    assert following.known(a_key()) is None  # the file is read where it is asked for
    assert following.choose(a_key(), trials, "rule") == "fast"
    assert len(bench.calls) == measured
    (path,) = files(tmp_path)
    read = json.loads(path.read_text())
    assert read["version"] == VERSION
    assert f"torch-{torch.__version__}" in read["environment"]
    ((name, entry),) = read["choices"].items()
    assert "x 2x4x6x6 float32" in name
    assert entry == {"strategy": "fast", "seconds": pytest.approx({"slow": 0.5, "fast": 0.1, "middling": 0.2})}


def test_a_few_milliseconds_each(bench: Bench) -> None:
    choices = Choices(clock=bench.clock)
    choices.choose(a_key(), bench.trials(long=1.0, short=1e-4, shortest=1e-9), "rule")
    assert bench.calls.count("long") == 4  # to warm up, to see how long it is, and twice
    assert bench.calls.count("short") * 1e-4 < 0.006
    assert bench.calls.count("shortest") < 50


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), RuntimeError("MPS backend out of memory")],
)
def test_out_of_memory_in_the_middle_of_a_measurement(bench: Bench, tmp_path: Path, error: Exception) -> None:
    choices = Choices(tmp_path, clock=bench.clock)
    with pytest.warns(RuntimeWarning, match=r"wasn't memory.*'large'.*out of memory"):
        assert choices.choose(a_key(), bench.trials(large=error, small=0.1), "rule") == "small"
    assert choices.choose(a_key(3), bench.trials(large=error), "rule") == "rule"
    assert choices.known(a_key(3)) == "rule"  # it isn't tried again at each call
    assert not files(tmp_path)  # the next process may have the memory
    assert choices.choose(a_key(1), bench.trials(large=0.1, small=0.2), "rule") == "large"


def test_a_strategy_that_fails_is_left_out_with_one_warning(bench: Bench, tmp_path: Path) -> None:
    choices = Choices(tmp_path, clock=bench.clock)
    error = RuntimeError("no kernel image is available for execution on the device\nand more")
    with pytest.warns(RuntimeWarning, match=r"'broken' fails here.*no kernel image is available"):
        assert choices.choose(a_key(), bench.trials(broken=error, plain=0.1), "rule") == "plain"
    assert choices.choose(a_key(3), bench.trials(broken=error, plain=0.1), "rule") == "plain"
    assert bench.calls.count("broken") == 1
    assert not files(tmp_path)  # the next process may have what was missing
    # It fails in the middle of a run, after it was chosen.
    choices = Choices(clock=bench.clock)
    choices.choose(a_key(), bench.trials(broken=0.1, plain=0.2), "rule")
    with pytest.warns(RuntimeWarning, match="'broken'"):
        choices.fail(["broken"], error)
    assert choices.known(a_key()) is None
    assert choices.choose(a_key(), bench.trials(broken=0.1, plain=0.2), "rule") == "plain"


BROKEN = {
    "empty": "",
    "no JSON": "{'",
    "cut off": '{"version": 1, "choices": {"x',
    "another layout": '{"version": 1, "choices": ["fast"]}',
    "no version": '{"choices": {}}',
    "not a measurement": '{"version": 1, "choices": {"x": {"strategy": 3, "seconds": {"a": "NaN"}}}}',
    "a list": "[]",
    "deep": "[" * 100_000,
    "binary": "\0\xff",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_replaced(bench: Bench, tmp_path: Path, text: str) -> None:
    Choices(tmp_path, clock=bench.clock).choose(a_key(), bench.trials(a=0.1), "rule")
    (path,) = files(tmp_path)
    path.write_bytes(text.encode("latin-1"))
    choices = Choices(tmp_path, clock=bench.clock)
    with pytest.warns(RuntimeWarning, match="can't be read"):
        assert choices.choose(a_key(), bench.trials(a=0.2, b=0.1), "rule") == "b"
    choices.choose(a_key(3), bench.trials(a=0.2, b=0.1), "rule")
    assert len(json.loads(path.read_text())["choices"]) == 2
    assert files(tmp_path) == [path]  # no temporary file is left


def test_a_file_that_names_a_strategy_that_is_gone(bench: Bench, tmp_path: Path) -> None:
    Choices(tmp_path, clock=bench.clock).choose(a_key(), bench.trials(gone=0.1), "rule")
    choices = Choices(tmp_path, clock=bench.clock)
    assert choices.choose(a_key(), bench.trials(b=0.1), "rule") == "b"


def test_two_processes_write_one_file(bench: Bench, tmp_path: Path) -> None:
    one, other = (Choices(tmp_path, clock=bench.clock) for _ in range(2))
    for batch in (1, 2):
        one.choose(a_key(batch), bench.trials(a=0.1), "rule")
        other.choose(a_key(batch + 10), bench.trials(b=0.1), "rule")
    (path,) = files(tmp_path)
    assert len(json.loads(path.read_text())["choices"]) == 4


def test_a_folder_that_cannot_be_written(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = Choices(tmp_path / "file", clock=bench.clock)  # a folder's place is taken by a file
    with pytest.warns(RuntimeWarning, match="can't be (written|read)"):
        assert choices.choose(a_key(), bench.trials(a=0.1), "rule") == "a"


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYCONVERT_CACHE", str(tmp_path))
    assert choice.cache_folder() == tmp_path / "choices"
    monkeypatch.delenv("DYCONVERT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice.sys, "platform", "linux")
    assert choice.cache_folder() == tmp_path / "dyconvert" / "choices"


# Below, a CPU plays the device that is measured on.


@pytest.fixture
def measured() -> Iterator[Choices]:
    with using(Choices(cpu=True)) as choices:
        yield choices


def conv(batch: int = 2, *, grad: bool = False, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, 4, 6, 6), (12, 4, 3, 3), (batch, 3, 1)
    x, weight, eta = (torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes)
    return [x, weight, None, eta]


GEOMETRY = (1, 1), (1, 1), (1, 1), 1


def test_the_first_call_of_each_shape_measures(measured: Choices) -> None:
    with torch.no_grad():
        for batch in (1, 2, 2, 3):
            dynamic_conv(*conv(batch), *GEOMETRY)
    assert len(measured) == 3
    dynamic_conv(*conv(grad=True), *GEOMETRY)
    dynamic_conv(*conv(dtype=torch.float64), *GEOMETRY)
    x, *others = conv()
    dynamic_conv(x.contiguous(memory_format=torch.channels_last), *others, *GEOMETRY)
    names = list(measured.items())
    assert len(names) == 6
    assert sum("training" in name for name in names) == 1
    assert sum("float64" in name for name in names) == 1
    assert sum("6x6 float32 channels_last" in name for name in names) == 1
    assert all(set(found.seconds) == {"native", "tiled", "groups", "unfold"} for found in measured.items().values())


def test_a_measurement_leaves_nothing_behind(measured: Choices) -> None:
    tensors = conv(grad=True)
    state = torch.get_rng_state()
    out = dynamic_conv(*tensors, *GEOMETRY)
    assert all(t.grad is None for t in tensors if t is not None)
    assert torch.equal(torch.get_rng_state(), state)
    out.sum().backward()
    grads = [t.grad for t in tensors if t is not None]
    with measuring("off"):
        again = conv(grad=True)
        dynamic_conv(*again, *GEOMETRY).sum().backward()
    torch.testing.assert_close(grads, [t.grad for t in again if t is not None])


def test_activation_checkpointing_counts_what_is_saved_alike_with_and_without(measured: Choices) -> None:
    tensors = conv(grad=True)
    checkpoint = torch.utils.checkpoint.checkpoint
    out = checkpoint(lambda *t: dynamic_conv(*t, *GEOMETRY), *tensors, use_reentrant=False)
    out.sum().backward()
    assert len(measured) == 1


@pytest.mark.parametrize("training", [False, True])
def test_under_autocast_what_was_cast_is_measured(measured: Choices, training: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        assert dynamic_conv(*conv(grad=True), *GEOMETRY).dtype == torch.bfloat16
    (name,) = measured.items()
    assert "6x6 bfloat16" in name


def test_off_and_read_only(measured: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> None:
        dynamic_conv(*conv(), *GEOMETRY)

    for mode in ("off", "read-only"):
        with measuring(mode):
            call()
            assert not len(measured)
            with measuring("on"):
                assert choice.mode() == "on"
    for value in ("off", "0", "read-only"):
        monkeypatch.setenv("DYCONVERT_MEASURE", value)
        call()
        assert not len(measured)
    monkeypatch.setenv("DYCONVERT_MEASURE", "1")
    call()
    assert len(measured) == 1


def test_read_only_reads_what_another_process_found(tmp_path: Path) -> None:
    with using(Choices(tmp_path, cpu=True)):
        dynamic_conv(*conv(), *GEOMETRY)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    with using(Choices(tmp_path, cpu=True)) as choices, measuring("read-only"):
        dynamic_conv(*conv(), *GEOMETRY)
        dynamic_conv(*conv(5), *GEOMETRY)
        assert len(choices) == 1
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_a_mode_that_does_not_exist(measured: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dyconvert.DyconvertError, match=r"'maybe'.*on, off, read-only"), measuring("maybe"):
        pass
    monkeypatch.setenv("DYCONVERT_MEASURE", "maybe")
    with pytest.raises(dyconvert.DyconvertError, match=r"DYCONVERT_MEASURE says 'maybe'"):
        dynamic_conv(*conv(), *GEOMETRY)


@pytest.mark.parametrize("what", ["deterministic", "cudnn"])
def test_deterministic_mode_goes_by_rule(measured: Choices, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        dynamic_conv(*conv(), *GEOMETRY)
    else:
        torch.use_deterministic_algorithms(True)
        try:
            dynamic_conv(*conv(), *GEOMETRY)
        finally:
            torch.use_deterministic_algorithms(False)
    assert not len(measured)


def test_never_while_a_graph_is_captured(measured: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "capturing", lambda x: True)
    dynamic_conv(*conv(), *GEOMETRY)
    assert not len(measured)


def test_never_by_what_looks_at_operations_or_makes_programs_of_them(measured: Choices) -> None:
    with measuring("off"):
        model = dyconvert.convert(seeded(ResidualNet), g=2)
    x = image(2)
    with torch.no_grad():
        torch.export.export(model, (x,))
        torch.compile(model, backend="eager", fullgraph=True)(x)
        with FlopCounterMode(display=False):
            model(x)
        torch.func.vmap(lambda one: model(one.unsqueeze(0)))(x)
        meta = [t if t is None else t.to("meta") for t in conv()]
        dynamic_conv(*meta, *GEOMETRY)
    torch.func.grad(lambda x: model(x).sum())(x)
    assert not len(measured)
    with torch.no_grad():
        model(x)
    assert len(measured) > 1  # as it does otherwise
    torch._dynamo.reset()


def test_models_compute_the_same_with_what_was_measured(measured: Choices) -> None:
    model = dyconvert.convert(seeded(ResidualNet).double())
    x = image(3, dtype=torch.float64)
    with torch.no_grad():
        chosen = [model(x), model(x)]
        with measuring("off"):
            by_rule = model(x)
    for out in chosen:
        torch.testing.assert_close(out, by_rule, rtol=1e-12, atol=1e-12)


def test_the_processes_own_choices_write_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYCONVERT_CACHE", str(tmp_path))
    monkeypatch.setattr(choice, "_of_process", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dynamic_conv(*conv(), *GEOMETRY)
        dyconvert.tune(dyconvert.convert(seeded(ResidualNet)), image(), repeats=1)
    assert os.listdir(tmp_path) == []

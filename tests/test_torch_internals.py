"""Each use of torch's private API, in the version that is installed; and that no other file of the package has one."""

import ast
import copy
import ctypes
import inspect
import io
import pickle
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dyconvert
from dyconvert.torch_internals import compiling, copies, messages, modules, operators, trees, watching

PACKAGE = Path(dyconvert.__file__).parent


class Names(watching.DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_operators_but_for_those_without_modes():
    with Names() as mode:
        x = torch.ones(2)
        with watching.without_modes():
            x = x * 3
        x = x + 1
    assert mode.names == ["ones.default", "add.Tensor"]
    assert x.tolist() == [4.0, 4.0]


def test_observed():
    assert not watching.observed()
    with Names():
        assert watching.observed()
    seen = []
    torch.func.grad(lambda x: (seen.append(watching.observed()), x.sum())[1])(torch.ones(2))
    with torch.autograd.forward_ad.dual_level():
        seen.append(watching.observed())
    assert seen == [True, True]
    assert not watching.observed()


def test_nodes_of_autograd_tell_their_operator_and_what_it_was_given():
    x = torch.ones(2, 3, 4, requires_grad=True)
    assert watching.operator_of(x.relu().grad_fn) == "Relu"
    assert watching.operator_of(nn.functional.max_pool2d(x, 2).grad_fn).startswith("MaxPool2D")
    mean = x.mean(1).grad_fn
    assert tuple(watching.saved_argument(mean, "self_sym_sizes") or watching.saved_argument(mean, "self_sizes")) == (
        2,
        3,
        4,
    )
    assert tuple(watching.saved_argument(mean, "dim")) == (1,)
    assert watching.saved_argument(torch.cat([x, x], 1).grad_fn, "dim") == 1
    assert tuple(watching.saved_argument(nn.functional.pad(x, (0, 0, 1, 2)).grad_fn, "pad")) == (0, 0, 1, 2)
    assert watching.saved_argument(mean, "nothing") is None


def test_multiply_adds_by_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 5, 1)))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.ones(1, 3, 2, 2))
    counts = watching.multiply_adds(counter, model)
    assert {name: counts[name] for name in ("", "0", "1", "1.0")} == {"": 128, "0": 48, "1": 80, "1.0": 80}


def test_classes_of_modules():
    for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        assert issubclass(conv, modules.ConvNd)
        assert issubclass(conv, modules.ConvTransposeNd) == ("Transpose" in conv.__name__)
        assert (modules.conv_forward(conv) is modules.ConvNd._conv_forward) == ("Transpose" in conv.__name__)
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm):
        assert issubclass(norm, modules.BatchNorm)
    assert issubclass(nn.InstanceNorm2d, modules.BatchOrInstanceNorm)
    assert not issubclass(nn.GroupNorm, modules.BatchOrInstanceNorm)
    assert modules.CONV_FORWARD in vars(nn.Conv2d)
    assert modules.CALL in vars(nn.Module)


def test_a_convs_forward_convolves_by_that_method(monkeypatch):
    monkeypatch.setattr(nn.Conv2d, modules.CONV_FORWARD, lambda self, x, weight, bias: "here")
    assert nn.Conv2d(1, 1, 1)(torch.ones(1, 1, 1, 1)) == "here"


def test_output_padding_of_a_transposed_conv():
    conv = nn.ConvTranspose2d(2, 3, 3, stride=2)
    x = torch.ones(1, 2, 4, 5)
    args = conv.stride, conv.padding, conv.kernel_size, 2, conv.dilation
    assert list(modules.output_padding(conv, x, [10, 11], *args)) == [1, 0]
    assert list(modules.output_padding(conv, x, None, *args)) == [0, 0]


def test_tables_of_a_module_are_those_that_it_uses():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2))
    conv, norm = model
    assert list(modules.parameter_table(conv)) == ["weight", "bias"]
    assert modules.parameter_table(conv)["bias"] is None
    assert list(modules.buffer_table(norm)) == ["running_mean", "running_var", "num_batches_tracked"]
    assert modules.tensor_tables(norm) == (modules.parameter_table(norm), modules.buffer_table(norm))
    modules.parameter_table(conv)["bias"] = nn.Parameter(torch.ones(2))
    modules.buffer_table(norm)["running_mean"] = torch.full((2,), 7.0)
    modules.child_table(model)["1"] = nn.Identity()
    assert conv.bias.tolist() == [1, 1]
    assert norm.running_mean.tolist() == [7, 7]
    assert isinstance(model[1], nn.Identity)


def test_hooks_of_a_module():
    conv = nn.Conv2d(1, 1, 1)
    calls = []
    conv.register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True)
    conv.register_forward_hook(lambda *args: calls.append("after"), with_kwargs=True, always_call=True)
    kept = conv.register_forward_hook(lambda *args: calls.append("kept"))
    (before,), (after, _) = modules.forward_pre_hooks(conv), modules.forward_hooks(conv)
    conv(torch.ones(1, 1, 1, 1))
    for number in (before, after):
        modules.remove_hook(conv, number)
    conv(torch.ones(1, 1, 1, 1))
    assert calls == ["before", "after", "kept", "kept"]
    kept.remove()
    tables = [name for name, value in vars(conv).items() if "hook" in name and value]
    assert not tables, "a table of hooks that remove_hook doesn't know"


def test_hooks_of_a_tensor():
    parameter = nn.Parameter(torch.ones(1))
    assert modules.gradient_hooks(parameter) == modules.accumulation_hooks(parameter) == []
    parameter.register_hook(print)
    parameter.register_post_accumulate_grad_hook(repr)
    assert modules.gradient_hooks(parameter) == [print]
    assert modules.accumulation_hooks(parameter) == [repr]


def test_writing_in_place_is_counted():
    x = torch.ones(2)
    before = modules.times_written(x)
    x.add_(1)
    assert modules.times_written(x) == before + 1


def test_versions_beside_a_state_dict():
    norm = nn.BatchNorm2d(2)
    state = norm.state_dict()
    assert modules.versions_of(state)[""] == {"version": 2}
    assert modules.versions_of({}) is None
    modules.set_versions(state, {"": {"version": 1}})
    del state["num_batches_tracked"]
    norm.load_state_dict(state)  # strict: a version 1 has none


def test_lazy_modules():
    lazy = nn.LazyConv2d(2, 1)
    assert modules.is_lazy(lazy)
    lazy(torch.ones(1, 3, 2, 2))
    assert not modules.is_lazy(lazy)
    assert not modules.is_lazy(nn.Conv2d(1, 1, 1))


def test_copies_of_a_traced_module_keep_what_the_user_put_on_it():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout()))
    traced.note = "mine"
    traced.register_forward_hook(lambda module, args, output: output + 1)
    traced.get_submodule("1").eval()
    copies.keep_when_copied(traced)
    again = copy.deepcopy(copy.deepcopy(traced))
    assert again.note == "mine"
    assert len(modules.forward_hooks(again)) == 1
    assert copies.modes_of(vars(again)) == {"": True, "0": True, "1": False}
    bare = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 1, 1)))
    copies.fill_graph_module(bare, {"note": "given", "training": False}, {"0": False})
    assert (bare.note, bare.training, bare.get_submodule("0").training) == ("given", False, False)


def test_unsafe_view_may_be_written_to_in_place():
    out = operators.unsafe_view(torch.ones(2, 3, requires_grad=True) * 1, (6,))
    assert out.tolist() == [1] * 6
    assert not out._is_view()


def test_sums_of_rows():
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    index = torch.tensor([0, 1, 2, 1], dtype=torch.int32)
    sums = operators.sums_of_rows(rows, index, 2, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert sums.tolist() == [[21, 42], [340, 680]]


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_images(groups):
    x, kernels = torch.randn(3, 4, 6, 5), torch.randn(3, 6, 4 // groups, 3, 3)
    walk = ((2, 1), (1, 0), (1, 2))
    leaves = x.clone().requires_grad_(), kernels.clone().requires_grad_()
    pairs = zip(*leaves, strict=True)
    out = torch.cat([nn.functional.conv2d(image[None], kernel, None, *walk, groups) for image, kernel in pairs])
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    found = operators.gradients_of_images(
        grad, x, kernels.flatten(0, 1), *walk, groups, needs_x=True, needs_kernels=True
    )
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1].view(kernels.shape), expected[1])


def test_the_address_of_torchs_threads():
    if torch.__version__ < "2.10":
        pytest.skip("of torch 2.10 on")
    called = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(
        lambda begin, end, context: called.append((begin, end))
    )
    address = operators.parallel_for()
    assert address, "no torch_parallel_for in torch's library: the compiled kernels won't be used"
    run = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, type(function), ctypes.c_void_p
    )
    assert run(address)(0, 1, 1, function, None) == 0
    assert called == [(0, 1)]


def test_whether_a_processor_multiplies_bfloat16():
    assert operators.multiplies_bfloat16() in (True, False)


def test_compiled_models_are_known_without_the_compiler():
    class OptimizedModule(nn.Module):
        pass

    assert not compiling.is_compiled(nn.Conv2d(1, 1, 1))
    assert not compiling.is_compiled(OptimizedModule())
    compiled = torch.compile(nn.Conv2d(1, 1, 1))
    assert compiling.is_compiled(compiled)
    assert all(key.startswith(f"{compiling.ORIGINAL}.") for key in compiled.state_dict())


def test_a_result_that_the_compiler_may_keep():
    @compiling.constant_result
    def number() -> int:
        return len(inspect.stack(0))  # it couldn't be traced

    program = torch.compile(lambda x: x + (number() > 0), backend="eager", fullgraph=True)
    assert program(torch.ones(1)).tolist() == [2.0]


def test_what_a_compiler_raises():
    def fails(graph, inputs):
        raise ValueError("no compiler")

    with pytest.raises(compiling.compile_error(), match="no compiler"):
        torch.compile(lambda x: x + 1, backend=fails)(torch.ones(1))


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_words_of_torchs_errors(tmp_path):
    file = io.BytesIO()
    torch.save(Evil(), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError) as refused:
        torch.load(file, weights_only=True)
    text = str(refused.value)
    assert messages.refused_code(text).endswith("print")
    assert messages.refused_code("another error") is None
    assert len(messages.without_advice(text)) < len(text), "torch's advice has another end"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "scripted.pt")
        with pytest.raises(RuntimeError) as scripted:
            torch.load(tmp_path / "scripted.pt", weights_only=True)
    assert messages.says_torchscript(str(scripted.value))


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: torch.ones(1, 1) @ x,
    ],
    ids=["item", "bool", "nonzero", "mask", "numpy", "tolist", "matmul"],
)
def test_values_that_a_meta_tensor_lacks(asks):
    asks(torch.ones(1))
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)) as error:
        asks(torch.ones(1, device="meta"))
    assert messages.needs_values(error.value)


def test_needs_values_is_no_other_error():
    with pytest.raises(RuntimeError) as error:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not messages.needs_values(error.value)


def test_trees():
    tree = {"a": [torch.ones(1), 2], "b": (torch.ones(2),)}
    leaves, spec = trees.tree_flatten(tree)
    assert [type(leaf) for leaf in leaves] == [Tensor, int, Tensor]
    assert trees.tree_unflatten(leaves, spec)["b"][0] is tree["b"][0]
    assert trees.tree_leaves(tree)[1] == 2
    assert trees.tree_map_only(Tensor, len, tree) == {"a": [1, 2], "b": (2,)}
    assert trees.tree_is_leaf(2)
    assert not trees.tree_is_leaf([])


@pytest.mark.parametrize("file", [file for file in PACKAGE.rglob("*.py") if "fx.wrap(" in file.read_text("utf-8")])
def test_functions_that_symbolic_tracing_leaves_alone_are_named_as_in_their_file(file):
    """`torch.fx.wrap` takes a name: one that its file doesn't have fails at the first trace, of any model."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    names |= {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.fx.wrap"]
    assert {call.args[0].value for call in calls} <= names


# ---- No other file has one ----

ROOM = PACKAGE / "torch_internals"
OTHERS = [file for file in PACKAGE.rglob("*.py") if ROOM not in file.parents]
# Rooms of the other libraries' insides.
LIGHTNING = PACKAGE / "finetuning" / "training" / "lightning_internals.py"
# Documented, although they begin with an underscore: NamedTuple's.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make"}
OF_TORCH = {
    name
    for thing in (nn.Module(), nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), torch.ones(1), {})
    for name in dir(thing)
    if name.startswith("_") and not name.startswith("__")
}
WORDS = ("_orig_mod", "_conv_forward", "_call_impl", "_metadata", "_saved_", "OptimizedModule", "WeightsUnpickler")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Private names that the package itself gives: functions, classes, attributes, fields, variables."""
    names = {"_static_class"}  # of `surgery/standins.py`, which sets it past the module's own `__setattr__`
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                own = isinstance(node, ast.Name) or ast.unparse(node.value) in ("self", "cls")
                names.add((node.id if isinstance(node, ast.Name) else node.attr) if own else "")
    return {name for name in names if is_private(name)}


OWN = own_names()


def private_uses(file: Path) -> Iterator[str]:
    """Private names that are none of the package's own, with their lines."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            of_self = ast.unparse(node.value) in ("self", "cls", "super()")
            of_torch = node.attr in OF_TORCH and not of_self
            if node.attr not in OWN | DOCUMENTED or of_torch or ast.unparse(node.value).startswith("torch."):
                names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dyconvert"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            names = [part for part in parts if is_private(part)]
        elif isinstance(node, ast.Import) and node.names[0].name not in sys.stdlib_module_names:
            names = [part for alias in node.names for part in alias.name.split(".") if is_private(part)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [word for word in WORDS if word in node.value]
        yield from (f"{file.relative_to(PACKAGE)}:{node.lineno} {name}" for name in names)


def test_no_other_file_has_private_names():
    found = [use for file in OTHERS if file != LIGHTNING for use in private_uses(file)]
    assert not found, "write a function in torch_internals/ for: " + ", ".join(found)


def test_private_names_are_found(tmp_path):
    written = {
        "from torch.utils._pytree import tree_map": "_pytree",
        "import torch._dynamo": "_dynamo",
        "x = torch._C._is_tracing": "_is_tracing",
        "def f(module): return module._buffers": "_buffers",
        "class A:\n def f(self): return self._average_model": "_average_model",
        "hasattr(model, '_orig_mod')": "_orig_mod",
    }
    file = PACKAGE / "written.py"
    for text, name in written.items():
        tree = ast.parse(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "read_text", lambda self, encoding, text=text: text)
            assert any(name in use for use in private_uses(file)), ast.dump(tree)


def test_totals_are_counted_without_asking_for_modules():
    layer, x = nn.Linear(3, 5), torch.ones(2, 3)
    with watching.count_totals_only(FlopCounterMode(display=False)) as counter:
        z = x.requires_grad_()
        torch.autograd.grad(layer(z).sum(), z)
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 5)  # forward, and the gradient of the input

"""Compiles what the engine launches, for GPUs that this machine needn't have: `python triton_compiled.py 80 90`.

Triton brings a compiler of its own down to machine code. What it needs of a launch are the arguments' types, which
are 1, and which are divisible by 16: taken here from launches that the engine makes on a CPU, and that only this
file sees. Prints a line of JSON for each: registers spilled, shared memory, and what it was compiled for.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Needs, Operands
from dyconvert.nn.triton import engine, gradient_kernels, kernels, launch

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Launches:
    """In place of the kernels: notes what they are called with."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        launches = self.found
        kernel = getattr(kernels if hasattr(kernels, name) else gradient_kernels, name)

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                assert 1 <= len(grid) <= 3
                assert all(0 < size < (2**31 if axis == 0 else 2**16) for axis, size in enumerate(grid)), grid
                return lambda *args, **options: launches.append((kernel, args, options))

        return Kernel()


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], capability: int) -> Any:
    """The launch's machine code."""
    names = kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = args[index] if index < len(args) else options[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif index >= len(args) or (value == 1 and not kernel.params[index].do_not_specialize):
            signature[name] = "constexpr"
            constants[name] = value
        else:
            assert isinstance(value, int), (name, value)
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not kernel.params[index].do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    chosen = {key: value for key, value in options.items() if key in ("num_warps", "num_stages")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen)


def resources(binary: bytes) -> dict[str, int]:
    """Registers a thread, bytes of shared memory, and bytes a thread that registers were spilled to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}
    return {name.lower(): found[name] for name in ("REG", "SHARED", "STACK", "LOCAL")}


def launches(dtype: torch.dtype, batch: int, conv: tuple[int, ...], *, last: bool, per_channel: bool) -> list[Any]:
    """What the engine launches for a conv's forward and backward, by all its tiles."""
    c_in, c_out, kernel, size, stride, groups = conv
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(batch, c_in, size, size, dtype=dtype).contiguous(memory_format=form)
    weight = torch.empty(6 * c_out, c_in // groups, kernel, kernel, dtype=dtype).contiguous(memory_format=form)
    eta = torch.empty(batch, 6, c_out if per_channel else 1, dtype=dtype)
    geometry = Geometry((stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
    seen = Launches()
    launch._kernels = launch._gradient_kernels = lambda: seen
    for tile in engine.TILES.values():
        out = launch.forward(Operands(x, weight, torch.empty(6 * c_out), Mixing(eta), geometry), tile)
        operands = Operands(x, weight, None, Mixing(eta), geometry)
        launch.backward(torch.empty_like(out), operands, Needs(True, True, True, False), tile)
    return seen.found


def main() -> None:
    quick = "--quick" in sys.argv
    capabilities = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    # C_in, C_out, kernel, size, stride, groups
    convs = [(64, 64, 3, 14, 2, 2), (96, 96, 3, 14, 2, 96), (256, 256, 3, 14, 1, 1), (64, 256, 1, 14, 1, 1)]
    convs = convs[:1] if quick else convs
    done = set()
    for dtype in (torch.bfloat16,) if quick else TYPES:
        for last in (True,) if quick else (False, True):
            for conv in convs:
                for kernel, args, options in launches(dtype, 64, conv, last=last, per_channel=last):
                    for capability in capabilities:
                        made = compiled(kernel, args, options, capability)
                        if made.hash in done:
                            continue
                        done.add(made.hash)
                        used = resources(made.asm["cubin"])
                        constants = {key: value for key, value in options.items() if key.isupper()}
                        line = {"kernel": kernel.__name__, "capability": capability, "dtype": TYPES[dtype]}
                        line |= used | {
                            "conv": conv,
                            "tensor_cores": "wgmma" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"],
                            **constants,
                        }
                        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

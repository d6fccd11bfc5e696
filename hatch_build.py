"""Builds the kernels in `dyconvert/nn/csrc` when a wheel is built. Where there is no C++ compiler, dyconvert does
without them: everything works, dynamic convs on a CPU take longer. `DYCONVERT_NATIVE=1` makes that an error, and
`DYCONVERT_NATIVE=0` leaves them out."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # `python hatch_build.py` builds the library alone
    BuildHookInterface = object

# Each file of `csrc/targets` says itself which instructions it may use, so all are compiled with the same flags.
# GCC warns of its own headers (-Wno-uninitialized, -Wno-maybe-uninitialized), and of how vectors are passed between
# libraries, which they aren't (-Wno-psabi).
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
)


class NativeKernels(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / "dyconvert" / "nn"
        library = folder / "_native.so"
        library.unlink(missing_ok=True)
        wish = os.environ.get("DYCONVERT_NATIVE")
        problem = "DYCONVERT_NATIVE=0 says so." if wish == "0" else build(folder / "csrc", library)
        if problem and wish == "1":
            raise RuntimeError(f"DYCONVERT_NATIVE=1 asks for compiled kernels, but {problem}")
        if problem:
            self.app.display_warning(f"dyconvert is installed without its compiled kernels: {problem}")
            return
        build_data["artifacts"].append("dyconvert/nn/_native.so")
        build_data["pure_python"] = False
        platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform_tag}"  # it is called through ctypes, so any Python will do


def build(folder: Path, library: Path, flags: tuple[str, ...] = FLAGS) -> str:
    """Compile the sources in `folder`. Returns what kept it from that, or nothing."""
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    compiler = next((name for name in names if name and shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        return "there is no C++ compiler. Install g++ or clang++ and install dyconvert again to have them."
    command = [*shlex.split(compiler), *flags]
    sources = [folder / "native.cpp", *sorted((folder / "targets").glob("*.cpp"))]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(work) / f"{source.stem}.o" for source in sources]
        runs = pool.map(
            lambda pair: _run([*command, f"-I{folder}", "-c", str(pair[0]), "-o", str(pair[1])]),
            zip(sources, objects, strict=True),
        )
        said = "\n".join(filter(None, runs)) or _run([*command, "-shared", *map(str, objects), "-o", str(library)])
    return f"{compiler} failed:\n{said}" if said else ""


def _run(command: list[str]) -> str:
    """Returns what a failed command said, or nothing."""
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return (run.stderr.strip() or f"exit code {run.returncode}") if run.returncode else ""


def _up_to_date(folder: Path, library: Path) -> bool:
    """Whether the library is newer than all that it is made of, this file among it."""
    sources = [Path(__file__), *(path for path in folder.rglob("*") if path.suffix in (".h", ".cpp"))]
    return library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in sources)


if __name__ == "__main__":  # python hatch_build.py [FLAG...]: builds the library in the source tree, where it is older
    nn = Path(__file__).parent / "dyconvert" / "nn"
    if sys.argv[1:] or not _up_to_date(nn / "csrc", nn / "_native.so"):
        sys.exit(build(nn / "csrc", nn / "_native.so", (*FLAGS, *sys.argv[1:])) or 0)

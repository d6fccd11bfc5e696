"""Builds the kernels in `dyconvert/nn/csrc` when a wheel is built. Where there is no C++ compiler, dyconvert does
without them: everything works, dynamic convs on a CPU take longer."""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra")
# Processors since 2013; `native.py` asks for them. Elsewhere the compiler's own choice.
X86_FLAGS = ("-mavx2", "-mfma", "-mf16c")


class NativeKernels(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root) / "dyconvert" / "nn"
        library = folder / "_native.so"
        library.unlink(missing_ok=True)
        problem = build(folder / "csrc" / "native.cpp", library)
        if problem:
            self.app.display_warning(f"dyconvert is installed without its compiled kernels: {problem}")
            return
        build_data["artifacts"].append("dyconvert/nn/_native.so")
        build_data["pure_python"] = False
        platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform_tag}"  # it is called through ctypes, so any Python will do


def build(source: Path, library: Path) -> str:
    """Compile `source`. Returns what kept it from that, or nothing."""
    if os.environ.get("DYCONVERT_NATIVE") == "0":
        return "DYCONVERT_NATIVE=0 says so."
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    compiler = next((name for name in names if name and shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        return "there is no C++ compiler. Install g++ or clang++ and install dyconvert again to have them."
    flags = [*FLAGS, *(X86_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else ())]
    run = subprocess.run(
        [*shlex.split(compiler), *flags, str(source), "-o", str(library)], capture_output=True, text=True, check=False
    )
    return f"{compiler} failed:\n{run.stderr.strip()}" if run.returncode else ""

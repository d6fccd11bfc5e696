"""Names of the machine that computes: its GPU, or its processor with the compiled kernels that it takes."""

import platform
from pathlib import Path

import torch

from dyconvert.nn import native_library


def computer(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the compiled kernels that it takes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} of {processor()}"
    return f"{processor()}; compiled kernels: {native_library.target() or 'none'}"


def processor() -> str:
    """The name of this machine's processor, with its family, which generic names leave out."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.partition(":")[::2] for line in reversed(lines))
    about = {name.strip(): value.strip() for name, value in fields.items()}
    name = about.get("model name") or platform.machine()
    return f"{name} (family {about['cpu family']}, model {about['model']})" if "cpu family" in about else name

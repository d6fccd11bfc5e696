"""Words in the messages of torch's errors, where no exception type says the same. Imports nothing, torch least of all.

If torch says it otherwise, dyconvert's own message becomes less exact. A run on the meta device is then not repeated
with values.
"""

import re


def without_advice(message: str) -> str:
    """What `torch.load` found wrong, without its advice to run the file's code: before this mark, or in lines of it."""
    lines = message.rpartition("WeightsUnpickler error:")[2].splitlines()
    return "\n".join(line for line in lines if line.strip() and "weights_only" not in line)


def refused_code(message: str) -> str | None:
    """What `torch.load(weights_only=True)` refused to run, as `os.system`; None where that wasn't the reason."""
    name = re.search(r"GLOBAL ([\w.]+)", message)
    return name[1] if name else None


def says_torchscript(message: str) -> bool:
    """Whether `torch.load` was given a TorchScript program."""
    return "TorchScript" in message


def needs_values(error: Exception) -> bool:
    """Whether a run on the meta device failed because there are no values there, and not by a mistake in the model."""
    return "meta" in str(error).lower() or isinstance(error, NotImplementedError)

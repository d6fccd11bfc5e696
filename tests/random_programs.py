"""Random programs for the property test: nets whose blocks' forwards are put together from `program_patterns`.

A program's `source()` is what to read when an example fails: it runs by itself.
"""

import re
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from program_patterns import CHANNELS, PATTERNS, SCOPE, SIDE, STYLES
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """A pattern, and the conv that it calls."""

    kind: str
    conv: str = "nn.Conv2d(4, 4, 3, padding=1)"

    def code(self, number: int) -> tuple[str, str]:
        """What `__init__` and `forward` run."""
        code = PATTERNS[self.kind].replace("CONV", self.conv).replace("@", str(number))
        init, forward = code.split("---\n")
        return init.strip(), forward.strip()


@dataclass(frozen=True)
class Block:
    """A class whose forward runs the pieces one after the other."""

    pieces: tuple[Piece, ...]
    style: str = "module"

    def code(self, number: int) -> tuple[str, str]:
        """The class, and how it is called."""
        codes = [piece.code(10 * number + i) for i, piece in enumerate(self.pieces)]
        template, call = STYLES[self.style].strip().split("\nCALL ")
        half = (len(codes) + 1) // 2 if "BODY2" in template else len(codes)
        parts = {
            "INIT": [init for init, _ in codes],
            "BODY2": [forward for _, forward in codes[half:]] or ["pass"],
            "BODY": [forward for _, forward in codes[:half]],
        }
        for name, code in parts.items():
            found = re.search(rf"^( *){name}$", template, re.MULTILINE)
            if found:
                text = textwrap.indent("\n".join(code), found[1])
                template = re.sub(rf"^ *{name}$", lambda _, text=text: text, template, flags=re.MULTILINE)
        return template.replace("BLOCK", f"Block{number}").replace("REGISTRY", f"Registry{number}"), call


@dataclass(frozen=True)
class Program:
    """A stem, blocks one after the other, and a head: `[N, 3, 6, 6]` to `[N, 5]`."""

    blocks: tuple[Block, ...]
    method: str = "dynet"
    g: int = 2

    @property
    def kinds(self) -> set[str]:
        """The names of all patterns and styles in it."""
        return {piece.kind for block in self.blocks for piece in block.pieces} | {
            f"style: {block.style}" for block in self.blocks
        }

    def source(self) -> str:
        codes = [block.code(i) for i, block in enumerate(self.blocks)]
        lines = [code for code, _ in codes]
        lines.append("class Net(nn.Module):\n    def __init__(self):\n        super().__init__()")
        lines.append(f"        self.stem = nn.Conv2d(3, {CHANNELS}, 3, padding=1)")
        lines += [f"        self.block{i} = Block{i}()" for i in range(len(codes))]
        lines.append(f"        self.head = nn.Linear({CHANNELS}, 5)\n    def forward(self, x):")
        lines.append("        x = self.stem(x)")
        for i, (_, call) in enumerate(codes):
            lines.append(f"        block = self.block{i}\n        {call}")
        lines.append("        return self.head(x.flatten(2).mean(2))")
        return "\n".join(lines) + "\n"

    def build(self, seed: int = 0) -> nn.Module:
        """In eval mode, in float64; its weights depend on the seed only."""
        scope = dict(SCOPE)
        exec(compile(self.source(), "<program>", "exec", dont_inherit=True), scope)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            model = scope["Net"]().double()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.normal_(0, 0.5)
                    module.running_var.uniform_(0.5, 2)
        model.eval()
        return model


def images(batch: int, seed: int = 0) -> Tensor:
    """Normal noise `[batch, 3, 6, 6]` in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


def alone(kind: str, method: str) -> Program:
    """The smallest program with one pattern or style: beside it there is a plain conv in the same block."""
    plain = Piece("plain: conv")
    if kind.startswith("style: "):
        return Program((Block((plain, Piece("plain: residual")), kind.partition(": ")[2]),), method)
    return Program((Block((plain, Piece(kind), plain)),), method)


@st.composite
def convs(draw: st.DrawFn) -> str:
    """The code of a conv from 4 to 4 channels that keeps the size."""
    kernel, padding, dilation = draw(st.sampled_from(((3, 1, 1), (1, 0, 1), (3, 2, 2), (3, "'same'", 1))))
    options = f"nn.Conv2d(4, 4, {kernel}, padding={padding}"
    if dilation > 1:
        options += f", dilation={dilation}"
    if groups := draw(st.sampled_from((0, 0, 2, 4))):
        options += f", groups={groups}"
    if not draw(st.booleans()):
        options += ", bias=False"
    if draw(st.integers(0, 4)) == 4 and dilation == 1:
        options += ", padding_mode='circular'"
    return options + ")"


@st.composite
def programs(draw: st.DrawFn, method: Any, kinds: list[str], styles: list[str]) -> Program:
    """One to three blocks of one to four pieces each."""
    piece = st.builds(Piece, st.sampled_from(kinds), convs())
    # Most blocks are written as most are: a style that stays out of the way of what the pieces do.
    style = st.one_of(st.just("module"), st.sampled_from(styles))
    block = st.builds(Block, st.lists(piece, min_size=1, max_size=4).map(tuple), style)
    return Program(
        draw(st.lists(block, min_size=1, max_size=3).map(tuple)), draw(method), draw(st.sampled_from((2, 3)))
    )

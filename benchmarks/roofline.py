"""The least time that a dynamic conv can take on a GPU: arithmetic alone, nothing is run.

`python benchmarks/roofline.py` prints the tables of `docs/kernels.md`, `--card a100` those of another card.

A step takes as long as its arithmetic at the card's peak or its traffic at the memory's peak, whichever is longer
(Williams, Waterman and Patterson 2009). Compared with the static conv are three ways:

- in front: the batch's kernels are mixed into memory, 16 images for one read of the bank; then each image meets its
  own.
- fused: each tile of 64 pixels mixes the kernels that it needs, on the vector units; the bank is read again for each
  tile, from the second-level cache where it fits into half of it.
- features: g static convs, and their outputs mixed.
"""

import argparse
from typing import NamedTuple

from dyconvert.analysis.bench_layer import LAYERS, Layer

IMAGES_A_READ = 16  # of the bank, by the kernel that mixes
TILE = 64  # pixels of a fused tile
BYTES = {"bfloat16": 2, "tf32": 4}


class Card(NamedTuple):
    """A GPU by its data sheet, without sparsity.

    Attributes:
        tensor, vector: operations a second of tensor cores, by dtype, and of the vector units in float32.
        memory: bytes a second.
        cache: bytes of the second-level cache, which is taken to give twice the memory's bytes a second.
    """

    name: str
    tensor: dict[str, float]
    vector: float
    memory: float
    cache: int


CARDS = {
    "h100": Card("H100 SXM", {"bfloat16": 989e12, "tf32": 495e12}, 67e12, 3.35e12, 50 * 2**20),
    "a100": Card("A100 SXM, 80 GB", {"bfloat16": 312e12, "tf32": 156e12}, 19.5e12, 2.04e12, 40 * 2**20),
    "l4": Card("L4", {"bfloat16": 121e12, "tf32": 60e12}, 30e12, 0.3e12, 48 * 2**20),
}


class Limits(NamedTuple):
    """Seconds of a layer's inference, and the operations a byte of the static conv and of mixing in front."""

    static: float
    front: float
    fused: float
    features: float
    static_intensity: float
    front_intensity: float


def limits(layer: Layer, batch: int, g: int, card: Card, dtype: str) -> Limits:
    """The least times that the card's peaks allow."""
    pixels = (-(-layer.size // layer.stride)) ** 2
    kernel = layer.c_out * layer.c_in // layer.groups * layer.kernel**2
    element = BYTES[dtype]
    peak = card.vector if layer.groups == layer.c_in else card.tensor[dtype]  # no matmul in a depthwise conv
    operations = 2 * kernel * pixels * batch
    maps = (layer.c_in * layer.size**2 + layer.c_out * pixels) * batch * element
    bank = g * kernel * element
    kernels = kernel * batch * element
    mixing = 2 * g * kernel * batch

    static = max(operations / peak, (maps + kernel * element) / card.memory)
    read = bank * -(-batch // IMAGES_A_READ)
    mix = max(mixing / card.vector, (read + kernels) / card.memory)
    front = mix + max(operations / peak, (maps + kernels) / card.memory)
    tiles = -(-pixels // TILE)
    again = bank * (batch * tiles - 1) / (2 * card.memory if 2 * bank <= card.cache else card.memory)
    fused = max(operations / peak + mixing * tiles / card.vector, (maps + bank) / card.memory, again)
    between = 2 * g * layer.c_out * pixels * batch * element  # maps that are written, and read to be mixed
    features = max(g * operations / peak, (maps + bank + between) / card.memory)
    return Limits(
        static,
        front,
        fused,
        features,
        operations / (maps + kernel * element),
        (operations + mixing) / (read + 2 * kernels + maps),
    )


def table(card: Card, dtype: str, batches: list[int], g: int) -> list[str]:
    """Lines of Markdown: the least times over the static conv's, by layer and batch."""
    heads = " | ".join(f"batch {batch}: operations a byte | in front / fused / features" for batch in batches)
    lines = [f"| layer | {heads} |", "|---" * (1 + 2 * len(batches)) + "|"]
    for layer in LAYERS:
        cells = []
        for batch in batches:
            least = limits(layer, batch, g, card, dtype)
            ratios = (least.front, least.fused, least.features)
            cells.append(f"{least.static_intensity:.0f}, {least.front_intensity:.0f}")
            cells.append(" / ".join(f"{seconds / least.static:.2f}" for seconds in ratios))
        lines.append(f"| {layer.label} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--dtype", choices=BYTES, default="bfloat16")
    parser.add_argument("--batch", default="1,64", help="batch sizes, with commas")
    parser.add_argument("--g", type=int, default=6)
    arguments = parser.parse_args()
    card = CARDS[arguments.card]
    batches = [int(batch) for batch in arguments.batch.split(",")]
    print(f"{card.name}, {arguments.dtype}, g = {arguments.g}\n")
    print("\n".join(table(card, arguments.dtype, batches, arguments.g)))


if __name__ == "__main__":
    main()

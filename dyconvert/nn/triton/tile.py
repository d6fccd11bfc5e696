"""The tiles of the Triton kernels: how much of a matmul one program computes."""

from typing import NamedTuple


class Tile(NamedTuple):
    """The part of a matmul that one program computes, and whether it mixes the kernels itself.

    Attributes:
        rows, pixels: size of the part of the result.
        contracted: channels that are summed at a time.
        warps, stages: warps of the program, and stages of its pipeline of loads.
        fused: the program mixes the kernels itself; in inference and the forward only.
    """

    name: str
    rows: int
    pixels: int
    contracted: int
    warps: int
    stages: int
    fused: bool = False


# Tiles of 64 x 64 suit small maps (7 x 7 is 49 pixels) and few channels. Tiles of 128 x 128 suit the others: they do
# twice as many multiplications for each element that they load.
TILES = {
    tile.name: tile
    for tile in (
        Tile("triton_64", 64, 64, 32, 4, 3),
        Tile("triton_128", 128, 128, 32, 8, 3),
        Tile("triton_fused", 64, 64, 32, 4, 2, fused=True),
    )
}

"""Seeds that depend on the present step only, not on earlier ones: so a run can stop and resume anywhere."""

import numpy as np

_MASK = (1 << 64) - 1


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits for these numbers, such as (run's seed, epoch, image): splitmix64, chained."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def seeds_of(number: int, *arrays: np.ndarray) -> np.ndarray:
    """`seed_of(number, *row)` for each row of the integer arrays `[N]`, as uint64 `[N]`."""
    state = np.zeros(arrays[0].shape, dtype=np.uint64)
    for numbers in (np.full_like(arrays[0], number), *arrays):
        state = (state ^ numbers.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state >> np.uint64(1)

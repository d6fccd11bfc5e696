"""What several commands take."""

from dyconvert.errors import ModelError


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """`--input-size`: "3,224,224" or "224" (twice), with x for a comma if need be."""
    if text is None:
        return None
    try:
        size = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        size = ()
    if not size or min(size) < 1:
        raise ModelError(f"--input-size {text!r} is no size. Write 3,224,224 (channels, height, width), or 224.")
    return size * 2 if len(size) == 1 else size

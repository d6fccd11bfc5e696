"""The Triton kernels: mixing, and convs with a kernel for each image as implicit matmuls.

Everything is addressed by strides, so both memory formats are read and written in place. Symbols are those of the
engine: N images, g experts, and in each group `M` rows of a matmul, contracted over `KC` channels and the taps.

A conv and the gradient of its input are one kernel. Both add up, over taps, what a source holds at places that move by
`walk` from one result to the next:

- the conv: result `j` reads the input at `j * stride + tap * dilation - padding`;
- its input's gradient (`TRANSPOSED`): pixels of one phase, `phase + stride * j`, read the output's gradient at
  `j + (phase + padding - tap * dilation) / stride`, of the taps for which that is a whole number. Each phase is a
  launch axis of its own, so no tap is multiplied in vain.
"""

import triton
import triton.language as tl

# Triton compiles anew for an argument that is 1, and for one that 16 divides. For strides and channels that pays; for
# these a network would only wait longer for its first step.
_SIZES = (
    *("images", "at_a_time", "source_height", "source_width", "height", "width", "phase_height", "phase_width"),
    *("padding_h", "padding_w", "dilation_h", "dilation_w", "step_h", "step_w"),
)


def compiled(kernel):
    """Compile a kernel, but not anew for special values of `_SIZES`."""
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, do_not_specialize=[name for name in _SIZES if name in names])


@compiled
def mix(
    bank,  # [g, C_out, C_in / groups, kh, kw] by strides
    eta,  # [N, g, 1 or C_out]
    out,  # [N, C_out, taps, C_in / groups], contiguous
    images,
    channels,
    per_group,  # C_in / groups
    taps,
    kernel_w,
    bank_expert,
    bank_row,
    bank_channel,
    bank_h,
    bank_w,
    eta_n,
    eta_expert,
    eta_row,  # 0 for a coefficient per layer
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each image's kernel (DyNet, eq. 1), taps first: the bank is read once for IMAGES images."""
    elements = channels * taps * per_group
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    channel = at % per_group
    tap = (at // per_group) % taps
    row = at // (per_group * taps)
    expert = tl.arange(0, EXPERTS_PADDED)
    held = (expert < EXPERTS)[:, None]
    where = row * bank_row + channel * bank_channel + (tap // kernel_w) * bank_h + (tap % kernel_w) * bank_w
    weights = tl.load(bank + (expert * bank_expert)[:, None] + where[None, :], mask=held & inside[None, :], other=0.0)
    weights = weights.to(tl.float32)
    first = tl.program_id(1) * IMAGES
    for n in range(first, tl.minimum(first + IMAGES, images)):
        of_image = eta + n * eta_n + (expert * eta_expert)[:, None]
        if PER_CHANNEL:
            factors = tl.load(of_image + row[None, :] * eta_row, mask=held & inside[None, :], other=0.0)
        else:
            factors = tl.load(of_image, mask=held, other=0.0)
        kernel = tl.sum(weights * factors.to(tl.float32), 0)
        tl.store(out + tl.cast(n, tl.int64) * elements + at, kernel.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _first_tap(phase, padding, dilation, stride, step):
    """The first tap that meets a whole pixel of the source from this phase; `step`, past all, if none does."""
    first = step
    for tap in range(step):
        if (phase + padding - tap * dilation) % stride == 0:
            first = tl.minimum(first, tap)
    return first


@triton.jit
def _taps(phase, kernel, padding, dilation, stride, step, TRANSPOSED: tl.constexpr):
    """The first tap and how many there are, `step` apart."""
    if TRANSPOSED:
        first = _first_tap(phase, padding, dilation, stride, step)
        count = tl.where(first < step, tl.maximum(kernel - first + step - 1, 0) // step, 0)
    else:
        first = 0
        count = kernel
    return first, count


@compiled
def conv(
    kernels,  # mixed; or, where FUSED, the bank, whose experts take the place of images
    eta,  # where FUSED: the coefficients; never where TRANSPOSED
    source,  # the input, or the output's gradient
    out,  # the output, or the input's gradient
    bias,  # [N, C_out], float32
    rows,  # M: channels of the result in a group
    contracted,  # KC: channels of the source in a group
    source_height,
    source_width,
    height,  # of the result
    width,
    phase_height,  # of one phase of the result
    phase_width,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    step_h,
    step_w,
    kernels_n,
    kernels_group,
    kernels_row,
    kernels_contracted,
    kernels_h,
    kernels_w,
    source_n,
    source_c,
    source_h,
    source_w,
    out_n,
    out_c,
    out_h,
    out_w,
    eta_n,
    eta_expert,
    eta_row,
    bias_n,
    TRANSPOSED: tl.constexpr,
    FUSED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CONTRACTED: tl.constexpr,
):
    """One tile of ROWS channels and PIXELS pixels of one image's result."""
    blocks = tl.cdiv(rows, ROWS)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    pixel = (tl.program_id(0) // blocks) * PIXELS + tl.arange(0, PIXELS)
    n = tl.cast(tl.program_id(1), tl.int64)
    phases_w = stride_w if TRANSPOSED else 1
    phases = (stride_h if TRANSPOSED else 1) * phases_w
    group = tl.program_id(2) // phases
    phase_h = (tl.program_id(2) % phases) // phases_w
    phase_w = tl.program_id(2) % phases_w
    j_h = pixel // phase_width
    j_w = pixel % phase_width
    if TRANSPOSED:
        walk_h, walk_w = 1, 1
        at_h = phase_h + stride_h * j_h
        at_w = phase_w + stride_w * j_w
    else:
        walk_h, walk_w = stride_h, stride_w
        at_h = j_h
        at_w = j_w
    wanted = (j_h < phase_height) & (at_h < height) & (at_w < width)
    first_h, count_h = _taps(phase_h, kernel_h, padding_h, dilation_h, stride_h, step_h, TRANSPOSED)
    first_w, count_w = _taps(phase_w, kernel_w, padding_w, dilation_w, stride_w, step_w, TRANSPOSED)

    source += n * source_n + group * contracted * source_c
    if FUSED:
        kernels += group * kernels_group
        eta += n * eta_n + group * rows * eta_row
    else:
        kernels += n * kernels_n + group * kernels_group
    total = tl.zeros((ROWS, PIXELS), dtype=tl.float32)
    parts = tl.cdiv(contracted, CONTRACTED)
    for turn in range(count_h * count_w * parts):
        channel = (turn % parts) * CONTRACTED + tl.arange(0, CONTRACTED)
        tap_h = first_h + (turn // parts // count_w) * step_h
        tap_w = first_w + (turn // parts % count_w) * step_w
        if TRANSPOSED:
            y = j_h * walk_h + (phase_h + padding_h - tap_h * dilation_h) // stride_h
            x = j_w * walk_w + (phase_w + padding_w - tap_w * dilation_w) // stride_w
        else:
            y = j_h * walk_h + tap_h * dilation_h - padding_h
            x = j_w * walk_w + tap_w * dilation_w - padding_w
        seen = wanted & (y >= 0) & (y < source_height) & (x >= 0) & (x < source_width)
        pixels = tl.load(
            source + (channel * source_c)[:, None] + (y * source_h + x * source_w)[None, :],
            mask=(channel < contracted)[:, None] & seen[None, :],
            other=0.0,
        )
        inside = (row < rows)[:, None] & (channel < contracted)[None, :]
        where = (row * kernels_row)[:, None] + (channel * kernels_contracted)[None, :]
        where += tap_h * kernels_h + tap_w * kernels_w
        if FUSED:
            kernel = tl.zeros((ROWS, CONTRACTED), dtype=tl.float32)
            for expert in tl.static_range(EXPERTS):
                factors = tl.load(eta + expert * eta_expert + row * eta_row, mask=row < rows, other=0.0)
                weights = tl.load(kernels + expert * kernels_n + where, mask=inside, other=0.0)
                kernel += factors.to(tl.float32)[:, None] * weights.to(tl.float32)
            kernel = kernel.to(pixels.dtype)
        else:
            kernel = tl.load(kernels + where, mask=inside, other=0.0)
        total = tl.dot(kernel, pixels, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + n * bias_n + group * rows + row, mask=row < rows, other=0.0)[:, None]
    out += n * out_n + group * rows * out_c
    tl.store(
        out + (row * out_c)[:, None] + (at_h * out_h + at_w * out_w)[None, :],
        total.to(out.dtype.element_ty),
        mask=(row < rows)[:, None] & wanted[None, :],
    )


@compiled
def depthwise(
    kernels,  # [N, C, kernel_h * kernel_w], contiguous
    source,
    out,
    bias,
    channels,
    source_height,
    source_width,
    height,
    width,
    phase_height,
    phase_width,
    kernel_h,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    step_h,
    step_w,
    source_n,
    source_c,
    source_h,
    source_w,
    out_n,
    out_c,
    out_h,
    out_w,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """As :func:`conv`, of one channel in each group: it is bound by memory, so nothing is gained by a matmul."""
    blocks = tl.cdiv(channels, CHANNELS)
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = (tl.program_id(0) // blocks) * PIXELS + tl.arange(0, PIXELS)
    n = tl.cast(tl.program_id(1), tl.int64)
    phase_h = tl.program_id(2) // stride_w if TRANSPOSED else 0
    phase_w = tl.program_id(2) % stride_w if TRANSPOSED else 0
    j_h = pixel // phase_width
    j_w = pixel % phase_width
    at_h = phase_h + stride_h * j_h if TRANSPOSED else j_h
    at_w = phase_w + stride_w * j_w if TRANSPOSED else j_w
    held = channel < channels
    wanted = (j_h < phase_height) & (at_h < height) & (at_w < width)
    first_h, count_h = _taps(phase_h, kernel_h, padding_h, dilation_h, stride_h, step_h, TRANSPOSED)
    first_w, count_w = _taps(phase_w, kernel_w, padding_w, dilation_w, stride_w, step_w, TRANSPOSED)
    source += n * source_n
    kernels += (n * channels + channel) * (kernel_h * kernel_w)
    total = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for turn in range(count_h * count_w):
        tap_h = first_h + (turn // count_w) * step_h
        tap_w = first_w + (turn % count_w) * step_w
        if TRANSPOSED:
            y = j_h + (phase_h + padding_h - tap_h * dilation_h) // stride_h
            x = j_w + (phase_w + padding_w - tap_w * dilation_w) // stride_w
        else:
            y = j_h * stride_h + tap_h * dilation_h - padding_h
            x = j_w * stride_w + tap_w * dilation_w - padding_w
        seen = wanted & (y >= 0) & (y < source_height) & (x >= 0) & (x < source_width)
        pixels = tl.load(
            source + (channel * source_c)[:, None] + (y * source_h + x * source_w)[None, :],
            mask=held[:, None] & seen[None, :],
            other=0.0,
        )
        kernel = tl.load(kernels + tap_h * kernel_w + tap_w, mask=held, other=0.0)
        total += kernel.to(tl.float32)[:, None] * pixels.to(tl.float32)
    if BIAS:
        total += tl.load(bias + n * channels + channel, mask=held, other=0.0)[:, None]
    out += n * out_n
    tl.store(
        out + (channel * out_c)[:, None] + (at_h * out_h + at_w * out_w)[None, :],
        total.to(out.dtype.element_ty),
        mask=held[:, None] & wanted[None, :],
    )

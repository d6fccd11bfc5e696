"""The Triton kernels of the gradients of bank and coefficients: no image's kernel gradient is written to memory.

Symbols are those of `kernels.py`.
"""

import triton
import triton.language as tl

from dyconvert.nn.triton.kernels import compiled


@triton.jit
def _reduce(
    kernel_grad,  # [rows, elements], of one image
    weights,  # [experts, rows, elements] of the bank
    eta,  # of the image
    total,  # [experts, rows, elements], the bank's gradient
    grad_eta,  # of the image
    row,
    held,
    expert,
    eta_expert,
    eta_row,
    grad_eta_expert,
    EXPERTS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    NEEDS_BANK: tl.constexpr,
    NEEDS_ETA: tl.constexpr,
):
    """From one image's kernel gradient to the bank's and the coefficients', while it is in registers."""
    if NEEDS_ETA:
        products = tl.sum(weights.to(tl.float32) * kernel_grad[None, :, :], 2)  # [experts, rows]
        if PER_CHANNEL:
            tl.atomic_add(
                grad_eta + (expert * grad_eta_expert)[:, None] + row[None, :],
                products,
                mask=(expert < EXPERTS)[:, None] & held[None, :],
                sem="relaxed",
            )
        else:
            tl.atomic_add(
                grad_eta + expert * grad_eta_expert, tl.sum(products, 1), mask=expert < EXPERTS, sem="relaxed"
            )
    if NEEDS_BANK:
        factors = tl.load(
            eta + (expert * eta_expert)[:, None] + (row * eta_row)[None, :],
            mask=(expert < EXPERTS)[:, None] & held[None, :],
            other=0.0,
        ).to(tl.float32)
        total += factors[:, :, None] * kernel_grad[None, :, :]
    return total


@triton.jit
def _write(grad_bank, total, inside, NEEDS_BANK: tl.constexpr, ATOMIC: tl.constexpr):
    """The bank's gradient, to the places `grad_bank`."""
    if NEEDS_BANK:
        if ATOMIC:
            tl.atomic_add(grad_bank, total, mask=inside, sem="relaxed")
        else:
            tl.store(grad_bank, total, mask=inside)


@compiled
def gradients(
    grad,  # the output's
    source,  # the input
    bank,
    eta,
    grad_bank,  # like the bank, float32, zeros where ATOMIC
    grad_eta,  # [N, g, 1 or C_out], float32, zeros
    images,
    rows,  # C_out / groups
    per_group,  # C_in / groups
    source_height,
    source_width,
    height,  # of the output
    width,
    taps,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    source_n,
    source_c,
    source_h,
    source_w,
    bank_expert,
    bank_row,
    bank_channel,
    bank_h,
    bank_w,
    eta_n,
    eta_expert,
    eta_row,
    grad_eta_n,
    grad_eta_expert,
    at_a_time,  # images that one program reduces
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    NEEDS_BANK: tl.constexpr,
    NEEDS_ETA: tl.constexpr,
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """ROWS x CHANNELS elements of the kernels at one tap, of some images one after the other."""
    row_blocks = tl.cdiv(rows, ROWS)
    channel_blocks = tl.cdiv(per_group, CHANNELS)
    row = (tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)
    channel = (tl.program_id(0) // row_blocks % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    tap = tl.program_id(0) // row_blocks // channel_blocks
    group = tl.program_id(1)
    expert = tl.arange(0, EXPERTS_PADDED)
    tap_h = tap // kernel_w
    tap_w = tap % kernel_w
    held = row < rows
    inside = (expert < EXPERTS)[:, None, None] & held[None, :, None] & (channel < per_group)[None, None, :]
    where = (expert * bank_expert)[:, None, None] + ((group * rows + row) * bank_row)[None, :, None]
    where += (channel * bank_channel)[None, None, :] + (tap_h * bank_h + tap_w * bank_w)
    weights = tl.load(bank + where, mask=inside, other=0.0) if NEEDS_ETA else 0.0
    total = tl.zeros((EXPERTS_PADDED, ROWS, CHANNELS), dtype=tl.float32)
    grad += group * rows * grad_c
    source += group * per_group * source_c
    first = tl.program_id(2) * at_a_time
    for n in range(first, tl.minimum(first + at_a_time, images)):
        grad_of = grad + tl.cast(n, tl.int64) * grad_n
        source_of = source + tl.cast(n, tl.int64) * source_n
        kernel_grad = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
        for start in range(0, height * width, PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            wanted = pixel < height * width
            j_h = pixel // width
            j_w = pixel % width
            results = tl.load(
                grad_of + (row * grad_c)[:, None] + (j_h * grad_h + j_w * grad_w)[None, :],
                mask=held[:, None] & wanted[None, :],
                other=0.0,
            )
            y = j_h * stride_h + tap_h * dilation_h - padding_h
            x = j_w * stride_w + tap_w * dilation_w - padding_w
            seen = wanted & (y >= 0) & (y < source_height) & (x >= 0) & (x < source_width)
            pixels = tl.load(
                source_of + (y * source_h + x * source_w)[:, None] + (channel * source_c)[None, :],
                mask=seen[:, None] & (channel < per_group)[None, :],
                other=0.0,
            )
            kernel_grad = tl.dot(results, pixels, kernel_grad, input_precision=PRECISION)
        total = _reduce(
            kernel_grad,
            weights,
            eta + n * eta_n,
            total,
            grad_eta + n * grad_eta_n,
            group * rows + row,
            held,
            expert,
            eta_expert,
            eta_row,
            grad_eta_expert,
            EXPERTS,
            PER_CHANNEL,
            NEEDS_BANK,
            NEEDS_ETA,
        )
    _write(grad_bank + where, total, inside, NEEDS_BANK, ATOMIC)


@compiled
def depthwise_gradients(
    grad,
    source,
    bank,
    eta,
    grad_bank,
    grad_eta,
    images,
    channels,
    source_height,
    source_width,
    height,
    width,
    kernel_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    grad_n,
    grad_c,
    grad_h,
    grad_w,
    source_n,
    source_c,
    source_h,
    source_w,
    bank_expert,
    bank_row,
    bank_h,
    bank_w,
    eta_n,
    eta_expert,
    eta_row,
    grad_eta_n,
    grad_eta_expert,
    at_a_time,
    TAPS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    NEEDS_BANK: tl.constexpr,
    NEEDS_ETA: tl.constexpr,
    ATOMIC: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """As :func:`gradients`, of one channel in each group: all taps of CHANNELS channels."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    held = channel < channels
    expert = tl.arange(0, EXPERTS_PADDED)
    tap = tl.arange(0, TAPS_PADDED)
    inside = (expert < EXPERTS)[:, None, None] & held[None, :, None] & (tap < TAPS)[None, None, :]
    where = (expert * bank_expert)[:, None, None] + (channel * bank_row)[None, :, None]
    where += ((tap // kernel_w) * bank_h + (tap % kernel_w) * bank_w)[None, None, :]
    weights = tl.load(bank + where, mask=inside, other=0.0) if NEEDS_ETA else 0.0
    total = tl.zeros((EXPERTS_PADDED, CHANNELS, TAPS_PADDED), dtype=tl.float32)
    first = tl.program_id(1) * at_a_time
    for n in range(first, tl.minimum(first + at_a_time, images)):
        grad_of = grad + tl.cast(n, tl.int64) * grad_n
        source_of = source + tl.cast(n, tl.int64) * source_n
        kernel_grad = tl.zeros((CHANNELS, TAPS_PADDED), dtype=tl.float32)
        for start in range(0, height * width, PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            wanted = pixel < height * width
            j_h = pixel // width
            j_w = pixel % width
            results = tl.load(
                grad_of + (channel * grad_c)[:, None] + (j_h * grad_h + j_w * grad_w)[None, :],
                mask=held[:, None] & wanted[None, :],
                other=0.0,
            ).to(tl.float32)
            for t in tl.static_range(TAPS):
                y = j_h * stride_h + (t // kernel_w) * dilation_h - padding_h
                x = j_w * stride_w + (t % kernel_w) * dilation_w - padding_w
                seen = wanted & (y >= 0) & (y < source_height) & (x >= 0) & (x < source_width)
                pixels = tl.load(
                    source_of + (channel * source_c)[:, None] + (y * source_h + x * source_w)[None, :],
                    mask=held[:, None] & seen[None, :],
                    other=0.0,
                )
                met = tl.sum(results * pixels.to(tl.float32), 1)
                kernel_grad += tl.where((tap == t)[None, :], met[:, None], 0.0)
        total = _reduce(
            kernel_grad,
            weights,
            eta + n * eta_n,
            total,
            grad_eta + n * grad_eta_n,
            channel,
            held,
            expert,
            eta_expert,
            eta_row,
            grad_eta_expert,
            EXPERTS,
            PER_CHANNEL,
            NEEDS_BANK,
            NEEDS_ETA,
        )
    _write(grad_bank + where, total, inside, NEEDS_BANK, ATOMIC)

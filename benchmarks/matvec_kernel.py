"""A matrix times a few rows as one Triton kernel (see matvec.py). Imported on a CUDA GPU alone: torch for CPUs comes without
Triton.
"""

import triton
import triton.language as tl


@triton.jit
def matvec(
    x, stride, weight, bias, gain, shift, residual, out, outputs,
    width: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, part: tl.constexpr,
    norm: tl.constexpr, gelu: tl.constexpr, add: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """out = [residual +] [GELU] (weight · [norm] x + bias), for x (rows, width) in rows of `stride`, and weight (outputs, width).

    A program makes `block` outputs of all rows, from `part` of the width at a time. norm: only where part is the whole width.
    early: the first part of the matrix is read before what the kernel in front has written may be.
    """
    mine = tl.program_id(0) * block + tl.arange(0, block)
    places = tl.arange(0, part)
    first = tl.load(weight + mine[:, None] * width + places[None, :])
    offset = tl.load(bias + mine).to(tl.float32)
    if early:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for row in tl.static_range(rows):
        sums = tl.zeros((block,), tl.float32)
        for start in tl.static_range(0, width, part):
            tile = first if start == 0 else tl.load(weight + mine[:, None] * width + start + places[None, :])
            v = tl.load(x + row * stride + start + places).to(tl.float32)
            if norm:
                centred = v - tl.sum(v, 0) / width
                v = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + 1e-5)
                v = v * tl.load(gain + places).to(tl.float32) + tl.load(shift + places).to(tl.float32)
            sums += tl.sum(tile.to(tl.float32) * v[None, :], 1)
        y = sums + offset
        if gelu:
            y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
        if add:
            y += tl.load(residual + row * outputs + mine).to(tl.float32)
        tl.store(out + row * outputs + mine, y.to(out.dtype.element_ty))

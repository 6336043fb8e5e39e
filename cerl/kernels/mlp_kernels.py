"""The Triton programs of a population's perceptrons; `mlp_triton.py` launches them.

A forward program keeps one hidden layer of its rows on chip. It computes the other hidden layer
tile by tile and uses each tile at once, so that this layer is never held whole. The backward
program does the same with the gradients. Every sum runs in a fixed order.
"""

import triton
import triton.language as tl

from cerl.kernels.runtime.rounding import round_operand


@triton.jit
def _inputs(p_x, p_tail, row, k, m_row, D: tl.constexpr, A: tl.constexpr):
    """Columns k of the joined input [x, tail], 0 beyond its last column."""
    m_x = m_row[:, None] & (k < D)[None, :]
    m_tail = m_row[:, None] & ((k >= D) & (k < D + A))[None, :]
    o_tail = row[:, None] * A + (k - D)[None, :]
    if A == 0:
        return tl.load(p_x + row[:, None] * D + k[None, :], m_x, other=0.0)
    elif D == 0:
        return tl.load(p_tail + o_tail, m_tail, other=0.0)
    else:
        b_x = tl.load(p_x + row[:, None] * D + k[None, :], m_x, other=0.0)
        return b_x + tl.load(p_tail + o_tail, m_tail, other=0.0)


@triton.jit
def _matrix(p, stride, k, n, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """Rows k and columns n of a weight [K, N] for a product, 0 beyond it."""
    o = k[:, None] * stride + n[None, :]
    return round_operand(tl.load(p + o, (k < K)[:, None] & (n < N)[None, :], other=0.0), PRECISION)


@triton.jit
def _activation(b, p_bias, n, N: tl.constexpr):
    """ReLU of a product plus the bias of columns n; a NaN stays NaN."""
    b += tl.load(p_bias + n, n < N, other=0.0).to(tl.float32)[None, :]
    return tl.where(b < 0.0, 0.0, b)


@triton.jit
def _keep(p, b, row, n, m_row, N: tl.constexpr, KEEP: tl.constexpr):
    """Keeps columns n of an activation for the backward pass.

    KEEP 2 stores the activation, KEEP 1 a byte that says whether the ReLU passes the gradient (it
    does for a NaN), KEEP 0 nothing.
    """
    o, m = row[:, None] * N + n[None, :], m_row[:, None] & (n < N)[None, :]
    if KEEP == 2:
        tl.store(p + o, b, m)
    elif KEEP == 1:
        tl.store(p + o, tl.where(b <= 0.0, 0, 1).to(tl.uint8), m)


@triton.jit
def forward(
    p_x,
    p_tail,
    p_w1,
    p_b1,
    p_w2,
    p_b2,
    p_w3,
    p_b3,
    p_sum,
    p_y,
    p_a1,
    p_a2,
    s_net1,
    s_net3,
    s_row3,
    s_bias3,
    share_x,
    share_tail,
    batch,
    D: tl.constexpr,
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    KEEP: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BH1: tl.constexpr,
    BH2: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
):
    """BR rows of one network's output; keeps the hidden layers as KEEP says.

    With narrow inputs (D + A <= BK) a program takes only BH2 units of the second hidden layer and
    computes their term in the output. p_y [parts, G, B, O] holds these terms, the first with the
    bias. If SUM, p_sum [G, B, H1] is the product of further inputs with the first weight, computed
    beforehand.
    """
    PARTS: tl.constexpr = (H2 + BH2 - 1) // BH2
    blocks = tl.cdiv(batch, BR)
    i_row = tl.program_id(0) % blocks
    i_part = (tl.program_id(0) // blocks) % PARTS
    i_net = (tl.program_id(0) // (blocks * PARTS)).to(tl.int64)
    nets = tl.num_programs(0) // (blocks * PARTS)
    p_x += (i_net // share_x) * batch * D
    p_tail += (i_net // share_tail) * batch * A
    p_w1 += i_net * s_net1
    p_sum += i_net * batch * H1
    p_w2 += i_net * (H1 * H2)
    p_w3 += i_net * s_net3
    p_a1 += i_net * batch * H1
    p_a2 += i_net * batch * H2
    p_y += (i_part * nets + i_net) * batch * O

    row = i_row * BR + tl.arange(0, BR)
    m_row = row < batch
    o = tl.arange(0, BO)
    out = tl.zeros([BR, BO], tl.float32)
    if D + A <= BK:
        # Narrow inputs: each tile of the first layer is added to the sums of the second at once.
        k = tl.arange(0, BK)
        n = i_part * BH2 + tl.arange(0, BH2)
        m_first = m_row & (i_part == 0)
        if D + A > 0:
            b_x = round_operand(_inputs(p_x, p_tail, row, k, m_row, D, A), PRECISION)
        acc = tl.zeros([BR, BH2], tl.float32)
        for first in range(0, H1, BT):
            h = first + tl.arange(0, BT)
            b_h = tl.zeros([BR, BT], tl.float32)
            if SUM:
                m_sum = m_row[:, None] & (h < H1)[None, :]
                b_h += tl.load(p_sum + row[:, None] * H1 + h[None, :], m_sum, other=0.0)
            if D + A > 0:
                b_w1 = _matrix(p_w1, H1, k, h, D + A, H1, PRECISION)
                b_h = tl.dot(b_x, b_w1, b_h, input_precision=PRECISION)
            b_a1 = _activation(b_h, p_b1 + i_net * H1, h, H1).to(p_w2.dtype.element_ty)
            b_a1 = round_operand(b_a1, PRECISION)
            _keep(p_a1, b_a1, row, h, m_first, H1, KEEP)
            b_w2 = _matrix(p_w2, H2, h, n, H1, H2, PRECISION)
            acc = tl.dot(b_a1, b_w2, acc, input_precision=PRECISION)
        b_a2 = _activation(acc, p_b2 + i_net * H2, n, H2).to(p_w3.dtype.element_ty)
        _keep(p_a2, b_a2, row, n, m_row, H2, KEEP)
        b_w3 = _matrix(p_w3, s_row3, n, o, H2, O, PRECISION)
        out = tl.dot(round_operand(b_a2, PRECISION), b_w3, out, input_precision=PRECISION)
    else:
        # Wide inputs are read once, for the whole first layer; then the second is made in tiles.
        h = tl.arange(0, BH1)
        acc = tl.zeros([BR, BH1], tl.float32)
        if SUM:
            m_sum = m_row[:, None] & (h < H1)[None, :]
            acc += tl.load(p_sum + row[:, None] * H1 + h[None, :], m_sum, other=0.0)
        for first in range(0, D + A, BK):
            k = first + tl.arange(0, BK)
            b_x = round_operand(_inputs(p_x, p_tail, row, k, m_row, D, A), PRECISION)
            b_w1 = _matrix(p_w1, H1, k, h, D + A, H1, PRECISION)
            acc = tl.dot(b_x, b_w1, acc, input_precision=PRECISION)
        b_a1 = _activation(acc, p_b1 + i_net * H1, h, H1).to(p_w2.dtype.element_ty)
        b_a1 = round_operand(b_a1, PRECISION)
        _keep(p_a1, b_a1, row, h, m_row, H1, KEEP)
        for first in range(0, H2, BT):
            n = first + tl.arange(0, BT)
            b_w2 = _matrix(p_w2, H2, h, n, H1, H2, PRECISION)
            b_h = tl.dot(b_a1, b_w2, input_precision=PRECISION)
            b_a2 = _activation(b_h, p_b2 + i_net * H2, n, H2).to(p_w3.dtype.element_ty)
            _keep(p_a2, b_a2, row, n, m_row, H2, KEEP)
            b_w3 = _matrix(p_w3, s_row3, n, o, H2, O, PRECISION)
            out = tl.dot(round_operand(b_a2, PRECISION), b_w3, out, input_precision=PRECISION)
    m_bias = (o < O) & (i_part == 0)
    out += tl.load(p_b3 + i_net * s_bias3 + o, m_bias, other=0.0).to(tl.float32)[None, :]
    m_y = m_row[:, None] & (o < O)[None, :]
    tl.store(p_y + row[:, None] * O + o[None, :], out.to(p_y.dtype.element_ty), m_y)


@triton.jit
def hidden_gradient(
    p_grad,
    p_w1,
    p_w2,
    p_w3,
    p_a1,
    p_a2,
    p_x,
    p_tail,
    p_below,
    p_above,
    p_sum1,
    p_sum2,
    p_first,
    p_inner,
    s_net3,
    s_row3,
    share_x,
    share_tail,
    batch,
    D: tl.constexpr,
    A: tl.constexpr,
    H1: tl.constexpr,
    H2: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    HIDDEN: tl.constexpr,
    WEIGHT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BX: tl.constexpr,
    BH1: tl.constexpr,
    BT: tl.constexpr,
    BO: tl.constexpr,
):
    """Gradients of BR rows of one network, from its output to its first hidden layer and input.

    A program takes BH1 units of the first hidden layer. Gradients of hidden layers are those before
    their ReLUs.
        HIDDEN: p_below [G, B, H1] and p_above [G, B, H2] take the gradients of the first and the
            second hidden layer, p_sum1 and p_sum2 [G, blocks, H] their sums over the program's rows
        WEIGHT: p_first [blocks, G, D + A, H1] takes the rows' terms in the gradient of the first
            weight, and p_below is not written
        LAST > FIRST: p_inner [parts, G, B, LAST - FIRST] takes the units' terms in the gradients of
            the input columns from FIRST to LAST - 1
    """
    PARTS: tl.constexpr = (H1 + BH1 - 1) // BH1
    blocks = tl.cdiv(batch, BR)
    i_row = tl.program_id(0) % blocks
    i_part = (tl.program_id(0) // blocks) % PARTS
    i_net = (tl.program_id(0) // (blocks * PARTS)).to(tl.int64)
    nets = tl.num_programs(0) // (blocks * PARTS)
    p_grad += i_net * batch * O
    p_w1 += i_net * ((D + A) * H1)
    p_w2 += i_net * (H1 * H2)
    p_w3 += i_net * s_net3
    p_a1 += i_net * batch * H1
    p_a2 += i_net * batch * H2
    p_above += i_net * batch * H2
    p_sum1 += (i_net * blocks + i_row) * H1
    p_sum2 += (i_net * blocks + i_row) * H2

    row = i_row * BR + tl.arange(0, BR)
    m_row = row < batch
    h = i_part * BH1 + tl.arange(0, BH1)
    o = tl.arange(0, BO)
    m_grad = m_row[:, None] & (o < O)[None, :]
    b_g = tl.load(p_grad + row[:, None] * O + o[None, :], m_grad, other=0.0)
    b_g = round_operand(b_g.to(p_w3.dtype.element_ty), PRECISION)
    acc = tl.zeros([BR, BH1], tl.float32)
    for first in range(0, H2, BT):
        n = first + tl.arange(0, BT)
        b_w3 = _matrix(p_w3, s_row3, n, o, H2, O, PRECISION)
        b_h = tl.dot(b_g, tl.trans(b_w3), input_precision=PRECISION)
        m_a2 = m_row[:, None] & (n < H2)[None, :]
        b_a2 = tl.load(p_a2 + row[:, None] * H2 + n[None, :], m_a2, other=0)
        b_h = tl.where(b_a2 <= 0, 0.0, b_h).to(p_w2.dtype.element_ty)
        if HIDDEN:
            tl.store(p_sum2 + n, tl.sum(b_h.to(tl.float32), 0), (n < H2) & (i_part == 0))
        b_h = round_operand(b_h, PRECISION)
        if HIDDEN:
            tl.store(p_above + row[:, None] * H2 + n[None, :], b_h, m_a2 & (i_part == 0))
        b_w = _matrix(p_w2, H2, h, n, H1, H2, PRECISION)
        acc = tl.dot(b_h, tl.trans(b_w), acc, input_precision=PRECISION)
    o_a1 = row[:, None] * H1 + h[None, :]
    m_a1 = m_row[:, None] & (h < H1)[None, :]
    b_a1 = tl.load(p_a1 + o_a1, m_a1, other=0)
    b_h1 = tl.where(b_a1 <= 0, 0.0, acc).to(p_w1.dtype.element_ty)
    if HIDDEN:
        tl.store(p_sum1 + h, tl.sum(b_h1.to(tl.float32), 0), h < H1)
    b_h1 = round_operand(b_h1, PRECISION)
    if WEIGHT:
        p_x += (i_net // share_x) * batch * D
        p_tail += (i_net // share_tail) * batch * A
        p_first += (i_row * nets + i_net) * ((D + A) * H1)
        # Triton wants a name to keep its type and size through a loop, so these names are not
        # those that the loop below uses.
        every = tl.arange(0, BX)
        b_x = round_operand(_inputs(p_x, p_tail, row, every, m_row, D, A), PRECISION)
        b_first = tl.dot(tl.trans(b_x), b_h1, input_precision=PRECISION)
        m_first = (every < D + A)[:, None] & (h < H1)[None, :]
        tl.store(p_first + every[:, None] * H1 + h[None, :], b_first, m_first)
    elif HIDDEN:
        tl.store(p_below + i_net * batch * H1 + o_a1, b_h1, m_a1)
    if LAST > FIRST:
        p_inner += (i_part * nets + i_net) * batch * (LAST - FIRST)
        for first in range(FIRST, LAST, BK):
            k = first + tl.arange(0, BK)
            b_w = _matrix(p_w1, H1, k, h, LAST, H1, PRECISION)
            b_k = tl.dot(b_h1, tl.trans(b_w), input_precision=PRECISION)
            o_inner = row[:, None] * (LAST - FIRST) + (k - FIRST)[None, :]
            tl.store(p_inner + o_inner, b_k, m_row[:, None] & (k < LAST)[None, :])


@triton.jit
def weight_gradient(
    p_grad,
    p_x,
    p_tail,
    p_weight,
    p_bias,
    s_net,
    share_x,
    share_tail,
    batch,
    D: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """A tile [BK, BN] of one layer's weight gradient; tiles of the first inputs also the bias's."""
    TILES_K: tl.constexpr = (D + A + BK - 1) // BK
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    i = tl.program_id(0)
    i_n, i = i % TILES_N, i // TILES_N
    i_k = i % TILES_K
    i_net = (i // TILES_K).to(tl.int64)
    p_x += (i_net // share_x) * batch * D
    p_tail += (i_net // share_tail) * batch * A
    p_grad += i_net * batch * N

    k = i_k * BK + tl.arange(0, BK)
    n = i_n * BN + tl.arange(0, BN)
    acc = tl.zeros([BK, BN], tl.float32)
    total = tl.zeros([BN], tl.float32)
    for first in range(0, batch, BR):
        row = first + tl.arange(0, BR)
        m_row = row < batch
        b_x = round_operand(_inputs(p_x, p_tail, row, k, m_row, D, A), PRECISION)
        m_n = m_row[:, None] & (n < N)[None, :]
        b_g = tl.load(p_grad + row[:, None] * N + n[None, :], m_n, other=0.0)
        total += tl.sum(b_g.to(tl.float32), 0)
        b_g = round_operand(b_g.to(b_x.dtype), PRECISION)
        acc = tl.dot(tl.trans(b_x), b_g, acc, input_precision=PRECISION)
    o_weight = i_net * s_net + k[:, None] * N + n[None, :]
    m_weight = (k < D + A)[:, None] & (n < N)[None, :]
    tl.store(p_weight + o_weight, acc.to(p_weight.dtype.element_ty), m_weight)
    if i_k == 0:
        tl.store(p_bias + i_net * N + n, total, n < N)

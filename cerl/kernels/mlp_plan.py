"""Plan of the perceptron kernels: what fits on chip, what is kept, who computes what, blocks."""

from cerl.kernels.runtime.blocks import PROCESSORS, Blocks, block_size

# What a forward pass keeps for the backward pass: nothing; one byte for every hidden activation,
# which says whether it is positive and is enough for the gradient of the input; or the activations.
NOTHING, SIGNS, ACTIVATIONS = 0, 1, 2

WIDEST = 1024  # units of a hidden layer that fit on chip
WIDE = 64  # least columns and rows of an input whose product cuBLAS computes
NARROW = 32  # most input columns for which the backward program makes the first weight's gradient
SHARED = 16  # most inputs shared by several networks that cuBLAS multiplies, each in a launch


# The fastest in `cerl bench sac-tiles` on an H200 in tf32, for 100 and 200 networks x 256 rows with
# hidden layers of 256 units. Those for 512 and 1024 units were chosen by the registers and the
# shared memory that the compiler reports.
#
#                    FORWARD, GRADIENT, BROAD                      TILES
#     rows           of a program                                  of a step of the sum
#     columns        of a tile of one hidden layer                 outputs of a tile
#     depth          input columns of a step                       inputs of a tile
#     units          of the other hidden layer in a program

FORWARD = (Blocks(32, 64, 32, 4, 2), Blocks(16, 32, 32, 4, 2))
GRADIENT = (Blocks(64, 16, 32, 4, 3), Blocks(32, 32, 32, 4, 2), Blocks(16, 32, 32, 4, 2))
BROAD = (Blocks(32, 16, 32, 8, 2), Blocks(16, 16, 32, 8, 2))  # hidden layers above 256
TILES = (Blocks(32, 64, 64, 2, 3), Blocks(32, 32, 32, 2, 3))


def row_blocks(
    table: tuple[Blocks, ...], nets: int, rows: int, *, inputs: int, hidden: int
) -> Blocks:
    """Blocks of a program that goes through all layers, from a table of decreasing block sizes.

    The first entry is taken that has a program for every multiprocessor, or else the last.

    Args: inputs, how many of the input's columns are read or written; hidden, units of the wider
          hidden layer.
    """
    hidden, depth = block_size(hidden), block_size(max(inputs, 1))
    if hidden > 256:
        table = BROAD if hidden <= 512 else BROAD[1:]
    low = [block for block in table if block.rows <= block_size(rows)] or table[-1:]
    for block in low:
        parts = -(-hidden // block.units)
        if nets * parts * -(-rows // block.rows) >= PROCESSORS:
            break
    columns = min(block.columns, hidden)
    if inputs > block.depth:  # steps over the inputs need shared memory too; many GPUs have 99 KiB
        columns = min(columns, 32)
    return block._replace(columns=columns, depth=min(block.depth, depth))


def tiles(nets: int, rows: int, *, inputs: int, outputs: int) -> Blocks:
    """Blocks of `weight_gradient`: the first tile that keeps half of the multiprocessors busy.

    Tiles that reach more than a fifth beyond the inputs (above 64 of them) are passed over.
    """
    tile = TILES[-1]
    for tile in TILES:
        depth, columns = min(tile.depth, block_size(inputs)), min(tile.columns, block_size(outputs))
        tall, wide = -(-inputs // depth), -(-outputs // columns)
        tile = tile._replace(rows=min(tile.rows, block_size(rows)), columns=columns, depth=depth)
        empty = tall * depth > max(1.2 * inputs, 64)
        if nets * tall * wide >= PROCESSORS // 2 and not empty:
            break
    return tile

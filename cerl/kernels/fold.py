"""col2im: the transpose of cutting an image into patches, channels last."""

from collections.abc import Sequence

import torch
from torch import Tensor


def col2im(columns: Tensor, shape: Sequence[int], *, kernel: int, stride: int) -> Tensor:
    """Sums every patch entry back into the pixel that it came from.

    Args:    columns [*lead, out height, out width, kernel * kernel * channels], ordered (ky, kx, c);
             shape [*lead, height, width, channels] of the image.
    Returns: the image, `shape`.
    """
    height, width = columns.shape[-3:-1]
    entries = columns.unflatten(-1, (kernel, kernel, shape[-1]))
    image = torch.zeros(*shape, dtype=columns.dtype, device=columns.device)
    for y in range(kernel):
        for x in range(kernel):
            rows = slice(y, y + stride * (height - 1) + 1, stride)
            cells = slice(x, x + stride * (width - 1) + 1, stride)
            image[..., rows, cells, :] += entries[..., y, x, :]
    return image

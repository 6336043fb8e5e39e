"""The safetensors format: named tensors in one file that holds no code.

A file is the length of its header (8 bytes, little-endian), the header as JSON, and the tensors one
after the other. The header says of each tensor its type, its shape and where its bytes are, and
holds texts of the writer's under `__metadata__`. Source: https://github.com/huggingface/safetensors.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cerl.record import files

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in TYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, as in the reference implementation


class TensorsError(RuntimeError):
    """A file that is no intact safetensors file; the message says which, and why."""


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes tensors to a file; a file of that name is replaced as a whole.

    Args:   tensors by name, on any device; facts, the file's metadata.
    Raises: ValueError for a type of tensor that the format does not know; OSError.
    """
    header: dict[str, Any] = {"__metadata__": dict(facts)}
    parts, start = [], 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            known = ", ".join(str(dtype) for dtype in _NAMES)
            raise ValueError(f"{name}: expected a tensor of {known}, got {tensor.dtype}")
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        end = start + plain.numel()
        kind = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = kind | {"data_offsets": [start, end]}
        parts.append(plain.numpy().tobytes())
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    whole = b"".join([struct.pack("<Q", len(text)), text, *parts])
    files.write_atomically(path, lambda file: file.write(whole))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, on the CPU, and its metadata.

    Raises: TensorsError if the file is missing, damaged or of another format.
    """
    try:
        with files.read(path) as file:
            content = file.read()
    except OSError as error:
        raise TensorsError(
            f"{path}: expected a safetensors file ({error.strerror or error})"
        ) from error
    try:
        (length,) = struct.unpack_from("<Q", content)
        if length > min(LARGEST_HEADER, len(content) - 8):
            raise ValueError("its header is longer than the file")
        header = json.loads(content[8 : 8 + length])
        facts = header.pop("__metadata__", {})
        data = memoryview(bytearray(content[8 + length :]))
        found = {str(name): _tensor(entry, data) for name, entry in header.items()}
        if sum(tensor.nbytes for tensor in found.values()) != len(data):
            raise ValueError("its length is not that of its tensors")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise TensorsError(
            f"{path}: damaged, or no safetensors file ({reason}); export the member again"
        ) from error
    return found, {str(key): str(value) for key, value in facts.items()}


def _tensor(entry: Mapping[str, Any], data: memoryview) -> Tensor:
    """One tensor of a file. Args: entry, what the header says of it; data, all tensors' bytes."""
    dtype, (start, end) = TYPES[entry["dtype"]], entry["data_offsets"]
    shape = [int(size) for size in entry["shape"]]
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    if not (0 <= start <= end <= len(data) and end - start == size):
        raise ValueError("a tensor lies outside the file")
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data[start:end], dtype=dtype).reshape(shape)

"""Writes frames as an mp4 file, by imageio-ffmpeg. The same frames make the same file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cerl.record import files

# One thread and no metadata: the file depends on the frames alone.
_SAME = ["-threads", "1", "-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact"]


def codec() -> Any:
    """The package that writes videos. Raises: ImportError with the pip command."""
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError(
            f"video: writing mp4 needs imageio-ffmpeg ({error}): pip install 'cerl[video]'"
        ) from error
    return imageio_ffmpeg


def write(path: Path, pictures: Iterator[np.ndarray], *, size: tuple[int, int], fps: int) -> None:
    """Replaces a file, or creates it, once the whole video is written.

    Args:   pictures [H, W, 3] uint8 each; size, their width and height, both even; fps, frames a
            second.
    Raises: OSError; RuntimeError if ffmpeg writes nothing. The old file is then unchanged.
    """
    ffmpeg, fresh = codec(), files.temporary(path)
    try:
        files.create(fresh).close()
        film = ffmpeg.write_frames(
            str(fresh),
            size,
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            quality=8,
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-f", "mp4", *_SAME],
        )
        film.send(None)
        try:
            for picture in pictures:
                film.send(np.ascontiguousarray(picture))
        finally:
            film.close()
        with open(fresh, "r+b") as written:
            os.fsync(written.fileno())
            size_of_file = os.fstat(written.fileno()).st_size
        if not size_of_file:
            raise RuntimeError(
                f"video: ffmpeg wrote nothing to {path.parent}; its message is above"
            )
        os.replace(fresh, path)
        files.sync_folder(path.parent)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise

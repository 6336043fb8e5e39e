"""TensorBoard events: their files, one sub-folder for each seed.

The tags of all numbers are those of `cerl/record/tags.py`.
"""

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cerl.record.files import create, own_folder


class Events:
    """Writes a new event file. Unlike TensorBoard's own writer it has no thread, so that on a full
    disk the caller gets the error, instead of a traceback on the screen."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads files in the order of their names, so the time comes first.
        seconds, fraction = divmod(time.time_ns(), 10**9)
        when = f"{seconds:010d}.{fraction:09d}"
        name = f"events.out.tfevents.{when}.{platform.node()}.{os.getpid()}"
        self.file = create(folder / name)
        self.records = RecordWriter(self.file)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_event(self, event: Any) -> None:
        self.records.write(event.SerializeToString())

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """The TensorBoard events of a run, in one sub-folder for each seed.

    It is a `cerl.record.boards.Board`. Each file begins with `text`, in Markdown, under the tag
    `config`. After an OSError (`error`) nothing more is written, and one sentence in `notes` says
    so.
    """

    def __init__(self, folder: Path, seeds: Sequence[int], *, text: str = "") -> None:
        self.folder, self.seeds, self.text = folder, tuple(seeds), text
        self.writers: list[Any] = []
        self.after: int | None = None  # tell TensorBoard to drop events later than this step
        self.error: OSError | None = None
        self.notes: list[str] = []
        self.shown_by = f"tensorboard --logdir {folder}"

    def write(self, seed: int, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of one seed as one event.

        Args: seed, its index in [0, S); step, agent steps of one seed; scalars {tag: value}; NaN is
              allowed.
        """
        # Imported here, since the import takes a second, which `cerl list` need not wait for.
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore

        if self.error is not None:
            return
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        try:
            if not self.writers:
                self.writers = [self._open(s) for s in self.seeds]
            self.writers[seed].add_event(event)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self.error is None:
            reason = error.strerror or error
            self.notes.append(f"{self.folder}: no more TensorBoard events are written ({reason})")
            self.error = error

    def _open(self, seed: int) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore

        writer = Events(own_folder(own_folder(self.folder) / f"seed_{seed}"))
        if self.after is not None:
            start = SessionLog(status=SessionLog.START)
            writer.add_event(Event(wall_time=time.time(), step=self.after + 1, session_log=start))
        if self.text:
            first = 0 if self.after is None else self.after + 1
            writer.add_event(Event(wall_time=time.time(), step=first, summary=_text(self.text)))
        return writer

    def flush(self) -> None:
        for writer in self.writers if self.error is None else ():
            try:
                writer.flush()
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        for writer in self.writers:
            try:
                writer.close()
            except OSError as error:
                self._fail(error)
        self.writers = []


def _text(text: str) -> Any:
    """A summary with one text, in Markdown, under the tag `config`."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # pyright: ignore
    from tensorboard.compat.proto.tensor_pb2 import TensorProto  # pyright: ignore
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto  # pyright: ignore

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
    shown = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary(value=[Summary.Value(tag="config", tensor=tensor, metadata=shown)])

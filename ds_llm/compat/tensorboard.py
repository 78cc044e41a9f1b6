"""tensorboard: the thread that writes its event files.

`NAMES`: each name, the module it lies in and what it is for.
"""

from __future__ import annotations

from ds_llm.compat.names import lookup

NAMES = {
    "_AsyncWriterThread": (
        "tensorboard.summary.writer.event_file_writer",
        "tells its thread's errors, which come again at the next write, from those of other threads",
    ),
}

__getattr__ = lookup("tensorboard", NAMES)

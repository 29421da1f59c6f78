"""`train.profile`: a trace of some steps, for Perfetto or a browser's about:tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = "profile"
_WARM = 2  # steps of a start that are not traced: kernels compile, buffers are made


class Trace:
    """Traces steps of one rank into a file in the run's folder.

    Args:
        folder: of the run.
        steps: how many; 0 for none.
    """

    def __init__(self, folder: Path, rank: int, steps: int) -> None:
        self._folder, self._rank, self._steps = folder / FOLDER, rank, steps
        self._begun = 0
        self._profiler: Any = None

    def before_step(self) -> None:
        self._begun += 1
        if self._steps and self._begun == _WARM + 1:
            from torch.profiler import profile

            self._profiler = profile(profile_memory=True, record_shapes=False)
            self._profiler.start()

    def after_step(self, step: int) -> str | None:
        """What to tell once the last step to trace is done: where the trace is, or why nowhere."""
        if self._profiler is None or self._begun < _WARM + self._steps:
            return None
        done, self._profiler = self._profiler, None
        done.stop()
        name = f"steps-{step - self._steps + 1}-to-{step}-rank-{self._rank:02d}.json.gz"
        path = self._folder / name
        try:
            self._folder.mkdir(exist_ok=True)
            done.export_chrome_trace(str(path))
        except OSError as error:
            return f"{path} could not be written: {error}"
        return f"traced {self._steps} steps in {path}; to look at it: https://ui.perfetto.dev"

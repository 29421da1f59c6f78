"""What a run shows: the log, the progress bar, metrics.jsonl and TensorBoard. Rank 0 only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train.model.balance import Load
from train.monitor import experts, figures
from train.monitor.clock import TRAVELLING, Clock
from train.monitor.lines import METRICS, Lines, Rows

# Peak dense bf16 FLOP/s from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}
_CURVES = {
    "val_loss": "eval/loss",
    "val_bpb": "eval/bits_per_byte",
    "val_accuracy": "eval/accuracy",
}
PLAIN_LINE_EVERY_S = 5.0


class Recorder:
    """Keeps a run's history in its folder and tells its story on the terminal.

    A resumed run goes on in the same files: rows past the step it resumes from belong to
    steps that will be made again, and are dropped.

    No fault of the disk, of TensorBoard or of the terminal reaches the caller: each is told
    once, what cannot be written to a file waits in memory, and training goes on.
    """

    def __init__(self, folder: Path, step: int, steps: int) -> None:
        self.steps = steps
        self._told: set[str] = set()
        self._rows = Rows(folder / "metrics.jsonl")
        self._log = Lines(folder / "log.txt")
        self._evaluations: list[dict[str, Any]] = []
        self._board_folder = folder / "tensorboard"
        self._board: Any = None
        self.rewind(step)
        self._bar: tqdm[Any] | None = None
        with self.harmless("the progress bar"):
            if sys.stderr.isatty():
                self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)
        self._first, self._spent, self._last_line = step, 0.0, 0.0

    def rewind(self, step: int) -> None:
        """Forget what came after a step: it will be made again."""
        self._experts = experts.Experts()
        self._evaluations.clear()
        with self.harmless("metrics.jsonl"):
            self._evaluations = self._rows.rewind(step)
        with self.harmless("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

            if self._board is not None:
                self._board.close()
            self._board = SummaryWriter(str(self._board_folder), purge_step=step + 1)

    def say(self, line: str) -> None:
        """One line on the terminal and in the log, now: a job's log is a file to watch."""
        with self.harmless("the terminal"):
            tqdm.write(line)
            sys.stdout.flush()
        with self.harmless("log.txt"):
            self._log.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def step(self, row: dict[str, float]) -> None:
        """A training step's row: `step` and its metrics."""
        step = int(row["step"])
        self._write(row)
        for name, value in row.items():
            if name not in ("step", "seconds"):
                self.scalar(f"train/{name}", value, step)
        speed = row["tokens_per_second"]
        with self.harmless("the progress bar"):
            if self._bar is not None:
                self._bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s")
                self._bar.update(step - self._bar.n)
        now = time.monotonic()
        self._spent += row["seconds"]
        if self._bar is None and (now - self._last_line > PLAIN_LINE_EVERY_S or step == self.steps):
            left = self._spent / (step - self._first) * (self.steps - step)
            self._last_line = now
            self.say(
                f"step {step}/{self.steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
                f"grad_norm {row['grad_norm']:.2f}  {speed:,.0f} tokens/s  {left:.0f} s left"
            )

    def times(self, clock: Clock, drawn: bool) -> None:
        """Where the time of the last steps went, in seconds; `drawn` as a figure too."""
        for step, seconds in clock.read():
            for name, value in seconds.items():
                self.scalar(f"time/{name}", value, step)
        if drawn and (means := clock.means()):
            with self.harmless("a figure"):
                travelling = 1e3 * means.pop(TRAVELLING)
                parts = {name: 1e3 * seconds for name, seconds in means.items()}
                said = f"ms of a step, and {travelling:.1f} under way beside it"
                self.figure("time/step", figures.stacked({"rank 0": parts}, said), step)

    def loads(self, loads: Mapping[int, Load], step: int, drawn: bool) -> None:
        """How even a step's experts were, by block; `drawn` block by block and as a figure too."""
        if dead := self._experts.died(loads):
            self.say(f"step {step}: {dead}")
        for name, value in experts.scalars(loads, each=drawn).items():
            self.scalar(f"experts/{name}", value, step)
        if loads and drawn:
            with self.harmless("a figure"):
                self.figure("experts/load", experts.figure(loads), step)

    def evaluation(self, row: dict[str, Any]) -> None:
        """An evaluation's row: `step` and what `train.evaluation.evaluate.evaluate` gives."""
        step = int(row["step"])
        self._write(row)
        self._evaluations.append(row)
        told = {key: words for key, words in METRICS.items() if key in row}
        for key in told:
            self.scalar(_CURVES[key], row[key], step)
        if by_position := row.get("val_loss_by_position"):
            for first, loss in by_position.items():
                self.scalar(f"eval/loss_from_position/{first}", loss, step)
            with self.harmless("a figure"):
                drawn = figures.curves({f"step {step}": by_position}, "position", "loss in nats")
                self.figure("eval/loss_by_position", drawn, step)
        self.say("  ".join([f"step {step}", *(f"{told[key]} {row[key]:.4f}" for key in told)]))

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation of the run so far, also from before it was resumed."""
        return list(self._evaluations)

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve in TensorBoard."""
        with self.harmless("TensorBoard"):
            if self._board is not None:
                self._board.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        with self.harmless("TensorBoard"):
            if self._board is not None:
                self._board.add_text(name, text, step)

    def figure(self, name: str, figure: Any, step: int) -> None:
        """A matplotlib figure in TensorBoard."""
        with self.harmless("TensorBoard"):
            if self._board is not None:
                self._board.add_figure(name, figure, step)

    def material(self, words: str, figure: Any) -> None:
        """What there is to learn from (`data.Material.report`), in TensorBoard."""
        self.text("data/stats", "\n".join(f"    {line}" for line in words.splitlines()), 0)
        if figure is not None:
            self.figure("data/stats", figure, 0)

    def close(self) -> None:
        with self.harmless("the progress bar"):
            if self._bar is not None:
                self._bar.close()
        with self.harmless("TensorBoard"):
            if self._board is not None:
                self._board.close()
        for lines in (self._rows, self._log):
            with self.harmless(lines.path.name):
                lines.close()

    @contextmanager
    def harmless(self, what: str) -> Iterator[None]:
        """Tell the first fault of each kind; raise none."""
        try:
            yield
        except Exception as error:
            if what not in self._told:
                self._told.add(what)
                with suppress(Exception):
                    print(f"{what} fails ({error}); training goes on", file=sys.stderr, flush=True)
        else:
            self._told.discard(what)

    def _write(self, row: dict[str, float]) -> None:
        with self.harmless("metrics.jsonl"):
            self._rows.add(json.dumps(row) + "\n")


def peak_flops(device: torch.device) -> float:
    """FLOP/s that the device could reach at best.

    A GPU's is its data sheet's, dense bf16. For any other device it is what a large matrix
    product in fp32 reaches here and now.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak
    a = torch.ones(1024, 1024, device=device)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        times.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(times)


def peak_memory(device: torch.device) -> float:
    """GB this process has held at most: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    in_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return in_kib * (1 if sys.platform == "darwin" else 1024) / 1e9

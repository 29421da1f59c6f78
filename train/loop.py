"""The training loop: one step that reads in one screen, and the run around it."""

from __future__ import annotations

import shlex
import time
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch

import data
from data.ordering.order import mixed
from data.settings import ConfigError
from parallel import World, distribute
from train import memory, planning
from train.config import Config, due
from train.engine import Engine, dtype_of
from train.evaluation.evaluate import evaluate
from train.evaluation.generate import generate
from train.evaluation.validation import Validation
from train.model.transformer import skeleton
from train.monitor.clock import DATA, OPTIMISER, REDUCING, Clock
from train.monitor.metrics import Recorder, peak_flops, peak_memory
from train.monitor.summary import blocks_in_words, summarise, surroundings
from train.monitor.trace import Trace
from train.optimiser.optim import learning_rate
from train.start import begin_from, goes_on
from train.survival import checkpoint, faults, manifest
from train.survival.lookout import GivenUpError, Lookout
from train.survival.stop import START_AGAIN, Cause, Watch
from train.survival.watchdog import Watchdog


class Trainer:
    """A run, from wherever its folder says that it stands.

    Args:
        config: the resolved configuration.
        folder: the run's folder, claimed.
        command: the words that start this run, for the advice at the end.
        watch: tells when to stop; it is listening.
    """

    def __init__(
        self, config: Config, folder: Path, command: list[str], world: World, watch: Watch
    ) -> None:
        self.config, self.command, self.world, self.watch = config, command, world, watch
        self.folder, self.checkpoints = folder, folder / manifest.CHECKPOINTS
        self.judge = faults.Judge(config.faults)
        self.wrong: str | None = None  # with the last step

        watch.rank, watch.standing = world.rank, lambda: (self.step, self.saved_step)

        notes: list[str] = []
        found, saved = world.on_first(
            lambda: manifest.newest_progress(self.checkpoints, notes.append)
        )
        self.verified: dict[Path, str | None] = {found: None} if found else {}
        self.step = saved.step if saved else 0
        self.tokens = saved.tokens if saved else 0
        self.recorder = Recorder(folder, self.step, config.train.steps) if world.is_first else None
        rows = self.recorder.evaluations() if self.recorder else []
        evaluated = world.on_first(lambda: [row["step"] for row in rows])
        for line in [*notes, *surroundings(world)]:
            self.say(line)

        dtype = dtype_of(config.train, world.device.type)
        memory.check(config, world, dtype)
        planning.check(config.parallel, world.size)
        self.material = data.material(config.data, config.train, log=self.say)
        self.cursor = data.Cursor.from_dict(saved.cursor) if saved else data.Cursor()
        self.stream = self.material.batches(self.cursor)
        if self.recorder and not saved:
            self.recorder.material(*self.material.report())
        self.validation = Validation(config, self.material, evaluated)
        model = skeleton(config.model, self.material.tokenizer.vocab_size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.say(f"model: {blocks_in_words(config.model.block_kinds)}; {parameters:,} parameters")
        accumulate = config.train.accumulate
        by_rows = planning.by_rows(config, model, world.topology, dtype, self.say)
        self.engine = Engine(model, config.optim, config.zero, world, dtype, accumulate, by_rows)
        stage, at_home = config.zero.stage, self.engine.at_home.numbers
        self.planner = planning.planner_of(
            model, config.parallel, world, dtype, stage, accumulate, at_home
        )
        self.peak_flops = peak_flops(world.device)
        self.watchdog = Watchdog(folder, world, config.faults.hang_seconds)
        self.lookout = Lookout(world, watch, self.watchdog)
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_: self.lookout.look_inside())
        self.clock = Clock(config.model.block_kinds, world.device)
        self.clock.watch(model.blocks)
        self.trace = Trace(folder, world.rank, config.train.profile)
        self.saver = checkpoint.Saver(
            self.checkpoints, world, lambda: self.lookout.at("copying what is saved")
        )
        self.saved_step = self.step if found else None
        self.next_batch = self.stream.peek().digest
        if found and saved:
            self._resume(found, saved)
        elif config.run.start_from:
            begin_from(Path(config.run.start_from), self.engine, self.say)
        else:
            self.engine.begin(config.train.seed)

    def run(self) -> int:
        """Train to the last step, or until it must stop; either way save.

        Returns:
            The exit code: 0, `START_AGAIN`, or 1 if the end could not be saved.
        """
        with self.watchdog.watching():
            self._train()
        cause = self.lookout.cause
        if not cause or self.step == self.config.train.steps:
            self._summarise()
            return 0 if self.step == self.saved_step else 1
        onward = shlex.join(self.command)
        self.say(f"stopped by {self.watch.reason} at step {self.step}; to go on: {onward}")
        if self.step not in (0, self.saved_step):
            return 1
        return START_AGAIN if cause == Cause.TIME else 0

    def _summarise(self) -> None:
        """Say what was learned; a sample is made by all ranks together."""
        config, sample = self.config.eval, ""
        if config.sample_tokens:
            self.engine.eval()
            try:
                sample = generate(
                    self.engine.model,
                    self.material.tokenizer,
                    config.prompt,
                    config.sample_tokens,
                    config.temperature,
                )
            except ConfigError as error:  # the run is done all the same
                self.say(f"no sample: {error}")
        if self.recorder:
            summarise(
                self.recorder,
                self.step,
                self.tokens,
                "at first" if self.config.run.start_from else "untrained",
                lambda: self.material.bar(config.tokens),
                sample,
                self.command,
                self.config.run.root,
            )

    def _train(self) -> None:
        config = self.config
        self.watch.training = True
        if batches := self.validation.due(self.step):
            tokens = sum(len(batch.tokens) for batch in batches)
            self.say(f"validating on {tokens:,} tokens before step {self.step + 1}")
        self._validate()
        while self.step < config.train.steps and not self.lookout.cause:
            row = self.train_step()
            if self.wrong:
                self._pass_over(self.step + 1, self.wrong)
                continue
            last = self.step == config.train.steps
            if row is not None:
                self.watch.step_done()
                if self.recorder:
                    drawn = last or due(self.step, config.eval.every)
                    self.recorder.step(row)
                    self.recorder.times(self.clock, drawn)
                    self.recorder.loads(self.engine.model.balance.loads(), self.step, drawn)
                self._validate()
                self._saved(self.saver.poll())
            if self.lookout.cause or last or due(self.step, config.checkpoint.every):
                self._save()
        self._finish_saving()

    def train_step(self) -> dict[str, float] | None:
        """One optimiser step over `train.accumulate` batches; None if it had to be given up.

        The gradient is that of the mean over all target tokens of the step. DeepSpeed
        averages over ranks and batches, so each loss is multiplied by their number. A bad
        step changes no weight and does not count; `wrong` says then what it was.
        """
        config, world, engine = self.config.train, self.world, self.engine
        self.lookout.step = self.step + 1
        began, self.wrong = time.monotonic(), None
        self.trace.before_step()
        self.clock.start()
        wanted = (b for b in self.stream if b.cursor.batches not in self.judge.skipped)
        self.batches = batches = list(islice(wanted, config.accumulate))
        targets = max(1, sum(batch.targets for batch in batches))
        rate = learning_rate(self.config.optim, self.step, config.steps)
        # Chance is a function of the step, so that a resumed run needs no saved generator.
        torch.manual_seed(mixed(config.seed, world.rank, self.step))
        nats = torch.zeros((), dtype=torch.float64, device=world.device)
        norm, loss = None, 0.0

        def is_good(norm: float) -> bool:
            nonlocal loss
            loss = float(world.sum(nats)) / targets
            self.wrong = self._fault(loss, norm)
            return self.wrong is None

        try:
            for batch, following in pairwise([*batches, self.stream.peek()]):
                self.lookout.look("forward and backward")
                tokens, labels, shard = distribute(
                    batch.tokens, batch.labels, batch.cu_seqlens, world, planner=self.planner
                )
                self.planner.begin(np.diff(following.cu_seqlens))
                self.clock.mark(DATA)
                with self.clock.forward(), self.lookout.in_forward():
                    scaled, cross_entropy = engine(tokens, labels, shard)
                engine.backward(scaled * (world.size * config.accumulate / targets))
                nats += cross_entropy
                self.clock.mark(REDUCING)
                self.lookout.at("the optimiser's step")
                norm = engine.step(rate, is_good)
                self.clock.mark(OPTIMISER)
        except GivenUpError:
            self.next_batch = batches[0].digest
            return None

        self.cursor = batches[-1].cursor
        self.next_batch = self.stream.peek().digest
        if self.wrong is None:
            self.step += 1
            self.tokens += config.batch_tokens * config.accumulate
        self.clock.stop(self.step)
        if traced := self.trace.after_step(self.step):
            self.say(traced)
        seconds = time.monotonic() - began
        # A backward pass is twice the work of a forward pass.
        work = 3 * sum(engine.model.flops(np.diff(batch.cu_seqlens)) for batch in batches)
        return {
            "step": self.step,
            "loss": loss,
            "lr": rate,
            "grad_norm": float("nan") if norm is None else norm,
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": config.batch_tokens * config.accumulate / seconds,
            "mfu": work / seconds / (self.peak_flops * world.size),
            "memory_gb": peak_memory(world.device),
        }

    def close(self) -> None:
        """Let go of the files and of the thread that reads ahead."""
        self.planner.close()
        self.stream.close()
        if self.recorder:
            self.recorder.close()

    def say(self, line: str) -> None:
        """A line to the terminal and the log, from rank 0."""
        if self.recorder:
            self.recorder.say(line)

    def _resume(self, path: Path, saved: manifest.Progress) -> None:
        for line in goes_on(path, saved, self.config, self.stream):
            self.say(line)
        checkpoint.load(path, self.engine)
        self.judge.resume(saved.judge)
        self.watch.save_seconds = manifest.read(path).get("seconds", self.watch.save_seconds)

    def _save(self) -> None:
        """Begin to save this step; the one before is published first."""
        self._finish_saving()
        if self.step == self.saved_step:
            return
        wrong = checkpoint.diverged(self.engine, self.world)
        if wrong:
            raise RuntimeError(f"step {self.step}: {wrong}; going on needs the checkpoint before")
        progress = manifest.Progress(
            step=self.step,
            tokens=self.tokens,
            cursor=self.cursor.to_dict(),
            next_batch=self.next_batch,
            config=self.config.to_dict(),
            judge=self.judge.state(self.cursor.batches),
        )
        self.saver.start(self.engine, progress)
        self.watch.pause()

    def _finish_saving(self) -> None:
        """Wait for the save that is on its way, if there is one."""
        with self.watchdog.patience("waiting for a save"):
            self._saved(self.saver.finish())

    def _saved(self, done: checkpoint.Saved | None) -> None:
        """Tell how a save ended. After a fault training goes on; older checkpoints are whole."""
        if done is None:
            return
        if done.error:
            self.say(f"step {done.step} could not be saved: {done.error}; older ones are whole")
            return
        self.saved_step = done.step
        self.watch.save_seconds = done.seconds
        self.say(
            f"saved {done.path} in {done.seconds:.1f} s; training stood still {done.stall:.2f} s"
        )
        if self.recorder:
            self.recorder.scalar("checkpoint/stall_seconds", done.stall, done.step)
            self.recorder.scalar("checkpoint/seconds", done.seconds, done.step)
            self.verified[done.path] = None
            with self.watchdog.patience("removing old checkpoints"):
                keep = self.config.checkpoint.keep, self.config.checkpoint.keep_every
                old = manifest.surplus(self.checkpoints, *keep, self.verified, done.step)
                for path, wrong in manifest.removing(old):
                    if wrong:
                        self.say(f"{path} could not be removed ({wrong})")

    def _fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, on every rank as soon as on one."""
        wrong = self.judge.fault(loss, norm)
        bad = float(self.world.sum(torch.tensor(float(wrong is not None))))
        return wrong or ("another rank finds it bad" if bad else None)

    def _pass_over(self, bad: int, wrong: str) -> None:
        """Go on after a bad step, without its batches.

        Raises:
            ConfigError: it has happened too often, or going on is not wanted.
        """
        config = self.config.faults
        self.say(f"step {bad} is bad: {wrong}")
        if self.recorder:
            with self.recorder.harmless("keeping the batches of a bad step"):
                faults.keep(self.folder, bad, self.batches, self.judge.skipped)
            self.recorder.text("faults", f"step {bad}: {wrong}", bad)
        if config.action == "stop":
            raise ConfigError(f"stopped by the bad step {bad}: {wrong}; see faults.action")
        if config.action == "roll back":
            self._roll_back()
        elif not self.judge.pass_over(self.batches, self.step):
            raise ConfigError(
                f"stopped: step {bad} was bad {config.most + 1} times in a row, the last time "
                f"with {wrong}; lower optim.lr, or set faults.action='roll back' or faults.most"
            )
        self.say(f"going on after step {self.step} without the batches of the bad step {bad}")

    def _roll_back(self) -> None:
        """To the last checkpoint, to make the steps since then without the bad batches."""
        self._finish_saving()
        with self.watchdog.patience("rolling back"):
            self._go_back()
        if self.recorder:
            self.recorder.rewind(self.step)
        self.say(f"rolled back to step {self.step}")

    def _go_back(self) -> None:
        found, saved = self.world.on_first(
            lambda: manifest.newest_progress(self.checkpoints, self.say)
        )
        if found is None or saved is None:
            raise ConfigError(
                "stopped: there is no checkpoint yet to roll back to; set faults.action=skip, "
                "or a smaller checkpoint.every"
            )
        if not self.judge.pass_over(self.batches, saved.step):
            raise ConfigError(
                f"stopped: {self.config.faults.most + 1} bad steps after step {saved.step}; "
                "lower optim.lr, or raise faults.most"
            )
        self.judge.go_back(saved.judge)
        self.verified = {found: None}
        checkpoint.load(found, self.engine)
        self.step = self.saved_step = saved.step
        self.tokens, self.cursor = saved.tokens, data.Cursor.from_dict(saved.cursor)
        self.stream.close()
        self.stream = self.material.batches(self.cursor)
        self.next_batch = self.stream.peek().digest
        self.validation.forget_after(self.step)
        self.watch.pause()

    def _validate(self) -> None:
        """Where it is due; on all ranks together."""
        batches = self.validation.due(self.step)
        if not batches:
            return
        self.lookout.step = self.step + 1
        row = evaluate(
            self.engine,
            batches,
            self.material.tokenizer.byte_lengths(),
            self.world,
            self.planner,
            lambda: self.lookout.stopping("evaluation"),
        )
        if row is None:
            return
        self.validation.done.add(self.step)
        if self.recorder:
            self.recorder.evaluation({"step": self.step, **row})

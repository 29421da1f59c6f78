"""`python -m train CONFIG [key=value …]`: start a run, or go on with it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from contextlib import closing
from datetime import timedelta
from keyword import iskeyword
from typing import TYPE_CHECKING

from data.settings import ConfigError, describe, of_long_path

if TYPE_CHECKING:
    from train.config import Config
    from train.survival.stop import Watch


COMMANDS = {
    "plan": "memory, speed and what to change first, before a run is queued",
    "evaluate": "loss by position, recall and a needle, up to four times the training length",
    "generate": "text from a model, printed while it is made",
    "table": "compare the last evaluations of runs, by mixer and ratio to attention",
    "checkpoints": "list, verify and prune what a run has saved",
    "replay": "make a step of a run again on one device, to see what was wrong with it",
    "export": "write a model in Hugging Face's format",
    "import": "make a model in Hugging Face's format one that a run can start from",
    "convert": "make a hybrid of a pretrained Transformer, for a run to start from",
}


def main(arguments: list[str]) -> int:
    """Run what the words ask for; the exit code: 0 done or stopped as told, with a checkpoint;
    1 a fault; 2 something the user can mend; 70 a rank hangs; 75 stopped in time and saved:
    start again; 130 another command than training was interrupted.
    """
    try:
        if arguments and arguments[0] in COMMANDS:
            from train import commands

            name = arguments[0]
            try:
                return getattr(commands, f"{name}_" if iskeyword(name) else name)(arguments[1:])
            except BrokenPipeError:
                return 0  # who reads has seen enough
            except KeyboardInterrupt:
                return 130
        return _train(arguments)
    except ConfigError as error:
        _tell(error)
        return _code_of(error)
    except OSError as error:
        _tell(of_long_path(error))
        return 2


def _train(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train the run that CONFIG describes, or go on with it from its newest "
        "good checkpoint.",
        add_help=False,
    )
    parser.add_argument("config", nargs="?", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on")
    parser.add_argument(
        "--overwrite", action="store_true", help="with --fresh: remove what the run has written"
    )
    parser.add_argument("-h", "--help", action="store_true", help="this help, with every setting")
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        print_help(parser)
        return 0
    if options.config is None:
        parser.error("name a YAML file, as in: python -m train configs/smoke.yaml")
    return train(options)


def _tell(error: ConfigError) -> None:
    """Every rank finds the same fault; one line is enough."""
    if _is_first():
        print(error, file=sys.stderr, flush=True)
    else:
        # Who started the ranks ends them all when one has ended: the first must speak before.
        time.sleep(3)


def _code_of(error: ConfigError) -> int:
    """2, which no job script tries again, unless what is wrong may pass by itself."""
    from train.survival.run import HeldError

    return 1 if isinstance(error, HeldError) else 2


def _is_first() -> bool:
    """Whether this is rank 0, before there is a world to ask."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0"


def train(options: argparse.Namespace) -> int:
    # Settings are read before anything heavy is imported: a typo answers at once.
    from train.config import read

    config = read(options.config, options.overrides)

    from train.survival.stop import START_AGAIN, Interrupted, Watch

    watch = Watch.of_job()
    try:
        with watch.listening():
            return _run(config, options, watch)
    except Interrupted as error:
        if _is_first():
            print(f"{error} before training began; the same command goes on", flush=True)
        return START_AGAIN if error.number == signal.SIGUSR1 else 0
    except RuntimeError as error:
        from torch.distributed import DistError

        from parallel import LostRankError

        # Another rank's end, which that rank tells of; while layers are set up it has no name.
        if not isinstance(error, LostRankError | DistError):
            raise
        line = " ".join(str(error).splitlines())
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        print(f"rank {rank} ends, as another rank is gone: {line}", file=sys.stderr, flush=True)
        return 1


def _run(config: Config, options: argparse.Namespace, watch: Watch) -> int:
    from parallel import join
    from train import memory
    from train.loop import Trainer
    from train.model.transformer import check_settings
    from train.survival.run import claim

    check_settings(config.model)
    command = ["python", "-m", "train", options.config, *options.overrides]
    # A job that was queued again goes on with what its first start began anew.
    fresh = options.fresh and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    patience = timedelta(seconds=config.parallel.timeout_s)
    with (
        memory.told(),
        join(layers=patience) as world,
        claim(config, fresh, options.overwrite, world) as folder,
    ):
        with closing(Trainer(config, folder, command, world, watch)) as trainer:
            code = trainer.run()
        # Who started the ranks ends them soon after the first has ended.
        world.barrier()
        return code


def print_help(parser: argparse.ArgumentParser) -> None:
    from train.config import Config

    parser.print_help()
    print("\nother commands, each with --help:")
    for name, line in COMMANDS.items():
        print(f"  python -m train {name:<12} {line}")
    print("\nexit codes: 0 done, or stopped by SIGTERM or SIGINT and saved; 2 an error to mend;")
    print("  70 a rank hangs, and was named (faults.hang_seconds); 1 any other fault")
    print("  75 stopped by SIGUSR1 or the end of the job's time and saved, to be started again")
    print("\nsettings, with their defaults:", flush=True)
    print(describe(Config), flush=True)

    # The settings of mixers and MLPs live beside their code, which needs torch.
    from train.model import mixers, mlps
    from train.model.config import ModelConfig

    for kinds in (mixers.KINDS, mlps.KINDS):
        for name in kinds.names():
            module, _ = kinds.resolve(name, ModelConfig())
            if said := describe(module.Config, f"model.{kinds.section}.{name}."):
                print(said)


def _let_go_of_the_terminal() -> None:
    """Python flushes once more at its end, and would make a terminal that is gone its exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    code = main(sys.argv[1:])
    _let_go_of_the_terminal()
    sys.exit(code)

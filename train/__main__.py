"""`python -m train CONFIG [key=value …]`: start a run, or go on with it."""

from __future__ import annotations

import argparse
import os
import sys

from data.settings import ConfigError, describe


def main(arguments: list[str]) -> int:
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
        "--overwrite", action="store_true", help="with --fresh: remove what the run has saved"
    )
    parser.add_argument("-h", "--help", action="store_true", help="this help, with every setting")
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        print_help(parser)
        return 0
    if options.config is None:
        parser.error("name a YAML file, as in: python -m train configs/smoke.yaml")
    try:
        return train(options)
    except ConfigError as error:
        # Every rank finds the same fault; one line is enough.
        if os.environ.get("RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0":
            print(error, file=sys.stderr)
        return 2


def train(options: argparse.Namespace) -> int:
    # Settings are read before anything heavy is imported: a typo answers at once.
    from train.config import read

    config = read(options.config, options.overrides)

    from parallel import join
    from train.loop import Trainer
    from train.model import mixers
    from train.run import claim

    mixers.check(config.model)
    command = ["python", "-m", "train", options.config, *options.overrides]
    with join() as world, claim(config, options.fresh, options.overwrite, world) as folder:
        saved = Trainer(config, folder, command, world).run()
    return 0 if saved else 1


def print_help(parser: argparse.ArgumentParser) -> None:
    from train.config import Config

    parser.print_help()
    print("\nsettings, with their defaults:", flush=True)
    print(describe(Config), flush=True)

    # The mixers' settings live beside their code, which needs torch.
    from train.model import mixers
    from train.model.config import ModelConfig

    for name in mixers.names():
        module, _ = mixers.resolve(name, ModelConfig(pattern=[name]))
        print(describe(module.Config, f"model.mixers.{name}."))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

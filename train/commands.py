"""`python -m train checkpoints|replay …`: commands about a run, beside training it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from data.settings import ConfigError
from train import manifest
from train.config import Config, read


def checkpoints(arguments: list[str]) -> int:
    """List, verify or prune the checkpoints of a run; 1 if one does not verify."""
    parser = argparse.ArgumentParser(
        prog="python -m train checkpoints",
        description="The checkpoints of a run, newest first.",
    )
    _add_run(parser)
    parser.add_argument("--verify", action="store_true", help="compare every file with its digest")
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove what checkpoint.keep and checkpoint.keep_every do not keep",
    )
    parser.add_argument("--newest", action="store_true", help="only the newest one's path")
    options = parser.parse_intermixed_args(arguments)
    run, config = _find(options)
    folder = run / manifest.CHECKPOINTS
    found = manifest.published(folder)
    if options.newest:
        if found:
            print(found[0])
        return 0
    if options.prune:
        for path in manifest.prune(folder, config.checkpoint.keep, config.checkpoint.keep_every):
            print(f"removed {path}")
        found = manifest.published(folder)
    if not found:
        print(f"no checkpoint in {folder}")
    wrong = [_describe(path, options.verify) for path in found]
    return 1 if any(wrong) else 0


def replay(arguments: list[str]) -> int:
    """Make a step of a run again, on one device, from the checkpoint before it."""
    parser = argparse.ArgumentParser(
        prog="python -m train replay",
        description="Make a step of a run again on one device, from the last checkpoint before "
        "it, and name the parameters whose gradients are not finite. The run is not touched.",
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("step", metavar="STEP", type=int, help="the step to make again")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    options = parser.parse_intermixed_args(arguments)
    run, config = _find(options)

    from train.replay import replay as make_again

    return make_again(run, config, options.step)


def _describe(path: Path, verify: bool) -> bool:
    """Print the line of a checkpoint; whether something is wrong with it."""
    try:
        held = manifest.read(path)
        size = sum(facts["bytes"] for facts in held["files"].values())
        made = time.strftime("%F %T", time.localtime((path / manifest.MANIFEST).stat().st_mtime))
        line = f"{path}  {made}  {size / 1e6:,.1f} MB  {held['tokens']:,} tokens"
        wrong = manifest.fault(path) if verify else None
    except (ValueError, OSError) as error:
        line, wrong = str(path), str(error)
    print(f"{line}  {wrong or ('whole' if verify else '')}".rstrip())
    return wrong is not None


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, with a file")
    # The words of a training command may stand here too: scripts pass them on.
    for word in ("--fresh", "--overwrite"):
        parser.add_argument(word, action="store_true", help=argparse.SUPPRESS)


def _find(options: argparse.Namespace) -> tuple[Path, Config]:
    """A run's folder and settings, from either way to name it."""
    path = Path(options.run)
    if not path.is_dir():
        config = read(path, options.overrides)
        return config.run_path, config
    if not (path / "config.yaml").exists():
        raise ConfigError(f"{path} is no run's folder: there is no config.yaml in it")
    return path, read(path / "config.yaml", options.overrides)

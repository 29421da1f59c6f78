"""`python -m data prepare|stats|bench CONFIG [key=value …]`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from data.config import RECALL, DataConfig, StreamConfig
from data.settings import ConfigError, describe, load, of_long_path

COMMANDS = {
    "prepare": "read the sources, tokenise them, and check every byte of the result",
    "stats": "lengths, mixture and packing, as text, JSON and PNG",
    "bench": "tokens a second of preparing and serving, beside a datasets pipeline",
}


@dataclass
class Settings:
    """The sections of a run's file that the data room reads."""

    data: DataConfig = field(default_factory=DataConfig)
    train: StreamConfig = field(default_factory=StreamConfig)


def main(arguments: list[str]) -> int:
    """Run one command; 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n"
        + "\n".join(f"  {name:<9} {line}" for name, line in COMMANDS.items())
        + f"\n\nsettings, with their defaults:\n{describe(Settings)}",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="|".join(COMMANDS))
    parser.add_argument("config", help="YAML file of a run; its sections data and train are read")
    parser.add_argument("override", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--out", type=Path, help="folder for stats.json and stats.png")
    chosen = parser.parse_args(arguments)
    try:
        settings = load(Settings, chosen.config, chosen.override, partial=["train"])
        _run(chosen.command, settings, chosen.out)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(of_long_path(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _run(command: str, settings: Settings, out: Path | None) -> None:
    from data.prepare import prepare

    if settings.data.source == RECALL:
        raise ConfigError(
            f"data.source is {RECALL}: batches are made on the spot, nothing needs preparing"
        )
    corpus = prepare(settings.data, log=lambda line: print(line, flush=True))
    if command == "prepare":
        corpus.verify()
        print(f"{corpus.path} is whole; fingerprint {corpus.fingerprint}")
    elif command == "stats":
        from data import stats

        made = stats.report(corpus, settings.train, settings.data)
        out = out or corpus.path.with_name(corpus.path.name + ".stats")
        stats.save(made, out)
        print(stats.text(made))
        print(f"\n{out / 'stats.json'}\n{out / 'stats.png'}")
    else:
        from data.bench import bench

        for what, who, rate in bench(corpus, settings.train, settings.data):
            print(f"{what:<10} {who:<46} {rate / 1e6:>8.2f} M tokens/s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

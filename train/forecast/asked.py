"""What the job script asks Slurm for."""

from __future__ import annotations

import re
from pathlib import Path

from data.settings import ConfigError

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
_NODES, _GPUS = "nodes", "gpus-per-node"


def nodes_and_gpus(script: Path = SCRIPT) -> tuple[int, int | None]:
    """The nodes of the script's `#SBATCH` lines, 1 unless given; GPUs of a node, None likewise.

    Of a range of nodes, the fewest.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        text = script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{script}: cannot be read ({reason}); say --gpus") from None
    given = {
        name: int(number)
        for name, number in re.findall(
            r"^#SBATCH[ \t]+--([\w-]+)[= \t]+(?:\w+:)?(\d+)(?:-\d+)?[ \t]*(?:#.*)?$",
            text,
            flags=re.MULTILINE,
        )
    }
    return given.get(_NODES, 1), given.get(_GPUS)

"""What the job script asks Slurm for."""

from __future__ import annotations

import re
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
_NODES, _GPUS = "nodes", "gpus-per-node"


def nodes_and_gpus(script: Path = SCRIPT) -> tuple[int, int | None]:
    """The nodes of the script's `#SBATCH` lines, 1 unless given; GPUs of a node, None likewise."""
    given = {
        name: int(number)
        for name, number in re.findall(
            r"^#SBATCH[ \t]+--([\w-]+)[= \t]+(?:\w+:)?(\d+)[ \t]*(?:#.*)?$",
            script.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
    }
    return given.get(_NODES, 1), given.get(_GPUS)

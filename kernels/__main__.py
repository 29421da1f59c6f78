"""`python -m kernels check | compile | bench`: try the kernels on this machine."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    compile_ = commands.add_parser(
        "compile", help="compile every shipped kernel for GPUs that need not be here"
    )
    compile_.add_argument(
        "--arch",
        action="append",
        choices=["sm_80", "sm_90", "sm_100", "gfx942"],
        help="may be given several times; sm_80, sm_90 and sm_100 unless given",
    )
    compile_.add_argument("--only", default="", metavar="TEXT", help="names that contain TEXT")
    compile_.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    compile_.add_argument("--jobs", type=int, help="processes; one a core unless given")
    arguments = parser.parse_args()

    from kernels import compile as compile_command

    return compile_command.main(
        arguments.arch or ["sm_80", "sm_90", "sm_100"],
        arguments.only,
        arguments.json,
        arguments.jobs,
    )


if __name__ == "__main__":
    sys.exit(main())

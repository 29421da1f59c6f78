"""`python -m kernels check | compile | bench`: try the kernels on this machine."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    check = commands.add_parser("check", help="compare every op with its definition in fp64")
    check.add_argument("--json", action="store_true", help="one JSON list instead of a table")

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

    bench = commands.add_parser("bench", help="time every op beside the peers that are installed")
    bench.add_argument("--length", type=int, action="append", help="tokens; several are a curve")
    bench.add_argument("--only", default="", metavar="TEXT", help="ops that contain TEXT")
    bench.add_argument("--plot", default="bench.png", help="where the plot goes")
    bench.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    arguments = parser.parse_args()

    # What a command needs is imported by that command alone: --help is quick.
    if arguments.command == "check":
        from kernels.tools import check as check_command

        return check_command.main(arguments.json)
    if arguments.command == "compile":
        from kernels.tools import compile as compile_command

        archs = arguments.arch or ["sm_80", "sm_90", "sm_100"]
        return compile_command.main(archs, arguments.only, arguments.json, arguments.jobs)
    from kernels.tools import bench as bench_command

    return bench_command.main(
        arguments.length or [], arguments.only, arguments.plot, arguments.json
    )


if __name__ == "__main__":
    sys.exit(main())

"""`python -m kernels check | compile | bench`: try the kernels on this machine."""

from __future__ import annotations

import argparse
import os
import sys

_LONGEST = 1 << 30  # tokens: kernels count them in 32 bits


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

    if wrong := _wrong(arguments):
        print(wrong, file=sys.stderr)
        return 2

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


def _wrong(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the words, in one line; a plot fails after minutes of work otherwise."""
    jobs, plot = getattr(arguments, "jobs", None), getattr(arguments, "plot", "bench.png")
    if jobs is not None and not 1 <= jobs <= 1024:
        return f"--jobs is {jobs}; it must be from 1 to 1024"
    for length in getattr(arguments, "length", None) or []:
        if not 1 <= length <= _LONGEST:
            return f"--length is {length}; it must be at least 1 and at most {_LONGEST}"
    folder, name = os.path.split(plot)
    if os.path.splitext(name)[1].lower() not in (".png", ".pdf", ".svg") or os.path.isdir(plot):
        return f"--plot is {plot[:200]!r}; its name must end in .png, .pdf or .svg"
    if not os.path.isdir(folder or "."):
        return f"--plot is {plot[:200]!r}; there is no folder {folder[:200]!r}"
    return None


if __name__ == "__main__":
    sys.exit(main())

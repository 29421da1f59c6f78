"""`python -m parallel simulate | show | published | bench | measure`: plans and what cuts cost."""

from __future__ import annotations

import argparse
import sys

from parallel.simulation import pictures

_MOST_TOKENS = 1 << 30  # of one batch, or one sequence


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m parallel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    simulate = commands.add_parser(
        "simulate", help="price a training step on a described cluster, by strategy"
    )
    simulate.add_argument("--cluster", default="h800", help="a800, h800, h200 or a YAML file")
    simulate.add_argument(
        "--model", default="hybrid-7b", help="llama-3b … llama-30b, hybrid-7b or a YAML file"
    )
    simulate.add_argument("--lengths", default="arxiv", help=_LENGTHS)
    simulate.add_argument("--gpus", type=int, default=64, help="ranks, 1 to 4096")
    simulate.add_argument("--tokens-per-gpu", type=int, default=4096, help="of one batch")
    simulate.add_argument(
        "--longest", type=int, default=65536, help="longer sequences are cut to this"
    )
    simulate.add_argument(
        "--batches", type=int, default=8, help="batches that figures are averaged over"
    )
    simulate.add_argument("--seed", type=int, default=0)
    simulate.add_argument(
        "--routing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="headrace's traffic between nodes goes over all ranks of a node",
    )
    simulate.add_argument(
        "--zero", type=int, default=1, choices=range(4), help="stage of ZeRO, which uses the links"
    )
    simulate.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    simulate.add_argument("--figure", metavar="PATH", help="a picture with a timeline of the ranks")

    show = commands.add_parser("show", help="draw the plan of one batch")
    show.add_argument("--ranks", type=int, default=8)
    show.add_argument("--ranks-per-node", type=int, default=4)
    show.add_argument(
        "--lengths",
        default="20000,9000,6000,4000,3000,2500,1500,1200,900,700,500,300",
        help=f"lengths separated by commas, or {_LENGTHS}",
    )
    show.add_argument(
        "--tokens-per-gpu", type=int, default=4096, help="if lengths are a distribution"
    )
    show.add_argument(
        "--strategy", default="balanced", choices=["balanced", "ring", "even", "allgather"]
    )
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("--figure", metavar="PATH", help="a picture of the same")

    bench = commands.add_parser(
        "bench", help="time linear layers over a sequence that is cut, beside whole ones"
    )
    bench.add_argument(
        "--ranks",
        type=int,
        action="append",
        help="processes to start, of one thread each; may be given several times; 2 and 4 unless "
        "given. Under torchrun or srun: all that it starts",
    )
    bench.add_argument("--tokens", type=int, default=1024, help="of a rank")
    bench.add_argument("--heads", type=int, default=4)
    bench.add_argument("--head-dim", type=int, default=64, help="channels of a head")
    bench.add_argument("--only", default="", metavar="TEXT", help="mixers that contain TEXT")
    bench.add_argument("--rounds", type=int, default=5, help="runs; the quickest counts")
    bench.add_argument("--json", action="store_true", help="one JSON object a line")

    published = commands.add_parser(
        "published", help="what papers published, beside what simulate says of the same"
    )
    published.add_argument("--batches", type=int, default=4, help="that a step is averaged over")

    measure = commands.add_parser(
        "measure", help="measure this machine, or the ranks that torchrun or srun started"
    )
    measure.add_argument(
        "--out", metavar="FILE.yaml", help="a new file for parallel.cluster (else it is printed)"
    )
    measure.add_argument(
        "--seconds", type=float, default=60.0, help="that all measurements take, 0.01 to 3600"
    )
    arguments = parser.parse_args()
    try:
        _check(arguments)
        _COMMANDS[arguments.command](arguments)
    except (ValueError, OSError) as error:
        print(f"python -m parallel {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


_LENGTHS = "arxiv, github, prolong64k, a YAML file like them, or the folder of a prepared corpus"


# The most that a number may be; the least is 1.
_MOST = {
    "gpus": 4096,
    "ranks": 4096,
    "ranks_per_node": 4096,
    "tokens_per_gpu": _MOST_TOKENS,
    "tokens": _MOST_TOKENS,
    "longest": _MOST_TOKENS,
    "batches": 10_000,
    "heads": 4096,
    "head_dim": 4096,
    "rounds": 10_000,
}


def _check(arguments: argparse.Namespace) -> None:
    for name, most in _MOST.items():
        given = getattr(arguments, name, None)
        values = given if isinstance(given, list) else [] if given is None else [given]
        for value in values:
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
            if value > most:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {value}; it must be at most {most}"
                )
    if getattr(arguments, "seed", 0) < 0:
        raise ValueError(f"--seed is {arguments.seed}; it must be at least 0")
    if getattr(arguments, "figure", None) is not None:
        pictures.check(arguments.figure)
    if not 0.01 <= getattr(arguments, "seconds", 1.0) <= 3600:
        raise ValueError(f"--seconds is {arguments.seconds}; it must be 0.01 to 3600")


def _simulate(arguments: argparse.Namespace) -> None:
    from parallel.simulation import simulate

    simulate.main(
        simulate.Settings(
            cluster=arguments.cluster,
            model=arguments.model,
            lengths=arguments.lengths,
            gpus=arguments.gpus,
            tokens_per_gpu=arguments.tokens_per_gpu,
            longest=arguments.longest,
            batches=arguments.batches,
            seed=arguments.seed,
            routing=arguments.routing,
            zero=arguments.zero,
        ),
        arguments.json,
        arguments.figure,
    )


def _show(arguments: argparse.Namespace) -> None:
    import numpy as np

    from parallel.planning.plan import Topology, plan
    from parallel.simulation import show, simulate

    parts = arguments.lengths.split(",")
    if all(part.strip().isdecimal() for part in parts):
        short = all(len(part.strip()) < len(str(_MOST_TOKENS)) for part in parts)
        lengths = np.array([int(part) for part in parts] if short else [], dtype=np.int64)
        if not short or lengths.sum() > _MOST_TOKENS:
            raise ValueError(f"--lengths has more than {_MOST_TOKENS} tokens; give shorter ones")
    else:
        tokens = arguments.ranks * arguments.tokens_per_gpu
        rng = np.random.default_rng(arguments.seed)
        lengths = simulate.sample(arguments.lengths, tokens, tokens, rng)
    topology = Topology(arguments.ranks, arguments.ranks_per_node)
    made = plan(lengths, topology, arguments.strategy)
    print(show.text(made))
    if arguments.figure:
        show.draw(made, arguments.figure)
        print(f"drawn in {arguments.figure}")


def _bench(arguments: argparse.Namespace) -> None:
    from parallel import bench

    settings = bench.Settings(
        tokens=arguments.tokens,
        heads=arguments.heads,
        head_dim=arguments.head_dim,
        only=arguments.only,
        rounds=arguments.rounds,
        as_json=arguments.json,
    )
    bench.main(arguments.ranks or [2, 4], settings)


def _measure(arguments: argparse.Namespace) -> None:
    import yaml

    from parallel import join
    from parallel.measure import check_out, measure, write

    out = None if arguments.out is None else check_out(arguments.out)
    with join() as world:
        content = measure(world, arguments.seconds)
        if content is None:
            return
        if out is None:
            print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100), end="")
            return
        write(content, out)
        print(f"written to {out}; train with parallel.cluster={out}")


def _published(arguments: argparse.Namespace) -> None:
    from parallel.simulation import published

    print(published.table(arguments.batches))


_COMMANDS = {
    "simulate": _simulate,
    "show": _show,
    "published": _published,
    "bench": _bench,
    "measure": _measure,
}


if __name__ == "__main__":
    sys.exit(main())

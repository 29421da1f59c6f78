"""`python -m train checkpoints|replay|export …`: commands beside training a run."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from data.settings import ConfigError
from train.config import Config, read
from train.survival import manifest


def checkpoints(arguments: list[str]) -> int:
    """List, verify or prune the checkpoints of a run; 1 if one is damaged or cannot be removed."""
    parser = argparse.ArgumentParser(
        prog="python -m train checkpoints",
        description="The checkpoints of a run, newest first.",
    )
    _add_run(parser)
    parser.add_argument("--verify", action="store_true", help="compare every file with its digest")
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove what checkpoint.keep and checkpoint.keep_every do not keep; only those that "
        "are whole count. With --verify the others go too, once one is whole",
    )
    parser.add_argument("--newest", action="store_true", help="only the newest one's path")
    options = parser.parse_intermixed_args(arguments)
    run, config = _find(options)
    folder = run / manifest.CHECKPOINTS
    found = manifest.published(folder)
    if options.newest:
        for path in [path for path in found if _is_readable(path)][:1]:
            print(path)
        return 0
    stays = False
    if options.prune:
        known: dict[Path, str | None] = {}
        keep = config.checkpoint
        gone = manifest.surplus(folder, keep.keep, keep.keep_every, known)
        if options.verify:
            gone += [path for path in manifest.damaged(folder, known) if path not in gone]
        for path, error in manifest.removing(gone):
            stays |= error is not None
            wrong = f": {known[path]}" if known.get(path) else ""
            print(f"{path} could not be removed ({error})" if error else f"removed {path}{wrong}")
        found = manifest.published(folder)
    if not found:
        print(f"no checkpoint in {folder}")
    faulty = [_describe(path, options.verify) for path in found]
    return 1 if stays or any(faulty) else 0


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


def export(arguments: list[str]) -> int:
    """Write a model in Hugging Face's format."""
    parser = argparse.ArgumentParser(
        prog="python -m train export",
        description="Write a model in Hugging Face's format. One that transformers has "
        "loads there with AutoModelForCausalLM, any other with `python -m train import`.",
    )
    _add_model_folder(parser)
    parser.add_argument("--to", metavar="DIR", required=True, help="the folder to write")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (the newest)")
    parser.add_argument(
        "--as", dest="style", default="auto", help="a model_type, or headrace for our own (auto)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    options = parser.parse_intermixed_args(arguments)

    from train.pretrained.export import export as write
    from train.pretrained.folder import find

    found = find(Path(options.folder), options.overrides, options.step, print)
    write(found, _to(options), options.style, options.dtype, print)
    return 0


def import_(arguments: list[str]) -> int:
    """Make a model in Hugging Face's format one that a run can start from."""
    parser = argparse.ArgumentParser(
        prog="python -m train import",
        description="Make a model in Hugging Face's format one that a run can start from.",
    )
    _add_model(parser)
    options = parser.parse_args(arguments)

    from train.pretrained.adopt import adopt

    adopt(Path(options.model), _to(options), print)
    return 0


def convert(arguments: list[str]) -> int:
    """Make a hybrid of a pretrained Transformer, or one with experts, for a run to start from."""
    parser = argparse.ArgumentParser(
        prog="python -m train convert",
        description="Make a hybrid of a pretrained Transformer in Hugging Face's format, for a "
        "run to start from. Its attention becomes liger, which needs nothing, or hedgehog, whose "
        "feature maps are learned first: on the text of a run's file, in batches as it says. Its "
        "MLPs become experts, which begin as copies.",
    )
    _add_model(parser)
    parser.add_argument("--pattern", help="mixers of the layers, as in '[liger, liger, attention]'")
    parser.add_argument("--text", metavar="RUN.yaml", help="for hedgehog: the text to learn on")
    parser.add_argument("--steps", type=int, default=200, help="batches to learn from (200)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of the maps (0.01)")
    parser.add_argument("--experts", type=int, help="experts that each MLP becomes")
    parser.add_argument("--chosen", type=int, default=2, help="experts of a token (2)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="added to every expert's copy, in standard deviations of its matrices (0)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, with --text")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}; it must be at least 1")
    if options.pattern is None and options.experts is None:
        raise ConfigError("convert needs --pattern, for its layers, or --experts, for its MLPs")
    pattern = None
    if options.pattern is not None:
        pattern = [name.strip() for name in options.pattern.strip(" []").split(",") if name.strip()]
    text = read(options.text, options.overrides) if options.text else None

    from train.pretrained.convert import convert as make
    from train.pretrained.distil import Distillation
    from train.pretrained.upcycle import Upcycling

    upcycling = None
    if options.experts is not None:
        upcycling = Upcycling(options.experts, options.chosen, options.noise)
    how = Distillation(text, options.steps, options.lr) if text else None
    make(Path(options.model), _to(options), pattern, how, upcycling, print)
    return 0


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="HF_DIR", help="a folder in Hugging Face's format")
    parser.add_argument("--to", metavar="DIR", required=True, help="the folder to write")


def _to(options: argparse.Namespace) -> Path:
    """The folder to write; Path would take an empty name for the current one."""
    _require(bool(options.to.strip()), "--to is empty; name the folder to write")
    return Path(options.to)


def generate(arguments: list[str]) -> int:
    """Print text that a model writes, while it writes it."""
    parser = argparse.ArgumentParser(
        prog="python -m train generate",
        description="Text from a model, printed while it is made.",
    )
    _add_model_folder(parser, "prompt", metavar="PROMPT", help='text to go on from; "" begins one')
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to write (200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (0)")
    options = parser.parse_intermixed_args(arguments)

    from train.evaluation.sampling import Sampling

    try:
        sampling = Sampling(options.tokens, options.temperature, options.seed)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"PROMPT is {options.prompt!r}; it must be UTF-8 text") from None

    from train.evaluation.trained import load, show

    model = load(options.folder, options.overrides, say=_tell)
    show(model, options.prompt, sampling)
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure what a model makes of long contexts."""
    parser = argparse.ArgumentParser(
        prog="python -m train evaluate",
        description="Loss by position and by length of document, at the training length "
        "(train.seq_len) and past it; recall of pairs; a needle at depths and lengths. Tables "
        "here, JSON, figures and TensorBoard events in the folder's evaluation/.",
    )
    _add_model_folder(parser)
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="text to measure on, instead of what the run holds out: plain, or of a kind that "
        "data.source may be; its figures get a folder of their own",
    )
    parser.add_argument("--json", type=Path, help="where to write the JSON")
    parser.add_argument(
        "--tokens", type=int, help="of the text, at most, at each length (eval.tokens)"
    )
    parser.add_argument(
        "--samples", type=int, default=2, help="sequences behind each number, at least (2)"
    )
    options = parser.parse_intermixed_args(arguments)
    _require(
        options.tokens is None or options.tokens >= 2,
        f"--tokens is {options.tokens}; it must be at least 2, one and the one it predicts",
    )
    _require(options.samples >= 1, f"--samples is {options.samples}; it must be at least 1")

    from train.evaluation import longcontext
    from train.evaluation.trained import load

    model = load(options.folder, options.overrides, say=_tell)
    tokens = model.config.eval.tokens if options.tokens is None else options.tokens
    on, name = longcontext.held_out(model, options.text, tokens)
    report = longcontext.measure(model, on, name, tokens, options.samples, _progress)
    print(longcontext.text(report), end="\n\n")
    for path in longcontext.save(report, model.stored.folder, options.json):
        print(path)
    return 0


def table(arguments: list[str]) -> int:
    """Compare finished runs: a row a mixer, a column a ratio of it to attention."""
    parser = argparse.ArgumentParser(
        prog="python -m train table",
        description="The last evaluation of runs, a row a mixer and a column a ratio of its "
        "layers to those of full attention; several seeds of one model as mean (least–most).",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    parser.add_argument(
        "--metric", default="val_accuracy", choices=["val_accuracy", "val_loss", "val_bpb"]
    )
    options = parser.parse_args(arguments)

    from train.monitor import table as tables

    print(tables.text(tables.collect(options.runs, options.metric), options.metric))
    return 0


def plan(arguments: list[str]) -> int:
    """Say what a run will need before it is queued."""
    parser = argparse.ArgumentParser(
        prog="python -m train plan",
        description="What a run will need: parameters, FLOPs, memory of a rank under every stage "
        "of ZeRO, the longest sequence that fits, the time by a cluster's prices, and what to "
        "change first. No GPU is asked.",
    )
    parser.add_argument("config", help="YAML file of the run")
    _add_overrides(parser)
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        help="a800, h800, h200 or a YAML file (parallel.cluster, or h200)",
    )
    parser.add_argument(
        "--gpus", type=int, help="ranks (as many as slurm/train.sbatch asks for)", metavar="N"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="ranks of this machine's CPU, one unless --gpus"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--figure", metavar="PATH", help="memory as a picture of stacked bars")
    options = parser.parse_intermixed_args(arguments)
    config = read(options.config, options.overrides)

    from train.forecast.answer import answer

    return answer(config, options.cluster, options.gpus, options.cpu, options.json, options.figure)


def _progress(line: str) -> None:
    _tell(f"{line} …")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _require(good: bool, otherwise: str) -> None:
    if not good:
        raise ConfigError(otherwise)


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


def _add_model_folder(parser: argparse.ArgumentParser, *second: str, **facts: Any) -> None:
    """FOLDER, a second word if there is one, and settings."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="a run's, or what import, convert or export wrote; or a run's YAML file",
    )
    if second:
        parser.add_argument(*second, **facts)
    _add_overrides(parser)


def _is_readable(path: Path) -> bool:
    """Whether a checkpoint's manifest is; its files are not read."""
    try:
        manifest.read(path)
    except ValueError:
        return False
    return True


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its YAML file")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
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

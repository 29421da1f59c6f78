"""Random configurations: each trains, or is refused in one line with exit code 2.

    python -m tests.fuzz_configs --count 2000 --seed 7

Settings are drawn from the schema: values of the right type inside, on and past their limits,
values of the wrong type, and text that YAML takes for something else. All keys, all rooms, all
mixers. A configuration is read, its mixers are filled, and it trains two steps on a tiny corpus
in this process unless it is too large for that. Anything but success or a refusal is a fault; it
is printed with the command that makes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shlex
import shutil
import stat
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from data.settings import ConfigError, Field, dump, fields
from parallel import World, join
from tests import tiny
from train.config import Config, read
from train.model import mixers
from train.model.config import ModelConfig
from train.model.transformer import check_settings

# A configuration above these is read and checked, but not trained.
_PARAMETERS, _TOKENS, _STEPS, _LAYERS = 3_000_000, 4096, 3, 8
_SLOW_S = 20

# Text as it stands behind the =, for any key.
_ODD = [
    "", "~", "null", "true", "no", "yes", "On", "0", "1", "-1", "1.5", "-0.0", "1e3", "1e999",
    "-1e999", ".inf", "-.inf", ".nan", "nan", "inf", "0x", "0x1F", "0b", "0b11", "0o17", "010",
    "1_000", "1__0", "_1", "1:30", "1:30.5", "2026-13-45", "2026-11-30", "2026-11-30T25:61:00Z",
    "9" * 40, "-" + "9" * 400, "9" * 5000, "1" + "0" * 30 + ".0", "1e-400", "5e-324", "１", "½",
    "[]", "{}", "[1, 2]", "{a: 1}", "{a: {b: {c: 1}}}", "[[[[]]]]", "[" * 100, "{a: 1, a: 2}",
    "&a [*a]", "&a {b: *a}", "*a", "{1: 2}", "{null: 1}", "{[1]: 2}", "{'': 1}", "{<<: 1}",
    "'", '"', '"\\0"', '"\\ud800"', '"a\\nb"', '"\\u2028"', "a\nb", "\t", "- 1", "a: b", "# x",
    "!!int x", "!!python/object:os.system x", "!!binary aGk=", "!!timestamp x", "!!set {a}",
    "%YAML 1.2", "---", "--- 1\n--- 2", "...", "|\n  text", ">", "@", "`", "text", "train", "gla",
    "attention", ".", "/dev/null", "/proc/nowhere", "x" * 300, "é", "trаin", "\x07",
    "&a [x,x,x,x,x,x,x,x,x]", str(2**31), str(2**32), str(2**63 - 1), str(2**63), str(-(2**63)),
]  # fmt: skip
_ODD_WORDS = [
    "=", "=1", "a.b.c.d.e=1", "train=1", "train={}", "train=", "trаin.steps=1", ".steps=1",
    "train..steps=1", "train.steps.x=1", "model.mixers.=1", "model.mixers.gla=3", "steps=1",
    "model.mixers.gla.heads.x=1", "model.mixers={}", "model.mixers.mine={kind: gla, heads: 2}",
    "model.mixers.mine={kind: [gla]}", "base=x", "data.recall=1", "  =1", "model.mixers.gla=null",
    "data.stages=[{step: 1, seq_len: 32}]", "data.stages=[{step: 0}]", "data.stages=[1]",
    "data.stages=[{step: 9999999999999999999, seq_len: 32}]", "data.stages=[{step: true}]",
    "data.source=[]", "data.source=5", "data.source=[{}]", "data.source=[{path: 5}]",
    "data.source=[{path: null, weight: 1}]", "data.source=[{hub: x, config: []}]",
    "data.source=[{path: nowhere, text_field: 3}]", "model.pattern=[gla*999999999]",
    "model.pattern=[gla*99999999999999999999999999]", "model.pattern=['gla*']",
    "model.pattern=[attention*1024]", "model.pattern=['']", "model.pattern=[_parts]",
]  # fmt: skip

_PATHS = [
    "..", ".", "/dev/null", "/proc", "/proc/nowhere", "/proc/self/mem", "/sys", "~",
    "here", "here/", "here/../here", "here/*", "*", "**", "[", "[!", "**/*.txt", "tiny.yaml",
    "tiny.yaml/inside", "00.txt", "00.txt/x", "*.txt", "missing", "missing/a/b", "link", "circle",
    "pipe", "empty.jsonl", "binary.jsonl", "bytes.parquet", "x" * 255, "x" * 256,
    "é" * 128,
    "a/" * 499, "a/" * 2100, "a b", " a", "a:b", "recall", "stdlib", "s3://b/x", "http://x/y.txt",
    "owner/name", "owner/name/x", "C:\\x", "$HOME", "a//b", "..*", "\u202e", "file.json", "x.gz",
    "x.model", "tokenizer.json", "config.json", "ctrl\x1b[31m", "a\nb",
]  # fmt: skip
# Keys of the mappings in data.source and data.stages.
_SOURCE_KEYS = (
    "path", "hub", "text_field", "weight", "config", "split", "revision", "streaming", "name", "x",
)  # fmt: skip
_STAGE_KEYS = ("step", "seq_len", "weights", "long_weight", "x")
_PARTS: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 32, 64, 10**4, 10**12, 2**63, 10**60, 0.5, -0.5, 1e-300,
    1e308,
    "", "1", "1e-3", "nan", ".inf", "inf", "-inf", "1_0", "text", "train", "00", "tiny", "a" * 300,
    [], [1], {}, {"a": 1}, {"00": 1}, {"00": -1}, {"": 1}, {"tiny": "nan"}, [["a"]], "a\nb", "a/b",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What a configuration did that it should not."""

    overrides: list[str]
    what: str
    kind: str  # the same for faults that look alike


class Schema:
    """Every key there is, and how to draw values for it."""

    def __init__(self) -> None:
        self.fields = {name: field for name, field in fields(Config) if name != "model.mixers"}
        self.mixers = mixers.names()
        for name in self.mixers:
            module, _ = mixers.resolve(name, ModelConfig(pattern=[name]))
            self.fields |= dict(fields(module.Config, f"model.mixers.{name}."))
        self.keys = list(self.fields)

    def draw(self, chance: random.Random) -> list[str]:
        """Words for the command line: a few settings, most of them of the right type."""
        pattern = [chance.choice(self.mixers) for _ in range(chance.choice([1, 1, 2, 3]))]
        words = [f"model.pattern={dump(pattern)}"]
        prefixes = tuple(f"model.mixers.{name}." for name in pattern)
        own = [key for key in self.keys if key.startswith(prefixes)]
        wild = chance.choice([0.0, 0.1, 0.5])
        for _ in range(chance.choice([1, 2, 3, 5, 8, 20])):
            key = chance.choice(own if own and chance.random() < 0.4 else self.keys)
            value = self._wrong(chance) if chance.random() < wild else self._right(key, chance)
            words.append(f"{key}={value}")
        if chance.random() < 0.2:
            words.append(chance.choice([*_ODD_WORDS, _source(chance), _stages(chance)]))
        if chance.random() < 0.1:
            words.insert(chance.randrange(len(words)), chance.choice(words))
        return words

    def _wrong(self, chance: random.Random) -> str:
        """What is no value of the key, or is one of another key."""
        if chance.random() < 0.3:
            return self._right(chance.choice(self.keys), chance)
        return chance.choice([*_ODD, dump(chance.choice(_PARTS)), dump(chance.choice(_PATHS))])

    def _right(self, key: str, chance: random.Random) -> str:
        field = self.fields[key]
        hint = field.hint
        kinds = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else [hint]
        kind = chance.choice(list(kinds) or [hint])
        if typing.get_origin(kind) is typing.Literal:
            return dump(chance.choice(typing.get_args(kind)))
        if kind is bool:
            return chance.choice(["true", "false"])
        if kind is int:
            return str(_whole(field, chance))
        if kind is float:
            return repr(_real(field, chance))
        if kind is type(None):
            return "null"
        if kind is str and field.metadata.get("path"):
            return dump(chance.choice([*_PATHS, field.default or "x"]))
        if kind is str:
            return dump(chance.choice(["x", "def ", "a b", "", "text", str(field.default)]))
        return dump(field.default)


def _mapping(keys: tuple[str, ...], chance: random.Random) -> dict[str, Any]:
    """Some of the keys, each with any value."""
    return {key: chance.choice(_PARTS) for key in chance.sample(keys, chance.randrange(4))}


def _source(chance: random.Random) -> str:
    """A list of sources: texts that there are, with a key or two that may be wrong."""
    entries: list[Any] = []
    for _ in range(chance.choice([1, 1, 2, 3])):
        entry = {"path": chance.choice(["*.txt", "00.txt", "01.txt", *_PATHS])}
        entries.append(chance.choice([entry | _mapping(_SOURCE_KEYS, chance), entry["path"]]))
    return f"data.source={dump(entries[0] if chance.random() < 0.2 else entries)}"


def _stages(chance: random.Random) -> str:
    stages = []
    for _ in range(chance.choice([1, 1, 2, 3])):
        stage = {"step": chance.choice([0, 1, 1, 2, 5]), "seq_len": chance.choice([2, 3, 32, 128])}
        stages.append(stage | _mapping(_STAGE_KEYS, chance))
    return f"data.stages={dump(stages)}"


def _whole(field: Field, chance: random.Random) -> int:
    least, most = field.metadata.get("least", 0), field.metadata.get("most", 2**63 - 1)
    small = [1, 2, 3, 4, 5, 7, 8, 16, 17, 24, 32, 64, 100, 128, 512, 600, 1000]
    edges = [least, least + 1, most, most - 1, least - 1, most + 1, 0, -1, 2**31, 2**32, 10**9]
    return int(chance.choice(small if chance.random() < 0.7 else edges))


def _real(field: Field, chance: random.Random) -> float:
    limits = [
        field.metadata[key] for key in ("least", "most", "above", "below") if key in field.metadata
    ]
    usual = [0.0, 0.1, 0.5, 0.9, 1.0, 2.0, 16.0, 1e-3, 1e-6, field.default or 0.0]
    edges = [-1.0, 1e30, 1e-30, 1e300, 1e-300, 5e-324, 1.7e308, 1e9, *limits]
    edges += [limit * (1 + sign * 1e-9) for limit in limits for sign in (-1, 1)]
    return float(chance.choice(usual if chance.random() < 0.6 else edges))


class Place:
    """A folder with a tiny run's file, the corpora of all cases, and the world they share."""

    def __init__(self, folder: Path, train: bool) -> None:
        self.folder, self.train = folder, train
        (folder / "here").mkdir()
        (folder / "here" / "kept.txt").write_text("of the user")
        (folder / "link").symlink_to("here")
        (folder / "circle").symlink_to("circle")
        os.mkfifo(folder / "pipe")
        (folder / "empty.jsonl").touch()
        for name in ("binary.jsonl", "bytes.parquet", "x.gz", "x.model", "tokenizer.json"):
            (folder / name).write_bytes(bytes(range(256)))
        self.base = tiny.write(
            folder / "tiny.yaml",
            """
train: {steps: 2, batch_tokens: 128, seq_len: 64}
eval: {tokens: 128, sample_tokens: 2, prompt: "1"}
checkpoint: {every: 1}
run: {root: runs}
""",
        )
        self.before = self._files()

    def _files(self) -> dict[Path, bytes | None]:
        """What lies in the folder, prepared corpora aside, with what regular files hold."""
        found: dict[Path, bytes | None] = {}
        for top, folders, files in os.walk(self.folder.parent):
            if Path(top) == self.folder and "corpora" in folders:
                folders.remove("corpora")
            for name in (*folders, *files):
                path = Path(top) / name
                found[path] = path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else None
        return found

    def _clear(self) -> list[str]:
        """Remove what a case has left; the user's files that it has changed."""
        after = self._files()
        for path in [path for path in after if path not in self.before]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return [str(path) for path, held in self.before.items() if after.get(path, b"") != held]

    def judge(self, words: list[str]) -> str | Fault:
        """How a configuration ends: `read`, `trained`, `refused` or a fault."""
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code, how = self._run(words)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            return Fault(words, "".join(traceback.format_exception(error)), kind)
        finally:
            changed = self._clear()
        if changed:
            return Fault(words, f"changed {changed}", "changed what is the user's")
        lines = err.getvalue().splitlines()
        if code == 2 and len(lines) == 1 and len(lines[0]) < 1000:
            return "refused"
        if code == 0:
            return how
        return Fault(
            words, out.getvalue() + err.getvalue(), f"exit code {code}, {len(lines)} lines"
        )

    def _run(self, words: list[str]) -> tuple[int, str]:
        from train import memory
        from train.__main__ import main

        try:
            config = read(self.base, words)
            check_settings(config.model)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2, "refused"
        tokens = config.train.batch_tokens * config.train.accumulate
        large = (
            not self.train
            or tokens > _TOKENS
            or config.model.layers > _LAYERS
            or memory.parameters(config) > _PARAMETERS
        )
        if large:
            with contextlib.suppress(ConfigError):
                memory.check(config, World(0, 1, 0, torch.device("cpu")), torch.float32)
            return 0, "read"
        # What only takes longer is cut short, and a slow machine is not taken for a hang.
        capped = [
            f"train.steps={min(config.train.steps, _STEPS)}",
            f"eval.sample_tokens={min(config.eval.sample_tokens, _STEPS)}",
            f"data.workers={min(config.data.workers or 1, 2)}",
            "faults.hang_seconds=0",
        ]
        return main([str(self.base), *words, *capped]), "trained"


def cases(count: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Words of each case by its name, which alone makes it again."""
    schema = Schema()
    for number in range(count):
        yield f"{seed}.{number}", schema.draw(random.Random(f"{seed}.{number}"))


@contextlib.contextmanager
def place(train: bool = True) -> Iterator[Place]:
    """A folder to work in, which becomes the current one; without `train` nothing is trained."""
    with (
        tempfile.TemporaryDirectory() as folder,  # and one inside, so that `..` is ours too
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"),
        join(),
    ):
        inside = Path(folder) / "work"
        inside.mkdir()
        os.chdir(inside)
        yield Place(inside, train)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Random configurations; 1 if one is a fault.")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="read and check, but train nothing")
    options = parser.parse_args(arguments)
    ends: Counter[str] = Counter()
    with place(not options.dry) as here:
        for name, words in cases(options.count, options.seed):
            began = time.monotonic()
            end = here.judge(words)
            seconds = time.monotonic() - began
            if isinstance(end, Fault):
                ends[f"FAULT {end.kind}"] += 1
                print(f"{name}: {end.kind}: {shlex.join(words)}\n{end.what}", flush=True)
            else:
                ends[end] += 1
            if seconds > _SLOW_S:
                print(f"{name}: {seconds:.0f} s: {shlex.join(words)}", flush=True)
    for end, number in ends.most_common():
        print(f"{number:6d} {end}")
    return 1 if any(end.startswith("FAULT") for end in ends) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

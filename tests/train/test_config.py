"""Settings: merged in order, converted, and refused in one line with the nearest right key."""

from __future__ import annotations

import os
import subprocess
import sys
import typing
from dataclasses import asdict
from functools import reduce
from pathlib import Path

import pytest

from data.settings import ConfigError, fields
from data.sources import resolve
from data.values import dump, dump_line
from train.config import Config, differences, read
from train.optimiser.optim import OptimConfig, learning_rate

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs" / "smoke.yaml"
# Nine of nine of nine …: a thousand million values in ten lines.
LAUGHS = "a0: &a0 [x]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_base_then_file_then_command_line(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "train: {steps: 1, accumulate: 2}\noptim: {lr: 1.0}\n")
    path = write(tmp_path, "run.yaml", "base: base.yaml\ntrain: {steps: 5}\noptim: {lr: 3e-4}\n")
    config = read(path, ["train.steps=7", "model.mixers.attention={heads: 2}"])
    assert (config.train.steps, config.train.accumulate, config.optim.lr) == (7, 2, 3e-4)
    assert config.model.mixers == {"attention": {"heads": 2}}
    assert config.run.name == "run"
    assert config.run.root == "runs"


def test_a_resolved_configuration_reads_back_the_same(tmp_path: Path) -> None:
    odd = ["eval.prompt='1e6'", "run.start_from='010'", "data.text_field='yes'", "eval.every=0"]
    config = read(SMOKE, odd)
    assert config.data.text_field == "yes"
    path = write(tmp_path, "config.yaml", dump(config.to_dict()))
    again = read(path)
    assert again.to_dict() == config.to_dict()
    assert (again.eval, again.data.text_field) == (config.eval, "yes")


def test_written_paths_mean_the_same_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "he[re"
    (here / "texts").mkdir(parents=True)
    (tmp_path / "link").symlink_to(here)
    for source in ("texts/*.txt", "./texts", "../he[re/texts", "*.txt", "texts/1.txt", "stdlib"):
        monkeypatch.chdir(here)
        for name in ("1.txt", "texts/1.txt", "texts/2.txt"):
            (here / name).write_text(name)
        words = [f"data.source={source!r}", "data.tokenizer=../t.model", "run.start_from=x"]
        config = read(SMOKE, words)
        written = config.to_dict()
        path = write(tmp_path, "config.yaml", dump(written))
        sources = resolve(config.data.source, "text")
        recipes = [one.recipe() for one in sources]
        monkeypatch.chdir("/")
        again = read(path)
        assert [one.recipe() for one in resolve(again.data.source, "text")] == recipes
        assert again.to_dict() == written
        assert again.run.root == str(here / "runs")
        assert again.data.tokenizer == str(tmp_path / "t.model")
        # Both ways of writing are one setting, and through a link it is the same folder.
        monkeypatch.chdir(here)
        assert differences(asdict(config), again.to_dict()) == []
        changed = differences({"run": {"root": str(tmp_path / "link/runs")}}, again.to_dict())
        assert not [line for line in changed if line.startswith("run.root")]
    moved = read(SMOKE, ["run.root=elsewhere"]).to_dict()
    assert any(line.startswith("run.root: ") for line in differences(again.to_dict(), moved))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {stps: 3}", [], "run.yaml: train.stps: no such key; did you mean train.steps?"),
        ("", ["optm.lr=1"], "command line: optm.lr: no such key; did you mean optim.lr?"),
        ("", ["lr=1"], "command line: lr: no such key; did you mean optim.lr?"),
        ("train: {steps: many}", [], "train.steps is many; it must be a whole number"),
        ("train: {steps: 1.5}", [], "train.steps is 1.5; it must be a whole number"),
        ("zero: {stage: 4}", [], "zero.stage is 4; it must be one of 0, 1, 2, 3"),
        ("model: {pattern: attention}", [], "it must be a list"),
        ("model: {tie_embeddings: 1}", [], "it must be true or false"),
        ("train: 3", [], "train: no such key; train is a section"),
        ("", ["train.steps"], "'train.steps' is not of the form key=value"),
        ("", ["train.steps=0"], "train.steps is 0; it must be at least 1"),
        ("train: {seq_len: 4096, batch_tokens: 2048}", [], "4096"),
        ("optim: {lr: -1}", [], "optim.lr is -1.0; it must be at least 0"),
        ("base: nowhere.yaml", [], "nowhere.yaml: cannot be read"),
        ("base: run.yaml", [], "its base files form a circle"),
        ("train: [", [], "run.yaml, line 2: not valid YAML"),
        ("- 1", [], "run.yaml: must be a mapping"),
        ("train: {steps: 1}\ntrain: {steps: 2}", [], "line 2: not valid YAML (the key train is"),
        ("train: {steps: 1}\ntrain.steps: 2", [], "the key train.steps is there twice"),
        ("? [a]\n: 1", [], "line 1: not valid YAML (a key must be a word)"),
        ("'': {train: {steps: 1}}", [], "line 1: not valid YAML (a key must be a word)"),
        ("1: 2", [], "run.yaml: 1: no such key"),
        ("a: 1\n---\nb: 1", [], "not valid YAML (expected a single document"),
        ("train:\n\tsteps: 1", [], "line 2: not valid YAML"),
        ("model: &a {mixers: *a}", [], "an anchor in itself?"),
        ("model: " + "[" * 200 + "]" * 200, [], "nested more than 60 deep"),
        (LAUGHS, [], "it stands for more than 100,000 values"),
        ("train: {steps: !!python/name:os.system }", [], "the tag !!python/name:os.system means"),
        ("train: {steps: !!int x}", [], "the tag !!int means nothing here"),
        ('eval: {prompt: "\\ud800"}', [], "text must be of whole characters, without NUL"),
        ('run: {root: "a\\nb"}', [], 'run.root is "a\\nb"; it must be a path'),
        ("", [f"run.start_from={'x' * 300}"], "of names of at most 255 bytes"),
        ("", [f"data.source={'x/' * 900}"], "it must be a path"),
        ("run: {root: ''}", [], "run.root is ''; it must be a path"),
        ("run: {name: 7}", [], "run.name is 7; it must be text or null, in quotes"),
        ("base: .", [], "Is a directory"),
        ("", ["=1"], "'=1' is not of the form key=value"),
        ("", [" =1"], "is not of the form key=value"),
        ("", ["a.b.c.d.e=1"], "command line: a.b.c.d.e: no such key"),
        ("", ["tr\u0430in.steps=1"], "no such key; did you mean train.steps?"),
        ("", ["a\nb=1"], "a b: no such key"),
        ("", ["zero.stage=true"], "zero.stage is true; it must be one of"),
        ("", ["train.seed=9223372036854775808"], "it must be at least 0 and at most 922"),
        ("", [f"train.seed={'9' * 5000}"], "it must be a whole number"),
        ("", ["train.steps=\uff15"], "it must be a whole number"),
        ("", ["model.pattern=[gla*999999999]"], "it may name at most 1024 mixers"),
        ("", [f"model.pattern=[gla*{'9' * 5000}]"], "a whole number above 0"),
        ("", ["model.layers=1000000000"], "model.layers is 1000000000; it must be at least 1 and"),
        ("", ["faults.hang_seconds=0.5"], "it must be at least 1, or 0 for never"),
        *[
            (
                "",
                [f"{key}={value}"],
                f"{key} is {dump_line(value)}; it must be a",
            )
            for key in ("train.steps", "optim.lr")
            for value in ("2026-13-45", "1e999", ".inf", ".nan", "0x", "1:30", "yes")
        ],
    ],
)
def test_a_wrong_setting_is_one_clear_line(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    path = write(tmp_path, "run.yaml", text + "\n")
    with pytest.raises(ConfigError) as error:
        read(path, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_is_what_it_says_and_numbers_may_be_written_in_many_ways(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "run: {name: 2026-11-30}\neval: {prompt: no}\n")
    words = ["train.steps=1_000", "train.seed=0x10", "optim.lr=3e-4", "train.seq_len=0100"]
    config = read(path, [*words, "model.tie_embeddings=off", "train.batch_tokens=1e4"])
    assert (config.run.name, config.eval.prompt) == ("2026-11-30", "no")
    assert (config.train.steps, config.train.seed, config.train.seq_len) == (1000, 16, 100)
    assert (config.optim.lr, config.train.batch_tokens) == (3e-4, 10000)
    assert config.model.tie_embeddings is False


@pytest.mark.parametrize("value", ["9" * 4, "-" + "9" * 30, "1e-300", "5e-324", "1e308", "-1.5"])
def test_every_number_has_a_range_and_says_so(value: str) -> None:
    """What no check of another setting comes before: one line, or a number within its limits."""
    for key, field in fields(Config):
        if not {int, float} & {field.hint, *typing.get_args(field.hint)}:
            continue
        name = key.rpartition(".")[2]
        refused, kept = "", None
        try:
            kept = reduce(getattr, key.split("."), read(SMOKE, [f"{key}={value}"]))
        except ConfigError as error:
            refused = str(error)
        if kept is None:
            assert name in refused
            continue
        assert "least" in field.metadata or "above" in field.metadata, key
        assert kept == float(value)


@pytest.mark.parametrize("kind", ["folder", "pipe", "bytes", "unreadable", "itself", "chain"])
def test_a_file_that_is_no_configuration_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "bytes":
        path.write_bytes(b"\xff\xfe")
    elif kind == "itself":
        path.symlink_to(path)
    elif kind == "chain":
        for number in range(30):
            write(tmp_path, f"{number}.yaml", f"base: {number + 1}.yaml")
        path.symlink_to(tmp_path / "0.yaml")
    else:
        path = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=r"cannot be read as a configuration|base of a base"):
        read(path)


def test_a_room_s_command_is_strict_in_its_own_section_only(tmp_path: Path) -> None:
    from data.__main__ import Settings
    from data.settings import load

    path = write(tmp_path, "run.yaml", "train: {steps: 5, seq_len: 64}\nmodel: {dim: 8}\n")
    assert load(Settings, path, partial=["train"]).train.seq_len == 64
    with pytest.raises(ConfigError, match=r"did you mean data\.source"):
        load(Settings, path, ["data.sorce=x"], partial=["train"])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "train", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_typo_answers_with_exit_code_2_before_anything_heavy_is_imported() -> None:
    done = command("configs/smoke.yaml", "train.stesp=3")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert lines == ["command line: train.stesp: no such key; did you mean train.steps?"]
    assert "| torch\n" not in done.stderr.replace(" ", "").replace("|", "| ")


@pytest.mark.parametrize(
    ("variables", "lines"),
    [
        ({}, 1),
        ({"RANK": "0", "SLURM_PROCID": "0"}, 1),
        ({"RANK": "1"}, 0),
        ({"SLURM_PROCID": "2"}, 0),
    ],
)
def test_one_rank_tells_of_a_mistake_for_all(
    variables: dict[str, str],
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from train import __main__ as program

    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(program.time, "sleep", lambda _: None)  # it lets the first speak before
    assert program.main([str(ROOT / "configs/smoke.yaml"), "train.stesp=3"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_help_explains_every_key() -> None:
    from data.settings import fields
    from train.config import Config

    done = command("--help")
    assert done.returncode == 0
    for name, field in fields(Config):
        assert f"{name}=" in done.stdout
        assert field.help, name
        assert field.help in done.stdout
    assert "model.mixers.gated_deltanet.conv_size=4" in done.stdout
    assert "model.mixers.attention.window=null" in done.stdout


def test_differences_name_what_changed() -> None:
    old = {"train": {"steps": 1, "seed": 0}, "run": {"name": "a"}}
    new = {"train": {"steps": 2, "seed": 0}, "run": {"name": "a", "root": "r"}}
    assert differences(old, new) == ["train.steps: 1 → 2", "run.root: None → r"]


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_learning_rate_warms_up_stays_below_the_peak_and_ends_low(schedule: str) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=10, decay_fraction=0.25)  # type: ignore[arg-type]
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == 1.0
    assert rates[99] < 0.05
    assert rates[10:] == sorted(rates[10:], reverse=True)
    if schedule == "wsd":
        assert rates[10:76] == [1.0] * 66


def test_the_learning_rate_is_defined_for_runs_shorter_than_the_warm_up() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, decay_fraction=0.0)
    assert [learning_rate(config, step, 3) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    "words",
    [
        "LONG",
        "generate LONG prompt",
        "evaluate LONG",
        "table LONG",
        "checkpoints LONG",
        "replay LONG 1",
        "export LONG --to x",
        "import LONG --to x",
        "convert LONG --to x --pattern liger",
    ],
)
def test_a_path_too_long_for_a_file_system_is_one_line(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.__main__ import main

    assert main(words.replace("LONG", "x" * 5000).split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "x" * 100 in error

"""Settings: merged in order, converted, and refused in one line with the nearest right key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.settings import ConfigError
from train.config import differences, read
from train.optimiser.optim import OptimConfig, learning_rate

ROOT = Path(__file__).parents[2]


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
    config = read(ROOT / "configs" / "smoke.yaml")
    path = write(tmp_path, "config.yaml", yaml.safe_dump(config.to_dict()))
    assert read(path) == config


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
        ("optim: {lr: -1}", [], "optim.lr is -1.0; it must be above 0"),
        ("base: nowhere.yaml", [], "nowhere.yaml: cannot be read"),
        ("base: run.yaml", [], "its base files form a circle"),
        ("train: [", [], "run.yaml, line 2: not valid YAML"),
        ("- 1", [], "run.yaml: must be a mapping"),
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

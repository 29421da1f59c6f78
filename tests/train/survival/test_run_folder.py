"""A run's folder: only what a run wrote goes, only from a run's folder, and only when told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from data.settings import ConfigError
from parallel import World
from train.__main__ import main
from train.config import Config, read
from train.survival.run import claim

ONE = World(0, 1, 0, torch.device("cpu"))


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link of a folder, links not followed."""
    found: dict[str, bytes | str] = {}
    for base, folders, files in os.walk(folder):
        for path in (Path(base) / name for name in [*folders, *files]):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = os.readlink(path)
            elif path.is_file():
                found[name] = path.read_bytes()
    return found


def start(config: Config, *, fresh: bool = False, overwrite: bool = False) -> None:
    with claim(config, fresh, overwrite, ONE):
        pass


def of(config: Path, folder: Path) -> Config:
    """The settings of a run in `folder`."""
    return read(config, [f"run.root={folder.parent}", f"run.name={folder.name}"])


@pytest.fixture
def run(config: Path, undisturbed: Path, tmp_path: Path) -> Path:
    """The folder of a finished run, with something of the user's in each of its folders."""
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(undisturbed, folder)
    (folder / "faults").mkdir()
    (folder / "faults" / "step-00000003.npz").write_bytes(b"batches")
    (folder / "beats").mkdir(exist_ok=True)
    (folder / "beats" / "rank-00000.json").write_bytes(b"{}")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "step-00000008.json").write_bytes(b"{}")
    (folder / "evaluation" / "of-a-text").mkdir()
    (folder / "evaluation" / "of-a-text" / "step-00000008.json").write_bytes(b"{}")
    (folder / ".lock").touch()
    start(of(config, folder))  # which writes its own settings
    return folder


THEIRS = (
    "notes.txt",
    "checkpoints/notes.txt",
    "checkpoints/step-00000002/notes.txt",
    "checkpoints/best/manifest.json",
    "tensorboard/notes.txt",
    "faults/notes.txt",
    "evaluation/notes.txt",
    "evaluation/of-a-text/notes.txt",
    "data/metrics.jsonl",
)
LEFT = {".lock", "config.yaml"}


def test_starting_over_removes_what_a_run_wrote_and_nothing_else(config: Path, run: Path) -> None:
    for name in THEIRS:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    start(of(config, run), fresh=True, overwrite=True)
    assert contents(run).keys() == LEFT | set(THEIRS)


def test_starting_over_empties_a_run_s_folder(config: Path, run: Path) -> None:
    start(of(config, run), fresh=True, overwrite=True)
    assert {path.name for path in run.iterdir()} == LEFT


@pytest.mark.parametrize("left", ["checkpoints", "log.txt", None])
def test_starting_over_is_asked_for_twice_wherever_files_are(
    config: Path, run: Path, left: str | None
) -> None:
    for path in run.iterdir():
        if path.name not in {left, "config.yaml"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(run)
    with pytest.raises(ConfigError, match="add --overwrite"):
        start(of(config, run), fresh=True)
    assert contents(run) == before
    start(of(config, run))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        None,
        "",
        "title: a web site",
        "- a list",
        "run: {name: precious}",
        "run: tiny\ntrain: {}\ndata: {}\nmodel: {}\noptim: {}\ncheckpoint: {}",
    ],
)
def test_a_folder_that_is_no_run_s_stays_as_it_is(
    config: Path, tmp_path: Path, settings: str | None, overwrite: bool
) -> None:
    folder = tmp_path / "precious"
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000001" / "manifest.json").write_text("mine")
    (folder / "log.txt").write_text("mine")
    if settings is not None:
        (folder / "config.yaml").write_text(settings)
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"another run\.name"):
        start(of(config, folder), fresh=True, overwrite=overwrite)
    assert contents(folder) == before


def test_a_run_s_own_file_is_no_run_s_folder(config: Path, tmp_path: Path) -> None:
    """As a user has written it, beside other work."""
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copy(config, folder / "config.yaml")
    before = contents(folder)
    for fresh in (True, False):
        with pytest.raises(ConfigError, match=r"config.yaml is not the settings of a run"):
            start(of(config, folder), fresh=fresh, overwrite=True)
    assert contents(folder) == before


def test_going_on_takes_no_rows_of_others(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "another"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"holds a metrics\.jsonl but no run"):
        start(of(config, folder))
    assert contents(folder) == before


@pytest.mark.parametrize("folder_exists", [False, True])
def test_starting_over_where_nothing_is_needs_no_second_word(
    config: Path, tmp_path: Path, folder_exists: bool
) -> None:
    folder = tmp_path / "new"
    if folder_exists:
        folder.mkdir()
        (folder / ".lock").touch()  # of a start that a kill cut short
        (folder / ".config.part").write_text("run:")
    start(of(config, folder), fresh=True)
    assert {path.name for path in folder.iterdir()} == LEFT


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "/", "/tmp/x", "a/b", "a/", "../a", "a/..", "a..b", "a\\b",
             "a\n", "\na", "a\tb", "a\0b", " a", "a ", "\u200b", "\udcff"],
)  # fmt: skip
def test_a_name_is_that_of_one_folder_under_the_root(
    config: Path, tmp_path: Path, name: str
) -> None:
    """Also where it comes from the name of the file."""
    with pytest.raises(ConfigError) as error:
        read(config, [f"run.root={tmp_path}", f"run.name={yaml.dump(name)}"])
    assert "run.name" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["three e minus three", "1.3b-gla", ".hidden", "naïve", "a=b,c"])
def test_other_names_are_as_good_as_any(config: Path, name: str) -> None:
    assert read(config, [f"run.name={name}"]).run.name == name


def test_a_name_that_a_file_gives_is_looked_at_too(config: Path, tmp_path: Path) -> None:
    path = shutil.copy(config, tmp_path / "a..b.yaml")
    with pytest.raises(ConfigError, match=r"run.name is 'a..b'"):
        read(path)


@pytest.mark.parametrize(
    "name", ["checkpoints", "checkpoints/step-00000004", "log.txt", "metrics.jsonl", "tensorboard"]
)
def test_links_are_removed_and_never_followed(
    config: Path, run: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    before = contents(elsewhere) or elsewhere.read_bytes()
    start(of(config, run), fresh=True, overwrite=True)
    assert {path.name for path in run.iterdir()} == LEFT
    assert (contents(elsewhere) or elsewhere.read_bytes()) == before


def test_a_run_trains_behind_links_and_starts_over_cleanly(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`checkpoints` on another disk: training goes on there, starting over leaves it."""
    folder, disk = tmp_path / "tiny", tmp_path / "disk"
    command = [str(config), f"run.root={tmp_path}", "train.steps=2", "checkpoint.keep=1"]
    assert main(command) == 0
    (folder / "checkpoints").rename(disk)
    (folder / "checkpoints").symlink_to(disk)
    assert main([*command, "train.steps=4", "--fresh"]) == 2
    assert main([*command, "train.steps=4"]) == 0
    assert [path.name for path in disk.iterdir()] == ["step-00000004"]
    before = contents(disk)
    assert main([*command, "--fresh", "--overwrite"]) == 0
    assert contents(disk) == before
    assert not (folder / "checkpoints").is_symlink()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]


def test_the_folder_of_another_run_is_not_emptied_through_a_link(config: Path, run: Path) -> None:
    other = run.with_name("other")
    other.symlink_to(run)
    before = contents(run)
    with pytest.raises(ConfigError, match="is a link to the run tiny"):
        start(of(config, other), fresh=True, overwrite=True)
    assert contents(run) == before


@pytest.fixture
def held(config: Path, tmp_path: Path) -> Iterator[int]:
    """The lock of a run's folder, which another process holds."""
    folder = tmp_path / "held"
    start(of(config, folder))
    lock = os.open(folder / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield lock
    os.close(lock)


def test_a_job_that_was_queued_again_waits_for_what_its_last_start_left(
    config: Path, tmp_path: Path, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank on a node whose Slurm daemon died; it ends while the new start waits for it."""
    waited = []

    def ends(seconds: float) -> None:
        waited.append(seconds)
        fcntl.flock(held, fcntl.LOCK_UN)

    monkeypatch.setattr("train.survival.run.time.sleep", ends)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start(of(config, tmp_path / "held"))
    assert len(waited) == 1


@pytest.mark.parametrize(("restarts", "code"), [(None, 2), ("0", 2), ("1", 1), ("12", 1)])
def test_a_folder_that_stays_held_is_tried_again_by_a_queued_job_only(
    config: Path,
    tmp_path: Path,
    held: int,
    restarts: str | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Slurm's script takes 1 for a crash, which it tries again; 2 ends the job for good."""
    monkeypatch.setattr("train.survival.run._PATIENCE_S", 0)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert main([str(config), f"run.root={tmp_path}", "run.name=held"]) == code
    told = capsys.readouterr()
    assert "another process trains there" in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("there", [True, False])
def test_the_lock_is_written_through_no_link(
    config: Path, run: Path, tmp_path: Path, fresh: bool, there: bool
) -> None:
    precious = tmp_path / "precious"
    if there:
        precious.write_text("mine")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(precious)
    before = contents(run)
    with pytest.raises(ConfigError, match=r"\.lock is a link"):
        start(of(config, run), fresh=fresh, overwrite=fresh)
    assert contents(run) == before
    assert precious.exists() == there
    assert not there or precious.read_text() == "mine"


def test_settings_are_written_through_no_link(config: Path, run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (run / ".config.part").symlink_to(precious)
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "\n")
    start(of(config, run))
    assert precious.read_text() == "mine"


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Not even root can remove it."""
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", path], check=False).returncode:
        pytest.skip("no file can be made immutable here")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)


@contextlib.contextmanager
def refused(path: Path) -> Iterator[None]:
    """Renaming and removing it fails, as on a file system that is read-only from there on."""

    def unless(work: Callable[..., None]) -> Callable[..., None]:
        def refuse(self: Path, *arguments: object, **named: object) -> None:
            if self == path or path in self.parents:
                raise OSError(30, "Read-only file system", str(self))
            work(self, *arguments, **named)

        return refuse

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "unlink", "rmdir"):
            patch.setattr(Path, name, unless(getattr(Path, name)))
        yield


@pytest.mark.parametrize("how", [immutable, refused])
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "checkpoints/step-00000002", "checkpoints/step-00000008/manifest.json"],
)
def test_nothing_is_removed_unless_everything_can_be(
    config: Path,
    run: Path,
    name: str,
    how: Callable[[Path], contextlib.AbstractContextManager[None]],
) -> None:
    before = contents(run)
    with how(run / name), pytest.raises(ConfigError, match=r"cannot be removed \(.*\)$"):
        start(of(config, run), fresh=True, overwrite=True)
    assert contents(run) == before
    start(of(config, run), fresh=True, overwrite=True)
    assert {path.name for path in run.iterdir()} == LEFT


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"run: {name: \xff}"), "not UTF-8 text"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not UTF-8 text"),
        (lambda path: path.write_text("run: ["), "not valid YAML"),
        (lambda path: path.write_text("a: \x07"), "not valid YAML"),
        (lambda path: path.write_text("[" * 3000), "not valid YAML"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file"),
    ],
)
def test_settings_that_cannot_be_read_are_one_line(
    config: Path,
    run: Path,
    spoil: Callable[[Path], None],
    said: str,
    fresh: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(run / "config.yaml")
    before = contents(run)
    words = ["--fresh", "--overwrite"] if fresh else []
    assert main([str(config), f"run.root={run.parent}", *words]) == 2
    error = capsys.readouterr().err
    assert str(run / "config.yaml") in error
    assert said in error
    assert error.count("\n") == 1
    assert contents(run) == before


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "name",
    ["checkpoints", "checkpoints/.staging", "checkpoints/.staging/manifest.json", ".lock", "."],
)
def test_what_is_of_the_wrong_kind_is_one_line(
    config: Path, run: Path, name: str, fresh: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("checkpoints", "checkpoints/.staging"):
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).write_text("mine")
    elif name == ".lock":
        (run / name).unlink()
        (run / name).mkdir()
    elif name.endswith(".json"):
        (run / name).mkdir(parents=True)
    else:
        shutil.rmtree(run)
        run.write_text("mine")
    before = contents(run.parent)
    words = ["--fresh", "--overwrite"] if fresh else []
    assert main([str(config), f"run.root={run.parent}", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert contents(run.parent) == before

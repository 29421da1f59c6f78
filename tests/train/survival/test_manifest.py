"""A manifest protects itself, and only checkpoints that are whole count."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.runs import losses
from train.__main__ import main
from train.survival import manifest


@pytest.fixture
def checkpoint(undisturbed: Path, tmp_path: Path) -> Path:
    """A checkpoint of a real run, to be damaged."""
    path = tmp_path / "checkpoints" / manifest.name(8)
    shutil.copytree(undisturbed / "checkpoints" / path.name, path)
    return path


def test_no_bit_of_a_manifest_can_flip(checkpoint: Path) -> None:
    content = (checkpoint / "manifest.json").read_bytes()
    assert manifest.parse(content) == manifest.read(checkpoint)
    accepted = []
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            manifest.parse(bytes(changed))
        except ValueError:
            continue
        accepted.append(bit)
    assert accepted == []
    (checkpoint / "manifest.json").write_bytes(changed)
    assert "manifest.json" in (manifest.fault(checkpoint) or "")


def test_the_digest_is_that_of_all_that_stands_before_it(checkpoint: Path) -> None:
    """As anybody can check it: `head --bytes=N manifest.json | sha256sum`."""
    content = (checkpoint / "manifest.json").read_bytes()
    end = re.search(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z', content)
    assert end
    assert hashlib.sha256(content[: end.start()]).hexdigest() == end[1].decode()


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda held: {name: value for name, value in held.items() if name != key}


def with_(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda held: held | changed


def file_facts(facts: Any, name: str = "state-00-of-01.safetensors") -> Callable[..., Any]:
    return lambda held: held | {"files": {name: facts}}


GOOD = {"bytes": 1, "sha256": "0" * 64}
MALFORMED = [
    *(without(key) for key in ("step", "tokens", "cursor", "next_batch", "config", "files")),
    without("format"),
    with_(format=3),
    with_(files=[]),
    with_(files={}),
    with_(files="state"),
    file_facts({"bytes": 1}),
    file_facts({"sha256": "0" * 64}),
    file_facts({"bytes": "1", "sha256": "0" * 64}),
    file_facts({"bytes": 1, "sha256": None}),
    file_facts([]),
    *(file_facts(GOOD, name) for name in ("../other", "/etc/passwd", "a/b", "", "manifest.json")),
    with_(step=6),
    with_(step="8"),
    with_(step=8.0),
    with_(step=-8),
    with_(step=True),
    with_(tokens=None),
    with_(cursor=[]),
    with_(cursor={"batches": "16"}),
    with_(cursor={"positions": 3}),
    with_(cursor={"positions": ["a"]}),
    with_(cursor={"unheard": 1}),
    with_(config="train"),
    with_(next_batch=3),
    with_(seconds="soon"),
    lambda held: [held],
    lambda held: "text",
    lambda held: None,
]


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "of the version before"])
@pytest.mark.parametrize("malform", MALFORMED)
def test_a_malformed_manifest_is_a_fault_like_any_other(
    checkpoint: Path, malform: Callable[[dict[str, Any]], Any], sealed: bool
) -> None:
    """Also where its own digest is right, or where it is of the format that had none."""
    held = json.loads((checkpoint / "manifest.json").read_bytes())
    del held["sha256"]
    made = malform(held if sealed else held | {"format": 1})
    if sealed and isinstance(made, dict):
        content = manifest.sealed(made)
    else:
        content = json.dumps(made).encode()
    (checkpoint / "manifest.json").write_bytes(content)
    assert (manifest.fault(checkpoint) or "").startswith("manifest.json ")
    told: list[str] = []
    assert manifest.newest(checkpoint.parent, told.append) is None
    assert "passing over" in told[0]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"null", b'{"format": 2}']
)
def test_what_is_no_manifest_at_all_is_a_fault_too(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "manifest.json").write_bytes(content)
    assert "manifest.json" in (manifest.fault(checkpoint) or "")


def test_a_manifest_that_is_a_folder_or_missing_is_a_fault_too(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    assert "manifest.json is missing" in (manifest.fault(checkpoint) or "")
    (checkpoint / "manifest.json").mkdir()
    assert "Is a directory" in (manifest.fault(checkpoint) or "")


def test_a_manifest_of_the_version_before_is_read_and_told(checkpoint: Path) -> None:
    """A run that began with it goes on; it could not be told from a damaged one otherwise."""
    held = json.loads((checkpoint / "manifest.json").read_bytes())
    for key in ("sha256", "judge"):
        del held[key]
    (checkpoint / "manifest.json").write_text(json.dumps(held | {"format": 1}, indent=1))
    told: list[str] = []
    found, progress = manifest.newest_progress(checkpoint.parent, told.append)
    assert found == checkpoint
    assert progress is not None
    assert progress.step == 8
    assert ["without a digest of its own" in line for line in told] == [True]


@pytest.mark.parametrize("name", ["step-8", "step-000000008", "step-٠٠٠٠٠٠٠٨", "step-0000000x"])
def test_a_folder_of_another_name_is_no_checkpoint(checkpoint: Path, name: str) -> None:
    checkpoint.rename(checkpoint.with_name(name))
    assert manifest.published(checkpoint.parent) == []


def spoil(checkpoints: Path, *steps: int) -> None:
    """Flip a bit in the weights of checkpoints."""
    for step in steps:
        state = next((checkpoints / manifest.name(step)).glob("*.safetensors"))
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)


def steps(checkpoints: Path) -> list[int]:
    return [manifest.step_of(path) for path in manifest.published(checkpoints)]


@pytest.mark.parametrize(
    ("keep", "keep_every", "bad", "last", "old"),
    [
        (1, 0, [8, 6], 4, [2]),
        (2, 0, [8, 6], None, []),
        (1, 0, [8], None, [4, 2]),
        (2, 0, [6], None, [2]),
        (1, 2, [8], None, []),
        (1, 4, [], None, [6, 2]),
        (1, 0, [], 6, [4, 2]),
        (3, 0, [4], None, []),
        (1, 0, [8, 6, 4, 2], None, []),
    ],
)
def test_only_whole_checkpoints_count(
    undisturbed: Path,
    tmp_path: Path,
    keep: int,
    keep_every: int,
    bad: list[int],
    last: int | None,
    old: list[int],
) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(undisturbed / "checkpoints", checkpoints)
    spoil(checkpoints, *bad)
    gone = manifest.surplus(checkpoints, keep, keep_every, {}, last)
    assert [manifest.step_of(path) for path in gone] == old


def test_damaged_newer_checkpoints_push_out_no_good_one(
    config: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 2 to 8 all but 2 are damaged; the run goes on from there and saves 3, then ends."""
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed, folder)
    checkpoints = folder / "checkpoints"
    spoil(checkpoints, 8, 6, 4)
    command = [str(config), f"run.root={tmp_path}", "checkpoint.keep=1", "checkpoint.every=3"]
    settings = ["train.steps=3", "optim.warmup_steps=8", "optim.decay_fraction=0"]
    assert main([*command, *settings]) == 0
    assert capsys.readouterr().out.count("passing over") == 3
    assert steps(checkpoints) == [8, 6, 4, 3]
    assert manifest.fault(checkpoints / manifest.name(3)) is None
    # They are made anew, or go once `keep` whole ones are newer.
    assert main([*command, *settings[1:]]) == 0
    assert steps(checkpoints) == [8]
    assert manifest.fault(checkpoints / manifest.name(8)) is None
    assert losses(folder).keys() == set(range(1, 9))


def test_pruning_counts_whole_ones_only(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed, folder)
    checkpoints = folder / "checkpoints"
    spoil(checkpoints, 8, 6)
    assert main(["checkpoints", str(folder), "--prune", "checkpoint.keep=2"]) == 0
    assert steps(checkpoints) == [8, 6, 4, 2]
    assert main(["checkpoints", str(folder), "--prune", "checkpoint.keep=1"]) == 0
    assert steps(checkpoints) == [8, 6, 4]
    capsys.readouterr()
    assert main(["checkpoints", str(folder), "--prune", "--verify", "checkpoint.keep=1"]) == 0
    assert "has changed since it was written" in capsys.readouterr().out
    assert steps(checkpoints) == [4]


def test_the_newest_is_one_that_can_be_read(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a job script takes for progress; only the manifest is read."""
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed, folder)
    (folder / "checkpoints" / manifest.name(8) / "manifest.json").write_text("{")
    assert main(["checkpoints", str(folder), "--newest"]) == 0
    assert capsys.readouterr().out == f"{folder / 'checkpoints' / manifest.name(6)}\n"


def test_a_link_goes_and_what_it_names_stays(undisturbed: Path, tmp_path: Path) -> None:
    """A checkpoint that is a link is removed as one, when pruned and when saved anew."""
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed, folder)
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    for step in (2, 4):
        path = folder / "checkpoints" / manifest.name(step)
        path.rename(kept / path.name)
        path.symlink_to(kept / path.name, target_is_directory=True)
    assert main(["checkpoints", str(folder), "--prune", "checkpoint.keep=1"]) == 0
    assert steps(folder / "checkpoints") == [8]
    assert [manifest.fault(kept / manifest.name(step)) for step in (2, 4)] == [None, None]


def test_what_is_not_of_a_checkpoint_stays_when_it_goes(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed, folder)
    oldest = folder / "checkpoints" / manifest.name(2)
    (oldest / "notes.txt").write_text("mine")
    assert main(["checkpoints", str(folder), "--prune", "checkpoint.keep=1"]) == 1
    assert [path.name for path in oldest.iterdir()] == ["notes.txt"]
    assert steps(folder / "checkpoints") == [8, 2]


def test_what_cannot_be_removed_is_not_called_removed(
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a read-only file system: nothing changes, and the exit code says so."""
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed, folder)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(["checkpoints", str(folder), "--prune", "--verify", "checkpoint.keep=1"]) == 1
    told = capsys.readouterr().out
    assert "removed /" not in told
    assert told.count("could not be removed (Read-only file system)") == 3
    assert told.count("whole") == 4


def test_weights_are_taken_from_no_damaged_checkpoint(
    config: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed / "checkpoints" / manifest.name(8), tmp_path / manifest.name(8))
    spoil(tmp_path, 8)
    weights = (tmp_path / manifest.name(8)).rename(tmp_path / "weights")
    settings = [f"run.root={tmp_path}", f"run.start_from={weights}"]
    assert main([str(config), *settings]) == 2
    error = capsys.readouterr().err
    assert "has changed since it was written; name another checkpoint" in error
    assert error.count("\n") == 1


def test_replay_passes_over_what_is_damaged(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(undisturbed, folder)
    spoil(folder / "checkpoints", 4, 6)
    (folder / "faults").mkdir()
    assert main(["replay", str(folder), "7"]) == 0
    told = capsys.readouterr().out
    assert told.count("passing over") == 2
    assert f"step 7  loss {losses(undisturbed)[7]:.6f}" in told
    (folder / "faults" / "step-00000007.npz").write_bytes(b"PK\x03\x04")
    assert main(["replay", str(folder), "7"]) == 2
    assert "step-00000007.npz: cannot be read" in capsys.readouterr().err

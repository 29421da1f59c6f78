"""Wrong words of `python -m kernels` end with one line."""

from __future__ import annotations

import pytest

from kernels.__main__ import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compile --jobs 0", "--jobs is 0; it must be from 1 to 1024"),
        ("compile --jobs -1", "--jobs is -1; it must be from 1 to 1024"),
        ("bench --length 0", "--length is 0; it must be at least 1"),
        (f"bench --length {'9' * 30}", "at most 1073741824"),
        ("bench --plot x.zzz", "--plot is 'x.zzz'; its name must end in .png"),
        ("bench --plot /", "its name must end in .png"),
        ("bench --plot nowhere/x.png", "there is no folder 'nowhere'"),
        ("bench --only nosuch --length 1", "--only is 'nosuch'; no op's name contains it"),
    ],
)
def test_wrong_words_end_with_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["kernels", *words.split()])
    assert main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1

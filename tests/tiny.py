"""A tiny run for tests: a hybrid of two blocks on some of the checkout's own sources."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def write(path: Path, settings: str) -> Path:
    """The run's file at `path`, with text and corpora beside it.

    Args:
        settings: YAML of the other sections, `train` with batch_tokens and seq_len among them.
    """
    folder = path.parent
    for number, source in enumerate(sorted((ROOT / "train").rglob("*.py"))):
        text = source.read_text(encoding="utf-8")
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    path.write_text(
        f"""
data: {{source: "{folder}/*.txt", root: "{folder}/corpora", vocab_size: 600, validation: 0.2}}
model:
  layers: 2
  dim: 32
  pattern: [gated_deltanet, attention]
  mixers:
    gated_deltanet: {{heads: 2, head_dim: 8}}
    attention: {{heads: 2, head_dim: 16}}
{settings}
""",
        encoding="utf-8",
    )
    return path

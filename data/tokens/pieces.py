"""The pieces of a tokenizer.json as the bytes that each stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from data.settings import ConfigError

MOST_IDS = 1 << 24  # the highest that a vocabulary's table is made for
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
# What changes text before it is cut into pieces, other than to spell spaces in another way.
_KEPT = {"Replace"}


def spellings(loaded: Any, content: dict[str, Any], controls: set[int]) -> list[bytes]:
    """The UTF-8 bytes that each id stands for; none for control pieces and for unused ids.

    Args:
        loaded: a `tokenizers.Tokenizer`. content: the file that it was made of.
        controls: ids that stand for no text.

    Raises:
        ConfigError: an id is too high for a table.
    """
    names = {token: name for name, token in loaded.get_vocab(with_added_tokens=True).items()}
    highest = max(names, default=-1)
    if highest >= MOST_IDS:
        raise ConfigError(f"{len(names)} pieces have ids up to {highest}; the limit is {MOST_IDS}")
    steps = {step["type"] for step in _steps(content.get("decoder"), "decoders")}
    added = {token: held.content for token, held in loaded.get_added_tokens_decoder().items()}
    letters = _letters() if "ByteLevel" in steps else {}
    # Beside a letter: some decoders take the space before the first piece away.
    beside = loaded.encode("a", add_special_tokens=False).ids
    before = len(loaded.decode(beside, skip_special_tokens=False))
    found = [b""] * (highest + 1)
    for token, name in names.items():
        if token in controls:
            continue
        if token in added:
            found[token] = added[token].encode()
        elif "ByteFallback" in steps and (byte := _BYTE.fullmatch(name)):
            found[token] = bytes([int(byte[1], 16)])
        elif letters:
            each = [letters.get(letter) for letter in name]
            known = [byte for byte in each if byte is not None]
            found[token] = bytes(known) if len(known) == len(each) else name.encode()
        else:
            text = loaded.decode([*beside, token], skip_special_tokens=False)
            found[token] = text[before:].encode()
    return found


def reserved(content: dict[str, Any]) -> re.Pattern[str] | None:
    """Runs of the characters that stand for another in pieces, as ▁ does for a space.

    None if there are none. A text's own can only be spelled in bytes.
    """
    letters: set[str] = set()
    for step in _steps(content.get("decoder"), "decoders"):
        pattern = step.get("pattern")
        if step["type"] == "Metaspace":
            letters.add(step["replacement"])
        elif step["type"] == "Replace" and isinstance(pattern, dict) and "String" in pattern:
            letters.add(pattern["String"])
    single = [letter for letter in letters if len(letter) == 1]
    return re.compile(f"([{re.escape(''.join(sorted(single)))}]+)") if single else None


def plain(content: dict[str, Any]) -> dict[str, Any]:
    """The same pieces for text as it is: nothing put before it, taken away or normalised."""
    made: dict[str, Any] = json.loads(json.dumps(content))
    steps = [
        step for step in _steps(made.get("normalizer"), "normalizers") if step["type"] in _KEPT
    ]
    made["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    steps = [step for step in _steps(made.get("decoder"), "decoders") if step["type"] != "Strip"]
    made["decoder"] = {"type": "Sequence", "decoders": steps} if steps else None
    for step in (*_steps(made.get("pre_tokenizer"), "pretokenizers"), *steps):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return made


def _steps(part: dict[str, Any] | None, inside: str) -> Iterator[dict[str, Any]]:
    """The steps of a part of the file, those inside sequences one by one."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for step in part[inside]:
            yield from _steps(step, inside)
    else:
        yield part


def _letters() -> dict[str, int]:
    """The letter that byte-level pieces have for every byte (Radford et al. 2019, GPT-2)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}

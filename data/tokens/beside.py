"""What the files beside a tokenizer say: which ids begin, end and pad a text, and how it chats.

transformers spreads it over several files. Those in `FILES` belong to the tokenizer and go where
it goes, byte for byte; of a model's config.json only three ids do, as transformers itself takes
them into a generation_config.json that lacks them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import regular
from data.settings import ConfigError

TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"
SPECIAL, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
FILES = (TOKENIZER, SPECIAL, GENERATION, TEMPLATE)
TEMPLATES = "additional_chat_templates/*.jinja"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Marks:
    """Ids of the pieces that mark a text; None where nothing is said.

    ends: eos, and every other id at which generation stops.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    ends: frozenset[int] = frozenset()


def gather(folder: Path) -> dict[str, bytes]:
    """The files in `folder` that belong to its tokenizer, by name.

    Raises:
        ConfigError: one is no file, or is no JSON mapping where it should be.
    """
    found: dict[str, bytes] = {}
    others = sorted(folder.glob(TEMPLATES))
    for path in (*(folder / name for name in FILES), *others):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = _bytes(path)
        elif path.exists():
            raise ConfigError(f"{path} is no file; remove it, or put the model's own there")
    for name in {TOKENIZER, SPECIAL, GENERATION} & set(found):
        mapping(found[name], folder / name)
    if (folder / "config.json").is_file():
        path = folder / "config.json"
        held = mapping(_bytes(path), path)
        said = mapping(found.get(GENERATION, b"{}"), folder / GENERATION)
        more = {key: held[key] for key in IDS if held.get(key) is not None and key not in said}
        if more:
            found[GENERATION] = dumped(said | more)
    return found


def write(beside: dict[str, bytes], folder: Path) -> None:
    """Put the files where `gather` finds them."""
    for name, content in beside.items():
        (folder / name).parent.mkdir(exist_ok=True)
        regular.replace(folder / name, content)


def marks(beside: dict[str, bytes], piece: Callable[[str], int | None], size: int) -> Marks:
    """What the files say of a tokenizer's ids. `tokenizer_config.json` comes first.

    Args:
        beside: as `gather` gives them.
        piece: the id of a piece by its name.
        size: of the vocabulary.

    Raises:
        ConfigError: a file names what is no id or piece of this tokenizer.
    """
    names = [(file, mapping(beside[file], file)) for file in (TOKENIZER, SPECIAL) if file in beside]
    generation = mapping(beside.get(GENERATION, b"{}"), GENERATION)

    def said(key: str) -> list[int]:
        """The ids of one mark, what counts most first."""
        found = [_piece(held.get(key), f"{file}: {key}", piece) for file, held in names]
        ids = _ids(generation.get(f"{key}_id"), f"{GENERATION} or config.json: {key}_id", size)
        return [token for token in found if token is not None] + ids

    bos, eos = said("bos_token"), said("eos_token")
    try:
        pad = said("pad_token")
    except ConfigError:  # nothing here is padded; the files keep what they say
        pad = []
    return Marks(
        next(iter(bos), None), next(iter(eos), None), next(iter(pad), None), frozenset(eos)
    )


def mapping(content: bytes, where: Path | str) -> dict[str, Any]:
    """A JSON mapping.

    Raises:
        ConfigError: `content` is none.
    """
    try:
        held = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: cannot be read as JSON ({reason})") from None
    if not isinstance(held, dict):
        raise ConfigError(f"{where}: must be a mapping of keys; it is {type(held).__name__}")
    return held


def dumped(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")


def _bytes(path: Path) -> bytes:
    try:
        return regular.content(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _piece(value: Any, where: str, piece: Callable[[str], int | None]) -> int | None:
    """The id of a token given as text, or as a mapping with its `content`."""
    name = value.get("content") if isinstance(value, dict) else value
    if name is None and not isinstance(value, dict):
        return None
    if not isinstance(name, str):
        raise ConfigError(
            f"{where} is {shown(value)}; it must be text, a mapping with content, or null"
        )
    found = piece(name)
    if found is None:
        raise ConfigError(f"{where} is {shown(name)}, which is no piece of the tokenizer")
    return found


def _ids(value: Any, where: str, size: int) -> list[int]:
    """One id, several, or none; some old files say -1 for none."""
    if value is None:
        return []
    found = value if isinstance(value, list) else [value]
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ConfigError(
                f"{where} is {shown(value)}; it must be an id, a list of ids, or null"
            )
        if token >= size:
            raise ConfigError(f"{where} is {shown(value)}; the tokenizer's ids end at {size - 1}")
    return [token for token in found if token >= 0]


def shown(value: Any, most: int = 60) -> str:
    """A value of JSON on one line, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= most else f"{text[:most]}…"

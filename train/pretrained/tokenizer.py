"""The files from which AutoTokenizer makes the tokenizer that a model was trained with.

A SentencePiece model of ours becomes a `tokenizer.json` with the same pieces. A piece is
spelled there as the text it stands for: a space is a space, a line end a line end. Only the
spaces after a line end, which are letters of their own here, need another letter: `INDENT`,
a noncharacter that Unicode keeps out of text. Everything else comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.settings import ConfigError
from data.tokens import beside
from data.tokens import tokenizer as tokenizers
from data.tokens.tokenizer import HuggingFace, SentencePiece, Tokenizer

FILES = ("tokenizer.model", "tokenizer.json")
# Of a tokenizer_config.json what is left when its tokenizer has become another kind of file.
_CHAT = ("chat_template", "model_max_length", "padding_side", "additional_special_tokens")
INDENT = "\U0010ffff"
# A space after a line end, or after such a space: \G is where the last match ended.
_INDENTED = r"(?<=\n) |\G(?<= ) "


def write(tokenizer: Tokenizer, folder: Path, say: Callable[[str], None]) -> None:
    """Write what there is to write of `tokenizer`; a line says what cannot be."""
    copy(tokenizer, folder)
    if isinstance(tokenizer, SentencePiece):
        fast, why = _fast(tokenizer)
        if fast is None:
            say(f"AutoTokenizer has no such tokenizer ({why}); {tokenizer.file} is the tokenizer")
            return
        _dump(fast, folder / "tokenizer.json")
    elif isinstance(tokenizer, HuggingFace):
        fast = json.loads(tokenizer.model)
    else:
        say(f"{tokenizer.file} is the tokenizer; AutoTokenizer has no such")
        return
    if isinstance(tokenizer, HuggingFace) and beside.TOKENIZER in tokenizer.beside:
        return  # the settings that were made for it
    names = {token: name for name, token in fast["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in fast.get("added_tokens", [])}
    settings = beside.mapping(tokenizer.beside.get(beside.TOKENIZER, b"{}"), beside.TOKENIZER)
    chats = "chat_template" in settings or beside.TEMPLATE in tokenizer.beside
    settings = {key: settings[key] for key in _CHAT if key in settings} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names.get(tokenizer.bos_id),
        "eos_token": names.get(tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,
        # Text that spells a control piece is text, but where a template spells them.
        "split_special_tokens": not chats,
    }
    if tokenizer.pad_id is not None:
        settings["pad_token"] = names.get(tokenizer.pad_id)
    _dump(settings, folder / beside.TOKENIZER)


def copy(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer's file and those that belong to it."""
    beside.write({**tokenizer.beside, tokenizer.file: tokenizer.model}, folder)


def find(source: Path, rows: int, say: Callable[[str], None]) -> Tokenizer | None:
    """The tokenizer among a model's files; None if there is none that one can train with.

    Of two it is the SentencePiece model, from which the other was made. One that loses
    characters, or has more pieces than the model has rows, is passed over with a line.

    Raises:
        ConfigError: a file beside it is malformed.
    """
    beside.gather(source)
    for name in FILES:
        if not (source / name).exists():
            continue
        try:
            found = tokenizers.load(source / name)
        except ConfigError as error:
            say(f"passed over: {error}")
            continue
        if found.vocab_size <= rows:
            return found
        say(f"passed over: {source / name} has {found.vocab_size} ids, and the model {rows} rows")
    return None


def _fast(tokenizer: SentencePiece) -> tuple[dict[str, Any] | None, str]:
    """The content of a tokenizer.json for it; None and why not, if there can be none."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.model)
    kinds = proto.SentencePiece
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return None, "it is of SentencePiece's unigram kind"
    if any(piece.type == kinds.USER_DEFINED for piece in proto.pieces):
        return None, "it has pieces that are defined by hand"
    names = [
        _spelled(piece.piece) if piece.type == kinds.NORMAL else piece.piece
        for piece in proto.pieces
    ]
    ranks = {
        name: -piece.score
        for name, piece in zip(names, proto.pieces, strict=True)
        if piece.type == kinds.NORMAL
    }
    controls = [
        (token, names[token])
        for token, piece in enumerate(proto.pieces)
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
    ]
    bos = names[tokenizer.bos_id]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, name in controls
        ],
        "normalizer": {
            "type": "Replace",
            "pattern": {"Regex": _INDENTED},
            "content": INDENT,
        },
        "pre_tokenizer": None,
        # As every document of the training begins.
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos), {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                _special(bos),
                {"Sequence": {"id": "A", "type_id": 0}},
                _special(bos),
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": INDENT}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(
                (name for token, name in controls if token == proto.trainer_spec.unk_id), None
            ),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: token for token, name in enumerate(names)},
            "merges": _merges(ranks),
        },
    }, ""


def _merges(ranks: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, in the order in which SentencePiece merges."""
    found = [
        (rank, len(name[:cut]), name[:cut], name[cut:])
        for name, rank in ranks.items()
        for cut in range(1, len(name))
        if name[:cut] in ranks and name[cut:] in ranks
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _spelled(piece: str) -> str:
    """A piece as the text it stands for."""
    return (
        piece.replace("\u2581", " ")
        .replace(tokenizers.NEWLINE, "\n")
        .replace(tokenizers.INDENT, INDENT)
    )


def _special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _dump(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

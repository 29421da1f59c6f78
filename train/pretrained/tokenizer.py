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

from data import tokenizer as tokenizers
from data.settings import ConfigError
from data.tokenizer import HuggingFace, SentencePiece, Tokenizer

FILES = ("tokenizer.model", "tokenizer.json")
INDENT = "\U0010ffff"
# A space after a line end, or after such a space: \G is where the last match ended.
_INDENTED = r"(?<=\n) |\G(?<= ) "


def write(tokenizer: Tokenizer, folder: Path, say: Callable[[str], None]) -> None:
    """Write what there is to write of `tokenizer`; a line says what cannot be."""
    (folder / tokenizer.file).write_bytes(tokenizer.model)
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
    marks = {token["id"]: token["content"] for token in fast.get("added_tokens", [])}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": marks.get(tokenizer.bos_id),
        "eos_token": marks.get(tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,
        # Text that spells a control piece is text.
        "split_special_tokens": True,
    }
    _dump(settings, folder / "tokenizer_config.json")


def find(source: Path) -> Path | None:
    """The tokenizer among a model's files; None if there is none that one can train with.

    Of two it is the SentencePiece model, from which the other was made. One that loses
    characters is passed over.
    """
    for name in FILES:
        if (source / name).exists():
            try:
                tokenizers.load(source / name)
            except ConfigError:
                continue
            return source / name
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

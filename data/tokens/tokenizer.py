"""Text to tokens and back, with nothing lost.

SentencePiece is asked for no normalisation at all, and three of its habits are worked
around, so that decoding what was encoded gives the very text:

- It writes a space as `▁`, so a `▁` of the text itself would come back as a space. Such
  characters (RESERVED) are spelled out in byte pieces.
- It never puts a line end into a piece. Models trained here see `NEWLINE` instead, and the
  spaces after a line end as `INDENT`, which to it are letters like any other: a piece
  may then be `):`, a line end and twelve spaces, which is what source code is made of.
- Its decoder joins pieces by rules of its own. Here every piece is the bytes it stands
  for, in one table: decoding is a join, and `byte_lengths` is exact.

On the standard library's sources with 6,144 pieces, in tokens a byte: 0.299 with line
ends only, 0.278 with indents too, 0.242 with pieces that may mix letters and
punctuation, all BPE; unigram has 0.286 where BPE has 0.278 and trains 20 times longer.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data import regular
from data.settings import ConfigError
from data.tokens import beside as files
from data.tokens import pieces
from data.tokens.windows import WINDOW, WINDOW_OF_SUMS, encode_long

SPACE = "\u2581"
NEWLINE = "\ue00a"
INDENT = "\ue020"
RESERVED = re.compile("([\u2581\ue00a\ue020]+)")
# Characters that a model must have are left out of it if a text has none of them and little else.
_REQUIRED = f"a b{NEWLINE}{INDENT}"
_INDENTED = re.compile(NEWLINE + " +")
_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]")
_EOS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[EOS]", "[SEP]")
_PROBE = "\n\tif a ▁ b:  # \x00 ﬁ é e\u0301 漢字 🙂\r\n        return 1234\n"


class Tokenizer(Protocol):
    """What a tokenizer is to the other rooms."""

    vocab_size: int
    bos_id: int
    eos_id: int
    end_ids: frozenset[int]  # eos, and what else ends a text or a turn: generation stops there
    pad_id: int | None
    beside: dict[str, bytes]  # the files that belong to it, by name: see data/tokens/beside.py
    file: str  # its name inside a corpus
    model: bytes  # what that file holds

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without bos and eos."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; control pieces are nothing."""

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text each piece stands for, 0 for control pieces."""


class SentencePiece:
    """A SentencePiece model as a lossless code.

    Args:
        model: the serialised model, without normalisation.
        beside: the files that belong to it, by name.
    """

    file = "tokenizer.model"

    def __init__(self, model: bytes, beside: dict[str, bytes] | None = None) -> None:
        import sentencepiece

        if not model:
            raise ConfigError("it is empty")  # of which sentencepiece complains line by line
        self.model, self.beside = model, beside or {}
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._pieces.get_piece_size()
        marks = files.marks(self.beside, self._id, self.vocab_size)
        eos, bos = self._pieces.eos_id(), self._pieces.bos_id()
        self.eos_id: int = eos if marks.eos is None else marks.eos
        self.bos_id: int = bos if marks.bos is None else marks.bos
        if self.bos_id < 0:
            self.bos_id = self.eos_id
        self.end_ids = marks.ends | {self.eos_id} - {-1}
        self.pad_id = marks.pad
        names = [self._pieces.id_to_piece(i) for i in range(self.vocab_size)]
        self._folds = any(NEWLINE in name for name in names)
        self._bytes = [self._spelling(i, name) for i, name in enumerate(names)]
        self._lengths = np.array([len(spelling) for spelling in self._bytes], dtype=np.int64)
        self._byte_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without bos and eos."""
        tokens: list[int] = []
        for i, part in enumerate(RESERVED.split(text)):
            if i % 2:
                tokens.extend(self._byte_ids[byte] for byte in part.encode())
            elif part:
                tokens.extend(encode_long(part, self._encode, self._lengths, self._window))
        return tokens

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode(_fold(text) if self._folds else text)
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bytes that are no whole character become U+FFFD."""
        return _text(self._bytes, tokens)

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text each piece stands for, 0 for control pieces."""
        return self._lengths.copy()

    @cached_property
    def _window(self) -> int:
        kind = _proto(self.model).trainer_spec
        return WINDOW_OF_SUMS if kind.model_type == kind.UNIGRAM else WINDOW

    def _id(self, name: str) -> int | None:
        token: int = self._pieces.piece_to_id(name)  # that of <unk> for a name that it has not
        return token if self._pieces.id_to_piece(token) == name else None

    def _spelling(self, token: int, piece: str) -> bytes:
        if self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return b""
        if self._pieces.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        piece = piece.replace(SPACE, " ")
        if self._folds:
            piece = piece.replace(INDENT, " ").replace(NEWLINE, "\n")
        return piece.encode()


class HuggingFace:
    """A `tokenizer.json` of the tokenizers library.

    Args:
        model: the file's content.
        beside: the files that belong to it, by name.
        settings: what of the content to go by, if not by all of it.
    """

    file = "tokenizer.json"

    def __init__(
        self,
        model: bytes,
        beside: dict[str, bytes] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError:
            raise ConfigError(
                "data.tokenizer is a tokenizer.json; reading it needs `pip install tokenizers`"
            ) from None
        self.model, self.beside = model, beside or {}
        content = json.loads(model) if settings is None else settings
        self._loaded = Loaded.from_str(json.dumps(content))
        self._loaded.no_truncation()
        self._loaded.no_padding()
        # Text that spells a control piece is text.
        self._loaded.encode_special_tokens = True
        named = self._mark()
        added = self._loaded.get_added_tokens_decoder()
        controls = {token for token, held in added.items() if held.special} | named
        unknown = content["model"].get("unk_token")
        if isinstance(unknown, str) and (token := self._loaded.token_to_id(unknown)) is not None:
            controls.add(token)
        self._bytes = pieces.spellings(self._loaded, content, controls)
        self._lengths = np.array([len(spelling) for spelling in self._bytes], dtype=np.int64)
        self.vocab_size = len(self._bytes)  # an id may be missing below the highest
        self._reserved = pieces.reserved(content)
        found = [self._loaded.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte_ids = [token for token in found if token is not None]
        if len(self._byte_ids) < 256:
            self._reserved = None

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without bos and eos."""
        tokens: list[int] = []
        for i, part in enumerate(self._reserved.split(text) if self._reserved else [text]):
            if i % 2:
                tokens.extend(self._byte_ids[byte] for byte in part.encode())
            elif part:
                tokens.extend(encode_long(part, self._encode, self._lengths))
        return tokens

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._loaded.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bytes that are no whole character become U+FFFD."""
        return _text(self._bytes, tokens)

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text each piece stands for, 0 for control pieces."""
        return self._lengths.copy()

    def _mark(self) -> set[int]:
        """Set what marks a text, as the files beside say it; the pieces of bos and eos.

        Where they say nothing names tell: of special pieces first, of ordinary ones last.
        """
        added = self._loaded.get_added_tokens_decoder()
        ids = self._loaded.get_vocab(with_added_tokens=True)
        special = {held.content: token for token, held in added.items() if held.special}
        by_hand = {held.content: token for token, held in added.items()}
        marks = files.marks(self.beside, ids.get, max(ids.values(), default=-1) + 1)
        bos, eos = marks.bos, marks.eos
        for pool in (special, by_hand, ids):
            if pool is ids and (bos is not None or eos is not None):
                break
            bos = _first(_BOS, pool) if bos is None else bos
            eos = _first(_EOS, pool) if eos is None else eos
        found = [token for token in (bos, eos) if token is not None]
        self.bos_id, self.eos_id = (found[0], found[-1]) if found else (-1, -1)
        self.end_ids = marks.ends | {self.eos_id} - {-1}
        self.pad_id = marks.pad
        return set(found)


def _first(names: Iterable[str], pool: dict[str, int]) -> int | None:
    return next((pool[name] for name in names if name in pool), None)


def _text(spellings: list[bytes], tokens: Iterable[int]) -> str:
    """Ids as text. A model may have more rows than there are pieces: those are nothing."""
    count = len(spellings)
    joined = b"".join([spellings[token] for token in tokens if token < count])
    return joined.decode("utf-8", "replace")


def load(path: Path) -> Tokenizer:
    """The tokenizer in a .model or .json file, with what the files beside it say.

    Raises:
        ConfigError: if it cannot be read, marks no end of text, loses characters, or a file
            beside it is malformed.
    """
    beside = files.gather(path.parent)
    try:
        made = parse(regular.content(path), path.name, beside)
    except ConfigError as error:
        raise ConfigError(f"data.tokenizer is {path}; {error}") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [repr(error)])[0]
        raise ConfigError(f"data.tokenizer is {path}; it cannot be read ({reason})") from None
    if made.eos_id < 0:
        raise ConfigError(f"data.tokenizer is {path}; it has no piece for the end of a text")
    if (back := made.decode(made.encode(_PROBE))) != _PROBE:
        raise ConfigError(
            f"data.tokenizer is {path}; it does not give text back as it was ({_PROBE!r} becomes "
            f"{back!r}): it must keep spaces and line ends and fall back to bytes"
        )
    return made


def parse(model: bytes, name: str, beside: dict[str, bytes] | None = None) -> Tokenizer:
    """The tokenizer that a file of this name holds, for text as it is.

    What one was trained to do to text first is switched off if it loses some.

    Args:
        beside: the files that belong to it.
    """
    json_like = name.endswith(".json")
    made = HuggingFace(model, beside) if json_like else SentencePiece(model, beside)
    if made.decode(made.encode(_PROBE)) == _PROBE:
        return made
    if json_like:  # the file itself stays: what is exported is what was imported
        return HuggingFace(model, beside, pieces.plain(json.loads(model)))
    return SentencePiece(_plain(model), beside)


def _plain(model: bytes) -> bytes:
    """A SentencePiece model without normalisation."""
    proto = _proto(model)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.precompiled_charsmap = b""
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString())


def _proto(model: bytes) -> Any:
    """A SentencePiece model as a message whose fields can be read and set."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    return proto


def train(texts: Iterable[str], vocab_size: int, model_type: str = "bpe") -> SentencePiece:
    """Train a SentencePiece model with byte fallback on `texts`, which may be of any kind.

    Raises:
        ConfigError: so many pieces are too few for the texts, or too many.
    """
    # A list: what is raised in the texts, an interrupt for instance, would not come out of
    # SentencePiece as it was.
    sentences = list(_sentences(texts))
    try:
        made = _trained(sentences, vocab_size, model_type)
    except RuntimeError:  # of a text without any letter that it knows
        made = None
    if made is None or made.decode(made.encode(_PROBE)) != _PROBE:
        try:
            made = _trained([*sentences, _REQUIRED], vocab_size, model_type)
        except RuntimeError as error:
            raise _why(error, vocab_size) from None
    return made


def _trained(sentences: list[str], vocab_size: int, model_type: str) -> SentencePiece:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        split_by_unicode_script=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=0.9999,
        required_chars=SPACE + NEWLINE + INDENT,  # in bytes, they would not be what they stand for
        max_sentence_length=1 << 20,
        hard_vocab_limit=False,
        num_threads=1,  # with more, sums and so the model depend on their number
        minloglevel=2,
    )
    return SentencePiece(model.getvalue())


def _why(error: RuntimeError, vocab_size: int) -> ConfigError:
    reason = str(error).splitlines()[-1]
    if letters := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return ConfigError(
            f"data.vocab_size is {vocab_size}; the text's letters alone are {letters[1]} pieces: "
            "raise it to twice that or more"
        )
    return ConfigError(
        f"data.vocab_size is {vocab_size}; SentencePiece cannot train so many pieces on this "
        f"text, lower it ({reason[:200]})"
    )


def _fold(text: str) -> str:
    """`text` with line ends and the spaces after them as letters of their own."""
    text = text.replace("\n", NEWLINE)
    return _INDENTED.sub(lambda run: NEWLINE + INDENT * (len(run[0]) - 1), text)


def _segments(text: str, size: int) -> Iterator[str]:
    """`text` in parts of about `size` characters, cut before a line end where there is one."""
    start = 0
    while len(text) - start > size:
        line_end = text.rfind("\n", start + size // 2, start + size)
        end = line_end if line_end > 0 else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """What SentencePiece learns from: short parts, so that one long text is many samples."""
    for text in texts:
        for segment in _segments(text, 2048):
            yield from (_fold(part) for part in RESERVED.split(segment)[::2] if part)

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
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from data.settings import ConfigError

NEWLINE = "\ue00a"
INDENT = "\ue020"
RESERVED = re.compile("([\u2581\ue00a\ue020]+)")
_INDENTED = re.compile(NEWLINE + " +")
# Characters given to SentencePiece at once: its time grows faster than the text. Against whole
# files this is a fifth faster and costs 0.1 % more tokens.
_SEGMENT = 1 << 12
_PROBE = "\n\tif a ▁ b:  # \x00 ﬁ é 漢字 🙂\r\n        return 1234\n"


class Tokenizer(Protocol):
    """What a tokenizer is to the other rooms."""

    vocab_size: int
    bos_id: int
    eos_id: int
    end_ids: frozenset[int]  # eos, and what else ends a text or a turn: generation stops there
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
    """

    file = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._pieces.get_piece_size()
        self.eos_id: int = self._pieces.eos_id()
        self.bos_id: int = self._pieces.bos_id() if self._pieces.bos_id() >= 0 else self.eos_id
        self.end_ids = frozenset({self.eos_id} - {-1})
        names = [self._pieces.id_to_piece(i) for i in range(self.vocab_size)]
        self._folds = any(NEWLINE in name for name in names)
        self._bytes = [self._spelling(i, name) for i, name in enumerate(names)]
        self._byte_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without bos and eos."""
        tokens: list[int] = []
        for segment in _segments(text, _SEGMENT):
            for i, part in enumerate(RESERVED.split(segment)):
                if i % 2:
                    tokens.extend(self._byte_ids[byte] for byte in part.encode())
                elif part:
                    tokens.extend(self._pieces.encode(_fold(part) if self._folds else part))
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bytes that are no whole character become U+FFFD."""
        return b"".join([self._bytes[token] for token in tokens]).decode("utf-8", "replace")

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text each piece stands for, 0 for control pieces."""
        return np.array([len(spelling) for spelling in self._bytes], dtype=np.int64)

    def _spelling(self, token: int, piece: str) -> bytes:
        if self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return b""
        if self._pieces.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        piece = piece.replace("\u2581", " ")
        if self._folds:
            piece = piece.replace(INDENT, " ").replace(NEWLINE, "\n")
        return piece.encode()


class HuggingFace:
    """A `tokenizer.json` of the tokenizers library.

    Args:
        model: the file's content.
    """

    file = "tokenizer.json"

    def __init__(self, model: bytes) -> None:
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError:
            raise ConfigError(
                "data.tokenizer is a tokenizer.json; reading it needs `pip install tokenizers`"
            ) from None
        self.model = model
        self._loaded = Loaded.from_str(model.decode("utf-8"))
        self._loaded.no_truncation()
        self._loaded.no_padding()
        # Text that spells a control piece is text.
        self._loaded.encode_special_tokens = True
        self.vocab_size: int = self._loaded.get_vocab_size()
        self.bos_id = self._first_of("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "[CLS]")
        self.eos_id = self._first_of("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]")
        if self.eos_id < 0:
            self.eos_id = self.bos_id
        if self.bos_id < 0:
            self.bos_id = self.eos_id
        self.end_ids = frozenset({self.eos_id} - {-1})
        self._controls = {
            i for i, token in self._loaded.get_added_tokens_decoder().items() if token.special
        }

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without bos and eos."""
        return [
            token
            for segment in _segments(text, _SEGMENT)
            for token in self._loaded.encode(segment, add_special_tokens=False).ids
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; control pieces are nothing."""
        return self._loaded.decode(list(tokens), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text each piece stands for, 0 for control pieces."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        # Beside a letter, so that a leading space is not stripped and half a character is seen.
        beside = self._loaded.encode("a", add_special_tokens=False).ids
        for token in range(self.vocab_size):
            name = self._loaded.id_to_token(token)
            if name is None or token in self._controls:
                continue
            text = self._loaded.decode([*beside, token], skip_special_tokens=False)
            if "\ufffd" in text:  # a byte-level piece; each letter of its name is a byte
                lengths[token] = len(name)
            else:
                lengths[token] = len(text.encode()) - 1
        return lengths

    def _first_of(self, *names: str) -> int:
        found = [self._loaded.token_to_id(name) for name in names]
        return next((token for token in found if token is not None), -1)


def load(path: Path) -> Tokenizer:
    """The tokenizer in a .model or .json file; a .model's normalisation is switched off.

    Raises:
        ConfigError: if it cannot be read, marks no end of text, or loses characters.
    """
    try:
        made = parse(path.read_bytes(), path.name)
    except ConfigError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(f"data.tokenizer is {path}; it cannot be read ({reason})") from None
    if made.eos_id < 0:
        raise ConfigError(f"data.tokenizer is {path}; it has no piece for the end of a text")
    if (back := made.decode(made.encode(_PROBE))) != _PROBE:
        raise ConfigError(
            f"data.tokenizer is {path}; it does not give text back as it was ({_PROBE!r} becomes "
            f"{back!r}): it must keep spaces and line ends and fall back to bytes"
        )
    return made


def parse(model: bytes, name: str) -> Tokenizer:
    """The tokenizer that a file of this name holds."""
    return HuggingFace(model) if name.endswith(".json") else _plain(model)


def _plain(model: bytes) -> SentencePiece:
    """A SentencePiece model that takes text as it is, whatever it was trained to do first."""
    made = SentencePiece(model)
    if made.decode(made.encode(_PROBE)) == _PROBE:
        return made
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.precompiled_charsmap = b""
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return SentencePiece(proto.SerializeToString())


def train(texts: Iterable[str], vocab_size: int, model_type: str = "bpe") -> SentencePiece:
    """Train a SentencePiece model with byte fallback on `texts`.

    Raises:
        ConfigError: if the texts are too few for so many pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    faults: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_until_fault(_sentences(texts), faults),
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
            required_chars=NEWLINE + INDENT,  # in bytes, they would not be what they stand for
            max_sentence_length=1 << 20,
            hard_vocab_limit=False,
            num_threads=1,  # with more, sums and so the model depend on their number
            minloglevel=2,
        )
    except RuntimeError as error:
        if not faults:
            reason = str(error).splitlines()[-1][:200]
            raise ConfigError(
                f"data.vocab_size is {vocab_size}; SentencePiece cannot train so many pieces on "
                f"this text, lower it ({reason})"
            ) from None
    if faults:
        raise faults[0]
    return SentencePiece(model.getvalue())


def _until_fault(texts: Iterator[str], faults: list[BaseException]) -> Iterator[str]:
    """`texts` up to what is raised in them, an interrupt for instance, which is put aside.

    Raised through SentencePiece it would be printed, and come out as another error or not at all.
    """
    try:
        yield from texts
    except BaseException as fault:
        faults.append(fault)


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

"""Text to tokens and back, with nothing lost.

SentencePiece is asked for no normalisation at all, and three of its habits are worked
around, so that decoding what was encoded gives the very text:

- It writes a space as `▁`, so a `▁` of the text itself would come back as a space. Such
  characters (RESERVED) are spelled out in byte pieces.
- It never puts a line end into a piece. Here it sees `NEWLINE` instead, and the
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

import numpy as np

NEWLINE = "\ue00a"
INDENT = "\ue020"
RESERVED = re.compile("([\u2581\ue00a\ue020]+)")
_INDENTED = re.compile(NEWLINE + " +")
_SEGMENT = 1 << 18  # characters given to SentencePiece at once, which bounds its memory


class Tokenizer:
    """A SentencePiece model as a lossless code.

    Args:
        model: the serialised model.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._pieces.get_piece_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self._bytes = [self._spelling(i) for i in range(self.vocab_size)]
        self._byte_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]

    def encode(self, text: str) -> list[int]:
        """The pieces of `text`, without bos and eos."""
        tokens: list[int] = []
        for segment in _segments(text):
            for i, part in enumerate(RESERVED.split(segment)):
                if i % 2:
                    tokens.extend(self._byte_ids[byte] for byte in part.encode())
                elif part:
                    tokens.extend(self._pieces.encode(_fold(part)))
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; bytes that are no whole character become U+FFFD."""
        return b"".join([self._bytes[token] for token in tokens]).decode("utf-8", "replace")

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text each piece stands for, 0 for control pieces."""
        return np.array([len(spelling) for spelling in self._bytes], dtype=np.int64)

    def _spelling(self, token: int) -> bytes:
        if self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return b""
        piece: str = self._pieces.id_to_piece(token)
        if self._pieces.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        spaced = piece.replace("\u2581", " ").replace(INDENT, " ")
        return spaced.replace(NEWLINE, "\n").encode()


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a BPE model with byte fallback on `texts`, held in memory."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        split_by_unicode_script=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=0.9999,
        max_sentence_length=1 << 20,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def _fold(text: str) -> str:
    """`text` with line ends and the spaces after them as letters of their own."""
    text = text.replace("\n", NEWLINE)
    return _INDENTED.sub(lambda run: NEWLINE + INDENT * (len(run[0]) - 1), text)


def _segments(text: str, size: int = _SEGMENT) -> Iterator[str]:
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

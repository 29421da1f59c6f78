"""Text from tokens as they come, in pieces that end with whole characters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from data.tokens.tokenizer import Tokenizer

_NO_CHARACTER = "\ufffd"
_CONTEXT = 16  # tokens of what comes before


def spell(tokenizer: Tokenizer, before: Iterable[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, piece by piece.

    A piece is given when nothing that follows can change it: not while it ends inside a character.

    Args:
        before: tokens of whole characters that come before, of which some decoders need the last.
        tokens: any iterable; each is taken when the text before it has been given.

    Yields:
        Text, never empty. Joined, it is what `decode` gives for `before` and all tokens, less
        what it gives for `before`.
    """
    # Decoding what was given last once more shows what a decoder does between that and the next.
    given, fresh = list(before)[-_CONTEXT:], list[int]()
    text = ""
    for token in tokens:
        fresh.append(token)
        seen, text = text, _after(tokenizer, given, fresh)
        # A token that shows nothing, as control pieces do, ends no character.
        if text == seen or text.endswith(_NO_CHARACTER):
            continue
        yield text
        given, fresh, text = fresh, [], ""
    if text := _after(tokenizer, given, fresh):
        yield text


def _after(tokenizer: Tokenizer, given: list[int], fresh: list[int]) -> str:
    return tokenizer.decode([*given, *fresh])[len(tokenizer.decode(given)) :]

"""Strings that end a completion, found as its tokens come.

    ids     [The][ end][.][⏎⏎][Qu][estion]
    text     The  end  .  ⏎⏎  Qu  estion
                          └ stop "⏎⏎Q": the text ends here, the ids end with [Qu]

A string may begin and end inside tokens, and a character may be spread over several.
"""

from collections.abc import Sequence

from realjax.data.tokenizer import Tokenizer

UNKNOWN = "\ufffd"
"""Stands in a text for bytes that are no character, or the beginning of one."""

_MARGIN = 8
"""Tokens that a tail has at least, beyond one for each character it must hold."""
_LONGEST_CHARACTER = 4
"""Tokens of a character at most: its bytes."""


class StopFinder:
    """Looks for stop strings in one completion, some tokens at a time.

    Each look decodes a tail of the ids that holds as much text as a string can begin
    before the new tokens. The tail begins where decoding it gives the end of the whole
    text, so that no character is torn; it grows only while bytes make no text.

    Args:
        tokenizer: of the ids.
        stops: strings as `check_stops` accepts them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        """Begins without tokens."""
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        # One character at least: decoders drop the space that a text begins with.
        self._num_before = max(max(map(len, stops)) - 1, 1)
        self._longest_tail = self._usual = 2 * (self._num_before + _MARGIN)
        self._ids: list[int] = []
        self._first = 0

    def add(self, ids: Sequence[int]) -> int | None:
        """Take the next tokens.

        Returns:
            With how many tokens in all the first stop string is complete; None where
            there is none yet.
        """
        num_seen = len(self._ids)
        self._ids += ids
        text = self._tail(len(self._ids))
        # What is a character now has been a part of it, or whole, at every token.
        if UNKNOWN in text or self._holds(text):
            for length in range(num_seen + 1, len(self._ids) + 1):
                if self._holds(self._tail(length)):
                    return length
        self._shorten(text)
        return None

    def _tail(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._first : end])

    def _holds(self, text: str) -> bool:
        return any(stop in text for stop in self._stops)

    def _shorten(self, text: str) -> None:
        """Let the tail, whose text this is, begin later, where it has become long."""
        size = len(self._ids) - self._first
        if size <= self._longest_tail or text.endswith(UNKNOWN):
            return
        middle = self._first + size // 2
        for first in range(middle, middle - _LONGEST_CHARACTER, -1):
            rest = self._tokenizer.decode(self._ids[first:])
            if len(rest) >= self._num_before and text.endswith(rest):
                self._first, self._longest_tail = first, self._usual
                return
        self._longest_tail *= 2  # Of tokens without text, say.


def text_before(text: str, stops: Sequence[str]) -> str:
    """Return what stands before the first of the stop strings; all, where none is."""
    places = [text.find(stop) for stop in stops]
    return text[: min((p for p in places if p >= 0), default=len(text))]


def check_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> None:
    """Refuse strings that no completion can hold.

    Raises:
        TypeError: one is no string.
        ValueError: one is empty, or has a character that no token has a part of.
    """
    for stop in stops:
        if not isinstance(stop, str):
            raise TypeError(f"stop holds {stop!r}, which is no string.")
        if not stop:
            raise ValueError(
                "stop holds an empty string, which every text holds. Leave it out."
            )
        for character in stop:
            if character == UNKNOWN or not _can_come(tokenizer, character):
                raise ValueError(
                    f"The stop string {stop!r} cannot occur: no token of the model's "
                    f"vocabulary gives {character!r}. Leave it out."
                )


def special_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the special token that is written so, if there is one.

    A text of a completion leaves special tokens out, so no search would find it there.
    """
    ids = tokenizer.encode(text)
    if len(ids) != 1 or tokenizer.decode(ids):
        return None
    is_written_so = tokenizer.decode(ids, skip_special_tokens=False) == text
    return ids[0] if is_written_so else None


def _can_come(tokenizer: Tokenizer, character: str) -> bool:
    """Whether a text may hold a character; True where that is not certain."""
    # Three times: decoders drop a space that a text begins with.
    if character in tokenizer.decode(tokenizer.encode(3 * character)):
        return True
    # A normalizer may have changed it, but tokens may have it all the same.
    every = (tokenizer.decode([i] * 3) for i in range(tokenizer.vocab_size))
    characters = set().union(*every)
    return character in characters or (
        UNKNOWN in characters and not character.isascii()
    )

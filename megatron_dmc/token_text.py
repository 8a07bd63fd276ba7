"""What single tokens stand for in a text, and a prompt's tokens, with any of Megatron's tokenizers."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from megatron_dmc.config import DMCError

END = "end of document"
SPECIAL = "special token"
PART = "part of a character"
NAMED = {"\n": "newline", "\t": "tab", "\r": "carriage return"}
UNFINISHED = "\ufffd"
"""What tokenizers make of bytes that are no whole character. A text's own U+FFFD cannot be told from it."""


def beginning(tokenizer: Any) -> int | None:
    """The token that begins a text (BOS), where a tokenizer of Megatron's has one."""
    token = getattr(tokenizer, "bos", None)
    return token if isinstance(token, int) and token >= 0 else None  # SentencePiece says -1 where there is none


def tokenize_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that a model is to continue.

    It begins as the tokenizer begins every document, in training as well; but not twice where the text, as that of a
    chat template, spells the beginning out.
    """
    tokens, first = list(tokenizer.tokenize(text)), beginning(tokenizer)
    return tokens[1:] if first is not None and tokens[:2] == [first, first] else tokens


class TokenText:
    """The text of tokens of one tokenizer.

    Args:
        tokenizer: Megatron's, as `LoadedModel` has it. Only its `detokenize` is asked: how a token's own string is to
            be read differs from one library to the next.

    Raises:
        DMCError: for a tokenizer that makes no text of tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        from megatron.core.utils import accepts_parameter

        if str(getattr(tokenizer, "library", "")).startswith("null"):
            raise DMCError("tokens of NullTokenizer are numbers without text")
        self._detokenizes = tokenizer.detokenize
        can_skip = accepts_parameter(tokenizer.detokenize, "skip_special_tokens")
        self._without_special = dict(skip_special_tokens=True) if can_skip else {}
        self._end, self._size = getattr(tokenizer, "eod", None), tokenizer.vocab_size
        self._before = self._letter()

    def _detokenize(self, tokens: list[int], **options: bool) -> str:
        try:
            return self._detokenizes(tokens, **options)
        except Exception as error:  # of whichever library the tokenizer is
            raise DMCError(f"the tokenizer makes no text of tokens {tokens}: {error!r}") from error

    def _letter(self) -> list[int]:
        """A token of one letter, to stand before others: some tokenizers drop the space that begins a text."""
        for token in range(self._size):
            text = self._detokenize([token])
            if len(text) == 1 and "a" <= text.lower() <= "z" and self._detokenize([token, token]) == 2 * text:
                return [token]
        return []

    def text(self, tokens: list[int]) -> str:
        """Of tokens that follow one another within a text, spaces in front included; "" of special tokens.

        Raises:
            DMCError: where the tokenizer fails.
        """
        known = [token for token in tokens if 0 <= token < self._size]  # the model's vocabulary may be padded
        if not known:
            return ""
        return self._detokenize(self._before + known, **self._without_special)[len(self._before) :]

    def last_character(self, token: int) -> str:
        """The name of the last character of a token's text.

        A letter (of any script, with its marks) is `letter`, a decimal digit `digit`, any other character stands in
        quotes as Python writes it, whitespace with its name. Others are `END`, `SPECIAL`, and `PART` for a token
        that ends with some, but not all bytes of a character, or with bytes that complete one.
        """
        if token == self._end:
            return END
        text = self.text([token])
        if not text:
            return SPECIAL
        last = text[-1]
        if last == UNFINISHED:
            return PART
        if last.isdecimal():
            return "digit"
        if unicodedata.category(last)[0] in "LM":
            return "letter"
        if last.isspace():
            return f"{NAMED.get(last) or unicodedata.name(last, 'whitespace').lower()} {last!r}"
        return repr(last)

    def pieces(self, tokens: Iterable[int]) -> list[str | None]:
        """The text that each of the tokens adds to that of those before; together it is the whole text.

        A token that only begins a character or goes on with one adds what is whole so far, and the character is added
        by the token that completes it. `None` stands for the end of a document; special tokens have their own spelling.
        """
        found: list[str | None] = []
        begun: list[int] = []
        shown = ""
        for token in tokens:
            if token == self._end or not self.text([token]):
                found.append(None if token == self._end else self._spelling(token))
                begun, shown = [], ""
                continue
            begun.append(token)
            text = self.text(begun)
            whole = text.rstrip(UNFINISHED)
            if whole == text:
                found.append(text[len(shown) :])
                begun, shown = [], ""
            else:
                found.append(whole[len(shown) :])
                shown = whole
        return found

    def _spelling(self, token: int) -> str:
        return (self._detokenize([token]) if 0 <= token < self._size else "") or f"<{token}>"

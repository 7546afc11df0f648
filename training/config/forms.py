"""Error messages for recipe options that accept several forms: one sentence for all forms.

A stage's `lr`, for example, is a number, "find", a list or a table. For a wrong value, pydantic
reports one error per form; `accepts` replaces them by one sentence that lists the forms.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator


def accepts(forms: str, *words: str) -> WrapValidator:
    """Return an annotation that replaces pydantic's errors for an option by one error message.

    Args:
        forms: The error message, such as "use a number or 'auto'".
        words: The words that the option accepts. For a misspelled word, the nearest one is
            suggested.
    """

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(forms + did_you_mean(value, words)) from None

    return WrapValidator(check)


def did_you_mean(value: Any, words: Sequence[str]) -> str:
    """Return `; did you mean 'WORD'?` with the word nearest to `value`; "" if no word is near."""
    near = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""

"""Options that accept several forms: one error sentence instead of one for each form.

A stage's `lr`, for example, is a number, "find", a list or a table. Pydantic reports why each form
of such a union failed; `accepts` replaces that by a sentence that lists the forms.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator


def accepts(forms: str, *words: str) -> WrapValidator:
    """An annotation for an option of several forms.

    Args:
        forms: The error message, such as "use a number or 'auto'".
        words: The words that the option accepts; the nearest one is suggested for a misspelled one.
    """

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(forms + did_you_mean(value, words)) from None

    return WrapValidator(check)


def did_you_mean(value: Any, words: Sequence[str]) -> str:
    """`; did you mean 'WORD'?` with the word nearest to `value`, or nothing."""
    near = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""

import math

import pytest

from training.config.formula import LONGEST, compile_formula


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5 * (1 + sin(x * pi / 2))", lambda x: 0.5 * (1 + math.sin(x * math.pi / 2))),
        ("1 / (5 ** (x * 0.0001))", lambda x: 1 / (5 ** (x * 0.0001))),
        ("-x ** 2 + +x", lambda x: -(x**2) + x),
        ("max(0, 1 - x / 10, min(x, 0.2))", lambda x: max(0, 1 - x / 10, min(x, 0.2))),
        ("exp(-x) + log(1 + x) - abs(cos(x)) * sqrt(x)",
         lambda x: math.exp(-x) + math.log(1 + x) - abs(math.cos(x)) * math.sqrt(x)),
        (" 2 ** 3 ** 0.5 ", lambda x: 2 ** 3**0.5),
        ("1_000e-3 - 0x10", lambda x: -15.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("x", [0, 1, 2.5, 300])
def test_values_equal_pythons(text, expected, x):
    assert compile_formula(text)(x) == pytest.approx(expected(x), rel=1e-14)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "y", "x.real", "x[0]", "[x]", "'a'", "1j", "True", "None", "lambda: 1", "x = 1",
        "1; 2", "x if x else 1", "x < 1", "x and 1", "x // 2", "x % 2", "~x", "not x", "(x := 1)",
        "__import__('os')", "().__class__", "sin", "sin()", "sin(x, x)", "min(x)", "max(*x, x)",
        "log(x, base=2)", "eval('1')", "open(1)", "sin.__call__(x)", "f'{x}'", "\0",
        "(" * 60 + "x",
    ],
)  # fmt: skip
def test_other_syntax_is_refused_with_a_list_of_what_is_allowed(text):
    with pytest.raises(ValueError, match="use numbers, x, pi"):
        compile_formula(text)


@pytest.mark.parametrize("text", ["9 ** 9 ** 9 ** 9", "log(x)", "1 / x", "(x - 1) ** 0.5", "1e999"])
def test_values_that_are_not_finite_are_an_error(text):
    with pytest.raises(ValueError, match="no finite value at x = 0"):
        compile_formula(text)(0)


def test_a_long_text_is_refused_before_parsing():
    with pytest.raises(ValueError, match=f"at most {LONGEST}"):
        compile_formula("-" * LONGEST + "x")
    assert compile_formula("-" * (LONGEST - 2) + "x")(3) == 3

"""Query strings and multipart bodies: what is read, and the text of every refusal."""

from __future__ import annotations

import pytest

from serving.errors import EmptyBody, OptionError, RequestError
from serving.http import forms
from serving.http.forms import PredictOptions

FORM = b"multipart/form-data; boundary=XX"


def part(name: bytes | None, data: bytes, headers: bytes = b"") -> bytes:
    disposition = b"" if name is None else b'Content-Disposition: form-data; name="%s"\r\n' % name
    return b"--XX\r\n" + disposition + headers + b"\r\n" + data + b"\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--XX--\r\n"


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], PredictOptions(tta=0, top_k=None)),
        ([("tta", "4")], PredictOptions(tta=4)),
        ([("top_k", "3"), ("tta", "0")], PredictOptions(tta=0, top_k=3)),
        ([("tta", "-1"), ("top_k", "999999999")], PredictOptions(tta=-1, top_k=999_999_999)),
    ],
)
def test_options_are_read(pairs: list[tuple[str, str]], expected: PredictOptions) -> None:
    assert forms.options(pairs) == expected


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("ttas", "1")], "unknown option 'ttas': use tta and top_k"),
        ([("x" * 41, "1")], f"unknown option '{'x' * 40}': use tta and top_k"),
        ([("", "")], "unknown option '': use tta and top_k"),
        ([("tta", "1"), ("tta", "1")], "tta is given twice; give it once"),
        ([("tta", "")], "tta = '': use a whole number"),
        ([("top_k", "1.5")], "top_k = '1.5': use a whole number"),
        ([("top_k", "1000000000")], "top_k = '1000000000': use a whole number"),
        ([("top_k", "--1")], "top_k = '--1': use a whole number"),
        ([("tta", "\u0661")], "tta = '\u0661': use a whole number"),
        ([("tta", "1\n")], "tta = '1\\n': use a whole number"),
        ([("tta", "y" * 41)], f"tta = '{'y' * 40}': use a whole number"),
    ],
)
def test_other_options_are_refused(pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(OptionError) as refused:
        forms.options(pairs)
    assert str(refused.value) == message


def test_a_query_string_is_split_into_at_most_eight_pairs() -> None:
    assert forms.query(b"") == []
    assert forms.query(b"tta=4&top_k=&x=a%20b+c") == [("tta", "4"), ("top_k", ""), ("x", "a b c")]
    assert forms.query(b"\xe4=%31") == [("\xe4", "1")]
    assert forms.query(b"&".join([b"tta=1"] * 8)) == [("tta", "1")] * 8
    with pytest.raises(OptionError, match=r"^too many options: use tta and top_k$"):
        forms.query(b"&".join([b"tta=1"] * 9))


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"multipart/form-data", True),
        (b"Multipart/FORM-Data; boundary=b", True),
        (b"multipart/form-dat", False),
        (b"multipart/mixed; boundary=b", False),
        (b"x-multipart/form-data", False),
        (b"", False),
    ],
)
def test_multipart_is_recognised_in_any_case(content_type: bytes, expected: bool) -> None:
    assert forms.is_multipart(content_type) is expected


def test_a_form_is_read_in_order() -> None:
    form = forms.parse(
        body(
            part(b"tta", b"4"),
            part(b"image", b"one", b"Content-Type: image/png\r\nContent-Length: 1\r\n"),
            part(b"\xe4", b"\xff"),
            part(b"image", b""),
            part(b"image", b"\r\n--X\r\n-\r\n--X"),
            part(b"top_k", b"7" * 50),
        ),
        FORM,
    )
    assert form.images == (b"one", b"", b"\r\n--X\r\n-\r\n--X")
    assert form.pairs == (("tta", "4"), ("\xe4", "\xff"), ("top_k", "7" * 41))


def test_the_name_of_a_part_comes_from_its_own_content_disposition() -> None:
    lower = b"--XX\r\nX: y\r\ncontent-disposition: form-data; name=image\r\n\r\ni\r\n"
    twice = b'--XX\r\nContent-Disposition: a; name="tta"\r\nContent-Type: b; name="c"\r\n\r\n1\r\n'
    form = forms.parse(body(part(b"tta", b"0"), part(None, b"n"), lower, twice), FORM)
    assert form == forms.Form((b"i",), (("tta", "0"), ("", "n"), ("tta", "1")))


def test_at_most_64_parts_are_read() -> None:
    assert len(forms.parse(body(*[part(b"image", b"i")] * 64), FORM).images) == 64
    with pytest.raises(RequestError, match=r"^more than 64 parts in one request; send fewer$"):
        forms.parse(body(*[part(b"image", b"i")] * 65), FORM)


@pytest.mark.parametrize(
    ("data", "content_type", "kind", "message"),
    [
        (b"", b"multipart/form-data", RequestError, "multipart/form-data without a boundary"),
        (b"", FORM[:-2], RequestError, "multipart/form-data without a boundary"),
        (b"nonsense", FORM, RequestError, "the multipart body is not well formed"),
        (
            body(b"--XX\r\nA b: c\r\n\r\n"),
            FORM,
            RequestError,
            "the multipart body is not well formed",
        ),
        (b"", FORM[:-2] + b"B" * 300, RequestError, "the multipart body is not well formed"),
        (
            part(b"image", b"i") + b"--XX",
            FORM,
            RequestError,
            "the multipart body breaks off before its last boundary",
        ),
        (
            body(part(b"tta", b"1"), part(b"Image", b"i")),
            FORM,
            EmptyBody,
            "no image: send it as the multipart field `image`",
        ),
    ],
)
def test_other_bodies_are_refused(
    data: bytes, content_type: bytes, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as refused:
        forms.parse(data, content_type)
    assert type(refused.value) is kind
    assert str(refused.value) == message

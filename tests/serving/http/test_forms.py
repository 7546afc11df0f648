"""Query strings and multipart bodies: what is read, and the text of every refusal."""

from __future__ import annotations

import pytest

from serving.errors import EmptyBody, OptionError, RequestError
from serving.http import forms
from serving.http.forms import PredictOptions

FORM = b"multipart/form-data; boundary=XX"
NO_BOUNDARY = "the multipart body has no boundary as its Content-Type states it"
NO_PARAMETER = (
    "multipart/form-data without a boundary; leave the header Content-Type to the client, which "
    "states it"
)


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
        (b"", b"multipart/form-data", RequestError, NO_PARAMETER),
        (b"", FORM[:-2], RequestError, NO_PARAMETER),
        (b"nonsense", FORM, RequestError, NO_BOUNDARY),
        (b"--YY\r\n\r\n\r\n--YY--", FORM, RequestError, NO_BOUNDARY),
        (b"--XXX\r\n\r\n\r\n--XXX--", FORM, RequestError, "the multipart body is not well formed"),
        (
            body(part(b"image", b"i")).replace(b"\r\n", b"\n"),
            FORM,
            RequestError,
            "the lines of the multipart body end in LF, and must end in CR LF (RFC 2046)",
        ),
        *(
            (cut, FORM, RequestError, "the multipart body breaks off before its last boundary")
            for cut in (b"", b"-", b"--X", b"--XX", b"--XX\r", b"--XX-", b"\r\n", b"\r\n--XX")
        ),
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
            "no field `image` in the form; it has `tta`, `Image`",
        ),
        (body(), FORM, EmptyBody, "no field `image` in the form; it has no fields"),
    ],
)
def test_other_bodies_are_refused(
    data: bytes, content_type: bytes, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as refused:
        forms.parse(data, content_type)
    assert type(refused.value) is kind
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "preamble",
    [
        b"\r\n",
        b"\n",
        b"This is a message with multiple parts in MIME format.\r\n",
        b"--\r\n-\r\n",
        b"--XXX\r\n\r\n--XXX--\r\n",  # a longer boundary
        b"x" * 100_000 + b"\r\n",
        b"\r\n--XXY" * 50 + b"\r\n",
    ],
)
def test_preambles_and_epilogues_are_left_out(preamble: bytes) -> None:
    """RFC 2046, section 5.1.1."""
    form = body(part(b"tta", b"4"), part(b"image", b"one"))
    expected = forms.parse(form, FORM)
    epilogue = b"\r\nepilogue\r\n--XX\r\nContent-Disposition: form-data; name=image\r\n\r\nx"
    assert forms.parse(preamble + form, FORM) == expected
    assert forms.parse(form + epilogue, FORM) == expected
    assert forms.parse(preamble + form + epilogue, FORM) == expected


def test_blanks_may_follow_each_boundary() -> None:
    form = body(part(b"image", b"one"), part(b"image", b"two"))
    assert forms.parse(form.replace(b"--XX\r\n", b"--XX \t\r\n"), FORM).images == (b"one", b"two")


@pytest.mark.parametrize(
    "content_type",
    [
        b'multipart/form-data; boundary="a b:c"',
        b'Multipart/Form-Data; Boundary="a b:c"; charset=utf-8',
        b'multipart/form-data; charset=utf-8; boundary="a b:c"',
        b'multipart/form-data;boundary="a b:c"',
    ],
)
@pytest.mark.parametrize(
    "disposition",
    [
        b'form-data; name="image"; filename="x.jpg"',
        b"form-data; name=image; filename*=UTF-8''%e2%82%ac.jpg",
        b"form-data; filename*=UTF-8''%e2%82%ac.jpg; filename=\"EUR.jpg\"; name=image",
        b'form-data; name="image"; filename="a;name=tta.jpg"',
        b'FORM-DATA; NAME="image"',
    ],
)
def test_quoted_boundaries_and_names_of_files_are_read(
    content_type: bytes, disposition: bytes
) -> None:
    head = b"Content-Disposition: " + disposition + b"\r\nContent-Type: image/*; q=1\r\n"
    form = b"--a b:c\r\n" + head + b"\r\none\r\n--a b:c--\r\n"
    assert forms.parse(form, content_type) == forms.Form((b"one",), ())

"""The OpenAPI document: what `App` accepts and answers beyond what `service.py` declares."""

from __future__ import annotations

from typing import Any, Final

_BASE64: Final = {"type": "string", "description": "the file as base64, or a data URL"}
_OPTIONS: Final = {
    "tta": {"type": "integer", "nullable": True, "description": "views to average"},
    "top_k": {"type": "integer", "nullable": True, "description": "classes in the answer"},
}


def _json(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    properties = {field: schema, **_OPTIONS}
    return {
        "schema": {
            "type": "object",
            "properties": properties,
            "required": [field],
            "additionalProperties": False,
        }
    }


_PROBLEM: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        **{key: {"type": "string"} for key in ("type", "title", "detail", "code")},
        "status": {"type": "integer"},
    },
}
_ERRORS: Final = {
    400: "no image, or a wrong option",
    401: "the key is missing or wrong",
    413: "too many bytes or pixels",
    415: "no image, a format that is not served, or a body with a Content-Encoding",
    422: "a broken image",
    429: "overloaded, or too many images of a key",
    500: "inference failed, or a fault of the service",
    503: "no model is loaded",
    504: "past the deadline",
}


def complete(specification: Any, *, problem_type: str, max_images: int) -> Any:
    """Add bodies and errors to BentoML's OpenAPI specification, and return it.

    Args:
        specification: BentoML's.
        problem_type: Media type of the errors.
        max_images: Largest number of images of a batch.
    """
    several = {"type": "array", "items": _BASE64, "minItems": 1, "maxItems": max_images}
    bodies: dict[str, dict[str, Any]] = {
        "/predict": {
            "application/json": _json("image", _BASE64),
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
        "/predict/batch": {"application/json": _json("images", several)},
    }
    content = {problem_type: {"schema": _PROBLEM}}
    errors = {code: {"description": text, "content": content} for code, text in _ERRORS.items()}
    for path, types in bodies.items():
        operation = specification.paths[path].post
        operation["requestBody"]["content"].update(types)
        operation["responses"].update(errors)
        operation["responses"].pop(404, None)  # BentoML's, which `App` does not answer here
    return specification

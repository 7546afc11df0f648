"""Check what the user has set in BentoML's own configuration.

The model's routes do not go through BentoML's middleware, so that most of its settings would have
no effect on them. A setting is either in effect there too, or the start is refused with the name of
Fledge's own setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from serving.errors import OptionError
from serving.server import bentoml_compat

VARIABLES: Final = ("BENTOML_CONFIG", "BENTOML_CONFIG_OPTIONS", "BENTOML_CONFIG_OVERRIDES")

_OURS: Final = (  # the first prefix that matches
    ("ssl", "FLEDGE_TLS_CERT and FLEDGE_TLS_KEY"),
    ("http.cors", "FLEDGE_CORS_ORIGINS"),
    ("http.host", "--host"),
    ("http.port", "--port"),
    ("traffic.timeout", "FLEDGE_DEADLINE"),
    ("traffic", "FLEDGE_MAX_QUEUE"),
    ("workers", "FLEDGE_WORKERS"),
    ("threads", "FLEDGE_WORKERS"),
    ("replicate_process", "FLEDGE_WORKERS"),
    ("batching", "FLEDGE_MAX_BATCH"),
    ("backlog", "FLEDGE_MAX_CONNECTIONS"),
    ("resources", "FLEDGE_DEVICE"),
)
_IN_EFFECT: Final = ("tracing",)
_IN_EFFECT_OF_BENTOML_SERVE: Final = ("tracing", "ssl", "http.host", "http.port")
_SERVICE: Final = "image_classifier"


def check(environ: Mapping[str, str], *, bentoml_serve: bool) -> None:
    """Check the settings of BentoML; does nothing, and imports nothing, if none is set.

    Args:
        environ: Environment variables; those that BentoML reads must be those of this process.
        bentoml_serve: Whether the user has started `bentoml serve`, which listens itself.

    Raises:
        OptionError: The configuration can't be read, or has a setting without effect.
    """
    names = [name for name in VARIABLES if environ.get(name, "").strip()]
    if not names:
        return
    where = " and ".join(names)
    try:
        settings = bentoml_compat.user_configuration(_SERVICE)
    except Exception as error:  # of BentoML, PyYAML, JSON, the schema or the operating system
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OptionError(f"{where}: BentoML can't read its configuration ({reason})") from error
    in_effect = _IN_EFFECT_OF_BENTOML_SERVE if bentoml_serve else _IN_EFFECT
    errors = [
        f"{name} has no effect on the model's routes; {_remedy(setting)}"
        for setting, name in settings.items()
        if not _matches(setting, in_effect)
    ]
    if errors:
        raise OptionError(f"{where}: {'; '.join(errors)}")


def _remedy(setting: str) -> str:
    for prefix, ours in _OURS:
        if _matches(setting, (prefix,)):
            return f"use {ours}"
    return "remove it"


def _matches(setting: str, prefixes: tuple[str, ...]) -> bool:
    return any(setting == prefix or setting.startswith(f"{prefix}.") for prefix in prefixes)

"""Types of the JSON objects inside `manifest.json`, validated by pydantic.

The validated objects stay dictionaries in memory. Constraints in `json_schema_extra` are published
in the JSON schema but not checked by pydantic. Some are checked elsewhere (for example in
`serving.bundle.storage`); others are not met by bundles of other versions, which must still load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NotRequired

from pydantic import (
    ConfigDict,
    FailFast,
    Field,
    GetCoreSchemaHandler,
    StrictBool,
    StrictInt,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    with_config,
)
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypedDict  # pydantic accepts `typing.TypedDict` from Python 3.12 on

PATH: Final[dict[str, Any]] = {"pattern": r"^(?!/)(?!.*\.\.(/|$)).+$"}
"""JSON schema of a string that is a relative path without `..`."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]
Rgb = Annotated[list[Number], Field(min_length=3, max_length=3)]
FilePath = Annotated[
    str, Field(description="path below the payload folder, with /", json_schema_extra=PATH)
]
"""Path relative to the payload folder. `storage.read` refuses a path that leaves this folder."""

# Readers accept unknown fields, but the published schema has only the fields that an export writes.
_OPEN: Final = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})


def _as_given(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Validate `value` with pydantic, but return it unchanged.

    In a float field, pydantic would turn 1 into 1.0. The manifest's bytes and version hash would
    then change.
    """
    check(value)
    return value


AsGiven: Final = WrapValidator(_as_given)


@dataclass(frozen=True)
class BuiltFrom:
    """Pydantic annotation of a field whose value is an object built from a JSON object.

    Attributes:
        entry: Type that validates the JSON object.
        build: Function that builds the value from the validated JSON object.
    """

    entry: Any
    build: Callable[[dict[str, Any]], Any]

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def read(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
            if isinstance(value, source):
                return value
            check(value)
            return self.build(value)

        return core_schema.no_info_wrap_validator_function(
            read, handler.generate_schema(self.entry)
        )


@with_config(ConfigDict(extra="forbid"))
class PreprocessEntry(TypedDict):
    """Preprocessing of an image."""

    decode: NotRequired[
        Annotated[
            Literal["full", "scaled"],
            Field(
                description="scaled: the decoder reduces by an integer, so that what fit keeps "
                "stays at least 2 times size; default: full"
            ),
        ]
    ]
    fit: NotRequired[
        Annotated[
            Literal["crop", "squish", "pad"],
            Field(
                description="crop: the centre square; squish: the whole image; pad: the whole "
                "image in a square of background; default: crop"
            ),
        ]
    ]

    size: Annotated[
        StrictInt, Field(ge=8, le=4096, description="side of the graph's square input, pixels")
    ]
    crop: Annotated[
        Number, Field(gt=0, le=1, description="side of the centre square / short side of the image")
    ]
    interpolation: Annotated[
        Literal["bilinear", "bicubic", "lanczos"], Field(description="of the antialiased resize")
    ]
    mean: Annotated[Rgb, Field(description="RGB, of values from 0 to 1; applied in the graph")]
    std: Annotated[
        list[Annotated[Number, Field(gt=0)]],
        Field(
            min_length=3,
            max_length=3,
            description="RGB, of values from 0 to 1; applied in the graph",
        ),
    ]
    background: Annotated[
        list[Annotated[StrictInt, Field(ge=0, le=255)]],
        Field(min_length=3, max_length=3, description="RGB under transparent pixels"),
    ]


@with_config(ConfigDict(extra="forbid"))
class ViewEntry(TypedDict):
    """One view of test-time augmentation."""

    name: str
    zoom: Annotated[
        Number, Field(gt=0, le=1000, description="side of the plain crop / side of this crop")
    ]
    x: Annotated[Share, Field(description="position of the crop: 0 left, 0.5 centre, 1 right")]
    y: Annotated[Share, Field(description="position of the crop: 0 top, 0.5 centre, 1 bottom")]
    flip: Annotated[StrictBool, Field(description="mirrored left to right")]


@with_config(_OPEN)
class GraphEntry(TypedDict):
    """The graph of one precision."""

    file: FilePath
    accuracy: Annotated[Share | None, Field(description="on the held-out photos")]
    tolerance: Annotated[
        Number,
        Field(gt=0, le=1, description="largest accepted difference of a golden probability"),
    ]


@with_config(_OPEN)
class FileEntry(TypedDict):
    """A file of the payload."""

    sha256: Annotated[str, Field(json_schema_extra={"pattern": "^[0-9a-f]{64}$"})]
    bytes: Annotated[StrictInt, Field(ge=0)]


@with_config(_OPEN)
class GoldenEntry(TypedDict):
    """A golden image: a held-out photo and its probabilities on the plain view."""

    file: FilePath
    probabilities: Annotated[
        dict[str, Annotated[list[Share], FailFast(), Field(min_length=1)]],
        Field(
            description="by precision, in the order of labels",
            json_schema_extra={"required": ["fp32"]},
        ),
    ]


@with_config(
    ConfigDict(
        extra="allow",
        json_schema_extra={"additionalProperties": False, "required": ["confident", "energy"]},
    )
)
class Thresholds(TypedDict):
    """Limits of `confident` and `out_of_distribution` in answers; null leaves the field null."""

    confident: Annotated[Share | None, Field(description="least probability of a confident answer")]
    # The first bundles have no `energy`.
    energy: NotRequired[
        Annotated[
            Number | None,
            Field(description="largest -log sum exp of the logits within the distribution"),
        ]
    ]


@with_config(ConfigDict(extra="allow"))
class TensorEntry(TypedDict):
    """An input or output of the graphs."""

    name: NotRequired[str]
    dtype: Literal["uint8", "float32"]
    shape: Annotated[
        list[Literal["batch"] | Annotated[StrictInt, Field(ge=1)]],
        Field(min_length=2, max_length=4),
    ]


@with_config(ConfigDict(extra="allow"))
class OutputsEntry(TypedDict):
    """The outputs of the graphs."""

    logits: TensorEntry
    features: TensorEntry


@with_config(ConfigDict(extra="allow"))
class ContractEntry(TypedDict, total=False):
    """Inputs and outputs of the graphs."""

    input: TensorEntry
    outputs: OutputsEntry

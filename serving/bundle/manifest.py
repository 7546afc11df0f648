"""The manifest of a bundle: pydantic model of `manifest.json`, version hash and JSON schema.

`Manifest.from_json` checks all fields, and `Manifest.to_json` returns the same text again.

The command `python -m serving.bundle.manifest > docs/manifest.schema.json` writes the published
JSON schema.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeGuard

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from serving.bundle.entries import (
    PATH,
    AsGiven,
    BuiltFrom,
    ContractEntry,
    FileEntry,
    FilePath,
    GoldenEntry,
    GraphEntry,
    Number,
    PreprocessEntry,
    Thresholds,
    ViewEntry,
)
from serving.errors import BundleError
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import VIEWS, View
from serving.utils import json_reader
from serving.utils.json_reader import JsonError

SCHEMA: Final = 1
"""Version of the format of `manifest.json`."""

_LARGEST_BATCH: Final = 1024
_LARGEST_INPUT: Final = 2**28  # bytes of a batch of pixels
_REPORT: Final = "; a report, not used for answers"


def _plain_first(views: tuple[View, ...]) -> tuple[View, ...]:
    if views[0][1:] != VIEWS[0][1:]:
        raise ValueError("the first view must be the plain one")
    return views


def _publish(schema: JsonSchemaValue) -> None:
    """Mark every field as required in the published schema, except `torch_export`.

    Bundles of the earliest versions have no `torch_export`.
    """
    schema["description"] = "Everything that decides or describes the answers of an exported model"
    schema["required"] = [name for name in schema["properties"] if name != "torch_export"]


class Manifest(BaseModel):
    """Content of `manifest.json`: everything that decides or describes the answers of a model.

    The fields are in the order of the file. Fields whose description says "a report" have no effect
    on answers. `model_copy(update=...)` returns a changed manifest without checking the changes.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        title="manifest.json of a Fledge bundle",
        json_schema_extra=_publish,
    )

    name: str = Field(
        description="name of the model", json_schema_extra={"minLength": 1, "maxLength": 100}
    )
    version: str = Field(
        description="hash of all that decides answers; also the name of the payload folder",
        json_schema_extra={"pattern": "^[0-9a-f]{12}$"},  # `storage.read` computes it again
    )
    arch: str = Field(description="torchvision's name of the network")
    labels: Annotated[
        tuple[Annotated[str, Field(json_schema_extra={"minLength": 1})], ...], FailFast()
    ] = Field(
        min_length=1,
        description="class names in the order of the logits",
        json_schema_extra={"uniqueItems": True},
    )
    preprocess: Annotated[Preprocess, BuiltFrom(PreprocessEntry, Preprocess.from_dict)]
    precisions: Annotated[Mapping[str, GraphEntry], AsGiven] = Field(
        description="the graphs, by precision",
        json_schema_extra={
            "propertyNames": {"enum": ["fp32", "int8", "fp16"]},
            "required": ["fp32"],
        },
    )
    files: Annotated[Mapping[str, FileEntry], AsGiven] = Field(
        description="every file of the payload, and no other, by its path",
        json_schema_extra={"propertyNames": PATH},
    )
    views: Annotated[
        tuple[Annotated[View, BuiltFrom(ViewEntry, lambda entry: View(**entry))], ...],
        FailFast(),
        AfterValidator(_plain_first),
    ] = Field(
        VIEWS,
        min_length=1,
        description="views of test-time augmentation; tta=N takes the first N. The first is the "
        "plain one",
    )
    average: Literal["mean", "log_mean"] = Field(
        "mean", description="how the views' probabilities are averaged"
    )
    temperature: Annotated[Number, AsGiven] = Field(
        1.0, gt=0, description="logits are divided by it before the softmax; 1 until calibrated"
    )
    thresholds: Annotated[Thresholds, AsGiven] = Field(
        default_factory=lambda: Thresholds(confident=None, energy=None)
    )
    calibration: Mapping[str, Any] | None = Field(
        None, description="accuracy, loss and calibration error before and after" + _REPORT
    )
    tried: Mapping[str, Any] = Field(
        default_factory=dict,
        description="for each precision beside fp32: kept or why_not, with figures" + _REPORT,
    )
    graph: Annotated[ContractEntry, AsGiven] = Field(default_factory=lambda: ContractEntry())
    torchscript: FilePath | None = Field(None, description="the float32 graph as TorchScript")
    torch_export: FilePath | None = Field(None, description="the float32 graph by torch.export")
    golden: Annotated[tuple[Annotated[GoldenEntry, AsGiven], ...], FailFast()] = Field(
        (), description="photos with the probabilities that every reader of the bundle must get"
    )
    tta: Mapping[str, Any] | None = Field(
        None, description="for each number of views: photos gained and lost" + _REPORT
    )
    parity: Mapping[str, Any] = Field(
        default_factory=dict, description="measurements of the gate" + _REPORT
    )
    batchnorm: Mapping[str, Any] = Field(
        default_factory=dict,
        description="number of BatchNorms, of folded ones, and why others were left" + _REPORT,
    )
    tuning: Mapping[str, Any] = Field(
        default_factory=dict,
        description="settings measured on the machine of the export, by device" + _REPORT,
    )
    provenance: Mapping[str, Any] = Field(
        default_factory=dict, description="run, recipe, data, versions" + _REPORT
    )
    # Not named `schema`, because BaseModel has a method of that name.
    schema_version: Literal[1] = Field(SCHEMA, alias="schema", description="version of this format")

    @property
    def graphs(self) -> list[str]:
        """Paths of all graph files, relative to the payload folder."""
        files = [entry["file"] for entry in self.precisions.values()]
        return files + [file for file in (self.torchscript, self.torch_export) if file]

    def to_json(self) -> str:
        """Return the manifest as indented JSON, with the keys in the order of the fields.

        Raises:
            ValueError: A number is not finite.
        """
        values = dict(self)
        values["preprocess"] = self.preprocess.to_dict()
        values["views"] = [view._asdict() for view in self.views]
        values["schema"] = values.pop("schema_version")
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check the text of `manifest.json`.

        Raises:
            BundleError: The text is not valid JSON, a field is wrong, or the format has another
                version than `SCHEMA`. The message names the field.
        """
        try:
            values = json_reader.parse(text)
        except JsonError as error:
            raise BundleError(f"not a manifest: {error}") from error
        if not isinstance(values, dict):
            raise BundleError("not a manifest: it is not a JSON object")
        if values.get("schema") != SCHEMA:
            found = values.get("schema")
            raise BundleError(f"schema {found!r:.80} is not {SCHEMA}; export the model again")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise BundleError(f"not a manifest: {json_reader.describe(error)}") from error


def content_version(manifest: Manifest, graphs: Mapping[str, str]) -> str:
    """Return the version of a bundle: a hash of everything that determines answers.

    Args:
        manifest: The manifest. Only the fields labels, preprocess, temperature, thresholds, views
            and average are hashed.
        graphs: Mapping from the path of each graph file to the sha256 of the file. Both are hashed.

    Returns:
        The first twelve hex digits of a sha256.
    """
    decides = {
        "graphs": dict(sorted(graphs.items())),
        "labels": manifest.labels,
        "preprocess": manifest.preprocess.to_dict(),
        "temperature": manifest.temperature,
        "thresholds": dict(manifest.thresholds),
        "views": manifest.views,
        "average": manifest.average,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


class Parallelism(NamedTuple):
    """How concurrent runs of the graph share the cores of a CPU.

    Attributes:
        runs: Number of concurrent runs.
        threads: Number of threads of each run.
    """

    runs: int
    threads: int


def measured_parallelism(manifest: Manifest, precision: str, cores: int) -> Parallelism:
    """Return the parallelism that processed the most images per second in a measurement at export.

    The measurement is used only if the machine of the export also had `cores` CPU cores. Without a
    usable measurement, the result is `cores` runs with one thread each.

    Args:
        manifest: Manifest of the bundle.
        precision: Precision of the graph.
        cores: Number of CPU cores of this machine.
    """
    best = _measured(manifest, "throughput", precision, cores)
    runs, threads = best.get("workers"), best.get("threads")
    if not (_is_count(runs, cores) and _is_count(threads, cores)):
        return Parallelism(cores, 1)
    return Parallelism(runs, threads)


def multithreading_pays(manifest: Manifest, precision: str, cores: int) -> bool:
    """Return whether several threads run the graph on a single image faster than one thread.

    The answer comes from a measurement at export. Without a measurement, or if the machine of the
    export did not have `cores` CPU cores, the result is True.
    """
    return bool(_measured(manifest, "latency", precision, cores).get("threads") != 1)


def measured_max_batch(manifest: Manifest, device: str) -> int | None:
    """Return the batch, in rows, at which more rows were no faster in a measurement at export.

    Args:
        manifest: Manifest of the bundle.
        device: "cpu" or "cuda".

    Returns:
        None if there is no usable measurement.
    """
    found = _object(manifest.tuning.get(device)).get("max_batch")
    most = min(_LARGEST_BATCH, _LARGEST_INPUT // (3 * manifest.preprocess.size**2))
    return found if _is_count(found, most) else None


def _measured(manifest: Manifest, what: str, precision: str, cores: int) -> Mapping[str, Any]:
    """Return a measurement on a machine of `cores` CPU cores; empty if there is none.

    `tuning` is a report, so bundles of other versions may have other objects in it.
    """
    tuned = _object(manifest.tuning.get("cpu"))
    found = _object(tuned.get(what)).get(precision)
    return _object(found) if tuned.get("cores") == cores else {}


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_count(value: Any, most: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


class _PublishedSchema(GenerateJsonSchema):
    """Generator of the published JSON schema, without default values and titles of fields.

    Default values are omitted because an export writes all fields. A title would only repeat the
    name of the field.
    """

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the `manifest.json` that an export writes.

    `Manifest.from_json` accepts a little more, for example missing fields that have a default.
    """
    schema = Manifest.model_json_schema(schema_generator=_PublishedSchema)
    return {"$schema": _PublishedSchema.schema_dialect, **schema}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))

"""The table as Parquet, by pyarrow, which an image that only serves does without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from serving.scoring.table import Features, ScoreRow

FEATURES: Final = "features"


class ParquetWriter:
    """A row group for each write; a `serving.scoring.table.RowWriter`."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """`columns` may hold "features", which are no part of a row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds: dict[str, Any] = {
            "probability": pa.float64(),
            "confident": pa.bool_(),
            "top_k": pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float64())])),
            "views": pa.int32(),
            "probabilities": pa.list_(pa.float64()),
            FEATURES: pa.list_(pa.float32()),
        }
        self._pa, self._columns = pa, columns
        self._schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
        self._writer = pq.ParquetWriter(path, self._schema)

    def write(self, rows: Sequence[ScoreRow], features: Features | None) -> None:
        """As `serving.scoring.table.RowWriter`."""
        arrays = []
        for field in self._schema:
            if field.name == FEATURES:
                values = [_finite(vector) for vector in features] if features is not None else None
            else:
                values = [_plain(getattr(row, field.name)) for row in rows]
            arrays.append(self._pa.array(values or [None] * len(rows), field.type))
        self._writer.write_table(self._pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        """As `serving.scoring.table.RowWriter`."""
        self._writer.close()


def _plain(value: Any) -> Any:
    if isinstance(value, str):  # bytes of a name that are not UTF-8 have no place in a string
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return [{"label": label, "probability": probability} for label, probability in value]
    return value


def _finite(vector: Any) -> Any:
    return None if vector[0] != vector[0] else vector  # a broken image has none

"""What the Parquet files of encoded rows say of themselves; that they are read as written, test_batch_trainer has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import streamrec as sr
from streamrec.batch import LabeledRows
from streamrec.preprocessors import encode
from streamrec.storage.encoded import commit_rows, write_part

SCHEMA = sr.Schema(sr.Id("user"), sr.Ids("genres"), sr.Number("price"), sr.Text("title"))


@pytest.mark.parametrize("nullable", [False, True], ids=["now", "before"])
def test_nothing_but_a_title_may_be_null_and_files_of_before_are_read_as_before(tmp_path: Path, nullable: bool) -> None:
    from pyarrow import parquet

    features = [{"genres": ["a", "b"][: n % 3], "price": n / 2, "title": f"t{n % 2}"} for n in range(7)]
    shown = [sr.Impression(f"i{n}", float(n), f"u{n}", "p", features[n]) for n in range(7)]
    shown.append(sr.Impression("i7", 7.0, "u7", "p"))  # nothing but its user: no title either
    batch = encode(SCHEMA, shown).batch
    labels, weights = (np.arange(8) % 2).astype(np.float32), np.full(8, 2.0, dtype=np.float32)
    part = write_part(str(tmp_path), "part-0", [LabeledRows(batch, labels, weights)])
    commit_rows(str(tmp_path), SCHEMA, [part])
    file = tmp_path / "rows" / part.name
    table = parquet.read_table(file)
    # of nothing but a title, which may be missing, Parquet is to keep whether it is there
    assert [field.name for field in table.schema if field.nullable] == ["texts"]
    assert not table.schema.field("ids").type.value_field.nullable
    if nullable:
        parquet.write_table(table.cast(without_promises(table.schema)), file)
        assert parquet.read_table(file).schema.field("ids").nullable
    found = sr.EncodedRows(str(tmp_path)).read(100)
    assert found is not None
    for name in ("ids", "values", "fields", "starts", "ends", "times", "text_refs"):
        np.testing.assert_array_equal(getattr(found.batch, name), getattr(batch, name), err_msg=name)
    assert list(found.batch.texts) == list(batch.texts)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.weights, weights)


def without_promises(schema: object) -> object:
    """The same columns, any of which might hold null, as files had it before they said that none does."""
    import pyarrow

    assert isinstance(schema, pyarrow.Schema)
    kinds = [
        pyarrow.list_(field.type.value_type) if pyarrow.types.is_list(field.type) else field.type for field in schema
    ]
    return pyarrow.schema([pyarrow.field(name, kind) for name, kind in zip(schema.names, kinds, strict=True)])

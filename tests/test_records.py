"""Records survive their file, and a bad file or a failed write harms nothing."""

import dataclasses
import json
import math

import numpy as np
import pytest

from keras_rgd import DiffusionRecord, load_records, save_records


def record(**changes):
    """A record of two examples; every float field differs from every other."""
    fields = dataclasses.fields(DiffusionRecord)
    values = {f.name: 0.5 + i for i, f in enumerate(fields) if f.type is float}
    values |= {f.name: 1 + i for i, f in enumerate(fields) if f.type is int}
    values |= {
        "mode": "evaluation",
        "per_example": "vectorized_map",
        "eigenvalues": np.array([2.5e-7, 1e-300, 0.0]),
        "rank": 1,
        "rank_reason": None,
    }
    return DiffusionRecord(**(values | changes))


def assert_equal(a, b):
    for field in dataclasses.fields(DiffusionRecord):
        x, y = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_array_equal(x, y)
        assert type(x) is type(y), field.name


def test_records_are_read_as_they_were_written(tmp_path):
    written = [
        record(),
        record(rank=None, rank_reason="d is large", rank_cut=math.nan, noise_scale=math.nan),
    ]
    save_records(written, tmp_path / "records.json")
    read = load_records(tmp_path / "records.json")
    assert len(read) == 2
    for a, b in zip(written, read, strict=True):
        assert_equal(a, b)


def test_no_records_are_read_as_none(tmp_path):
    save_records([], tmp_path / "records.json")
    assert load_records(tmp_path / "records.json") == []


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().lambda_max = 0.0


def test_the_file_is_plain_json(tmp_path):
    save_records([record(overlap=math.nan)], tmp_path / "records.json")
    (row,) = json.loads((tmp_path / "records.json").read_text())["records"]
    assert row["overlap"] is None
    assert row["eigenvalues"] == [2.5e-7, 1e-300, 0.0]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "records.json"
    save_records([record()], path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_records([record(), record(mode=object())], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["records.json"]


@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe\x00", b"[]", b'{"records": []}'])
def test_another_file_is_refused_by_its_name(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="written by save_records. Received: .*other.json"):
        load_records(path)


def changed(path, **changes):
    """A file of one record with fields changed; `...` takes one away."""
    save_records([record()], path)
    content = json.loads(path.read_text())
    row = content["records"][0] | changes
    content["records"] = [{k: v for k, v in row.items() if v is not ...}]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "name, value", [("trace", ...), ("colour", 3), ("eigenvalues", "x"), ("eigenvalues", ...)]
)
def test_records_with_other_fields_are_refused_by_field_and_file(name, value, tmp_path):
    path = changed(tmp_path / "records.json", **{name: value})
    with pytest.raises(ValueError, match=r"fields of DiffusionRecord. Received: .*records.json"):
        load_records(path)


def test_records_of_another_version_are_refused(tmp_path):
    path = tmp_path / "records.json"
    save_records([], path)
    path.write_text(path.read_text().replace(": 1", ": 2"))
    with pytest.raises(ValueError, match="of version 1. Received: version 2"):
        load_records(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="records.json"):
        load_records(tmp_path / "records.json")

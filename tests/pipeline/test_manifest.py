"""Finished or not: nothing in between is ever taken for finished."""

import pytest

from smolpost.errors import UserError
from smolpost.pipeline import manifest


def test_manifest_names_versions_and_is_read_back(tmp_path):
    assert manifest.read(tmp_path) is None
    manifest.write(tmp_path, kind="x", key="abc")
    found = manifest.read(tmp_path)
    assert (found["kind"], found["key"]) == ("x", "abc") and found["versions"]["torch"].startswith("2.")
    (tmp_path / "manifest.json").write_text('{"key": ')
    with pytest.raises(UserError, match=r"manifest.json is not a manifest; remove .* and run its stage again"):
        manifest.read(tmp_path)

"""Files appear under their name when they are complete, or not at all."""

from __future__ import annotations

import pytest

from anyrank.errors import RunError
from anyrank.files import new_files, new_folder, read_json, write_json, write_text


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    write_text(path, "[]\n")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fill():
        with new_folder(tmp_path / "out") as beside:
            (beside / "half").write_text("x")
            assert not (tmp_path / "out").exists()
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_in_use_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as beside:  # empty: taken over
        (beside / "a").write_text("x")
    with pytest.raises(RunError, match="out exists already; name another folder, or remove it"):
        new_folder(tmp_path / "out").__enter__()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]


def test_new_files_move_in_together(tmp_path):
    (tmp_path / "old").write_text("1")
    with new_files(tmp_path) as beside:
        (beside / "new").write_text("2")
        assert not (tmp_path / "new").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(RunError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(RunError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")

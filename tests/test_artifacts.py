import multiprocessing

import pandas as pd
import pytest
import torch

from pipeline import artifacts
from pipeline.artifacts import ArtifactError, CellStore


def test_tables_keep_every_bit_and_the_text_of_ids(tmp_path):
    table = pd.DataFrame({"cell_id": ["0012", "1e10"], "value": [0.1 + 0.2, float("nan")], "flag": [True, False]})
    artifacts.write_table(tmp_path / "t.csv", table)
    pd.testing.assert_frame_equal(artifacts.read_table(tmp_path / "t.csv"), table, check_dtype=False)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"value": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ArtifactError, match="a.json: cannot be written: No space left on device"):
        artifacts.write_json(path, {"value": 2})
    assert artifacts.read_json(path)["value"] == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["{", "[1]", '{"format": 99}', "\x00"])
def test_json_that_is_not_ours_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"a\.json"):
        artifacts.read_json(tmp_path / "a.json")


TABLES = [
    pd.DataFrame({"cell_id": ["01", "1e5"], "x": [0.1, None], "text": ["a,\nb", ""]}),
    pd.DataFrame(columns=["cell_id", "x"]),
    pd.DataFrame(),
]


@pytest.mark.parametrize("table", TABLES, ids=["rows", "no rows", "no columns"])
def test_a_table_is_read_as_it_was_written_and_refused_once_a_bit_has_changed(tmp_path, table):
    path = tmp_path / "t.csv"
    artifacts.write_table(path, table)
    found = artifacts.read_table(path)
    assert list(found) == list(table) and len(found) == len(table)
    assert len(table) == 0 or (list(found["cell_id"]) == ["01", "1e5"] and found["x"].tolist()[0] == 0.1)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ArtifactError, match=r"t\.csv"):
            artifacts.read_table(path)


def test_truncated_tensors_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    artifacts.write_tensors(path, {"w": torch.rand(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ArtifactError, match=r"w\.safetensors"):
        artifacts.read_tensors(path)


def test_the_store_returns_what_it_keeps(tmp_path):
    store = CellStore(tmp_path)
    record = {"status": "finished", "history": {"update": [1, 2], "train_loss": [2.0, None]}}
    store.save("abc", record, {"w": torch.ones(2)})
    assert "abc" in store and "abd" not in store and list(store) == ["abc"]
    assert store.record("abc")["status"] == "finished"
    assert list(store.history(["abc"])["update"]) == [1, 2]
    store.remove("abc")
    assert "abc" not in store


def test_a_cells_furthest_state_is_found_wherever_it_lies(tmp_path):
    store = CellStore(tmp_path)
    store.save_checkpoint(["a", "b", "c"], {"w": torch.tensor([[1.0], [2.0], [3.0]])}, 10)
    store.save_checkpoint(["c", "a"], {"w": torch.tensor([[30.0], [10.0]])}, 20)
    progress = store.progress()
    assert {key: place.update for key, place in progress.items()} == {"a": 20, "b": 10, "c": 20}
    assert store.load_rows([progress["a"], progress["c"]])["w"].tolist() == [[10.0], [30.0]]


def test_a_checkpoint_goes_once_no_cell_needs_it(tmp_path):
    store, rows = CellStore(tmp_path), torch.ones(2, 1)
    store.save_checkpoint(["a", "b"], {"w": rows}, 10)
    store.save_checkpoint(["a", "c"], {"w": rows}, 20)
    store.release()
    assert set(store.progress()) == {"a", "b", "c"}, "the first one holds the furthest state of b"
    store.save_unfinished("b", {})
    store.release()
    assert set(store.progress()) == {"a", "b", "c"}, "and what a falls back to"
    store.save("a", {}, None)
    store.release(keep={"a", "b"})
    assert set(store.progress()) == {"a", "b", "c"}
    store.release()
    assert set(store.progress()) == {"a", "c"}
    store.release(ended={"c"})
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("version", [1, 99])
def test_a_checkpoint_of_an_older_version_is_not_read_and_a_newer_one_is_refused_and_kept(tmp_path, monkeypatch, version):
    store = CellStore(tmp_path)
    monkeypatch.setattr(artifacts, "CHECKPOINT_VERSION", version)
    store.save_checkpoint(["a"], {"w": torch.ones(1, 1)}, 10)
    monkeypatch.undo()
    if version == 99:
        for call in (store.progress, store.release):
            with pytest.raises(ArtifactError, match="is of a newer version"):
                call()
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    else:
        assert store.progress() == {}
        store.release()
        assert not list((tmp_path / "checkpoints").iterdir())


def test_a_checkpoint_that_was_written_anew_meanwhile_is_not_taken_for_the_one_before(tmp_path):
    store = CellStore(tmp_path)
    for update in (10, 20):
        store.save_checkpoint(["a"], {"w": torch.full((1, 1), float(update))}, update)
    place = store.progress()["a"]
    for update in (30, 40):
        store.save_checkpoint(["a"], {"w": torch.full((1, 1), float(update))}, update)
    with pytest.raises(ArtifactError, match="another process has written it anew"):
        store.load_rows([place])


def test_only_a_damaged_cell_is_forgotten_and_not_one_that_cannot_be_read_here(tmp_path, monkeypatch):
    store, keys = CellStore(tmp_path), ["whole", "flipped", "no weights", "newer"]
    for key in keys:
        if key == "newer":
            monkeypatch.setattr(artifacts, "FORMAT_VERSION", 99)
        store.save(key, {"status": "finished"}, {"w": torch.ones(2)})
    monkeypatch.undo()
    record = tmp_path / "cells" / "flipped" / "record.json"
    record.write_text(record.read_text().replace("finished", "fynished"))
    store.weights_path("no weights").unlink()
    assert store.forget_damaged(keys[:3]) == ["flipped", "no weights"]
    with pytest.raises(ArtifactError, match="has format 99"):
        store.forget_damaged(keys)
    assert list(store) == ["newer", "whole"]


def test_a_damaged_note_of_the_store_is_as_good_as_none(tmp_path):
    store = CellStore(tmp_path)
    store.save_fit("kind", 4)
    store.save_rung("a", 10, {"validation/mse": 0.5})
    store.save_unfinished("a", {"history": {"update": [1]}})
    assert (store.fit("kind"), store.rung("a", 10), len(store.history(["a"]))) == (4.0, {"validation/mse": 0.5}, 1)
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "f'))
    assert (store.fit("kind"), store.rung("a", 10), len(store.history(["a"]))) == (float("inf"), {}, 0)


def _hold(root, ready, release):
    with CellStore(root).lock("first"):
        ready.set()
        release.wait(30)


def test_a_second_writer_is_told_who_holds_the_store(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(ArtifactError, match=rf"is held by process {holder.pid} \(first\)"),
            CellStore(tmp_path).lock("second"),
        ):
            pass
    finally:
        release.set()
        holder.join(30)
    with CellStore(tmp_path).lock("second"):
        pass


def test_an_experiments_copy_uses_the_main_checkouts_store(tmp_path):
    copy = tmp_path / "project" / ".dvc" / "tmp" / "exps" / "standalone" / "tmp1"
    copy.mkdir(parents=True)
    assert artifacts.main_checkout(copy) == tmp_path / "project"
    assert artifacts.main_checkout(tmp_path) == tmp_path


def test_a_link_replaces_what_was_there(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    artifacts.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a"


def test_a_file_that_another_process_removes_while_it_is_opened_is_missing(tmp_path, monkeypatch):
    path, check = tmp_path / "a.safetensors", artifacts.check_intact
    artifacts.write_tensors(path, {"w": torch.ones(2)})
    monkeypatch.setattr(artifacts, "check_intact", lambda checked: (check(checked), checked.unlink()))
    with pytest.raises(artifacts.MissingError, match=r"a\.safetensors: is missing"):
        artifacts.read_about(path)

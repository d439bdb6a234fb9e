"""Which table is found, where one is kept, and what a file that is none leads to."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fusion_core import ConfigError, Device
from fusion_core.tables import UNFUSED, Machine, Row, Table, TableError, find, path_for, save, store
from fusion_core.tables.store import read, to_json

CPU = Device("cpu")
HERE = Machine.here(2, CPU)
RECORDED = Path(__file__).with_name("h200x4.json")


def table(us: float = 10.0, machine: Machine = HERE) -> Table:
    rows = (Row("all_reduce", "float32", 64, 1, {UNFUSED: us}),)
    return Table(machine, rows, "2026-11-22T10:00:00+00:00", "a test")


def other(**facts: Any) -> Machine:
    return dataclasses.replace(HERE, **facts)


@pytest.fixture(autouse=True)
def cache(monkeypatch: Any, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def package(monkeypatch: Any, tmp_path: Path) -> Path:
    """A folder that stands for the package's tables."""
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(store, "_package_tables", lambda: sorted(folder.iterdir()))
    store._find.cache_clear()
    return folder


# keeping


def test_a_saved_table_is_the_one_that_is_found() -> None:
    path = save(table())
    found = find(CPU, 2)
    assert found.table == table()
    assert found.origin == str(path)
    assert found.problems == ()


def test_a_table_is_kept_in_the_users_cache_directory(cache: Path, monkeypatch: Any, tmp_path: Path) -> None:
    assert path_for(HERE) == cache / "fusion_core" / "tables" / "cpu-x2.json"
    assert path_for(Machine("NVIDIA H200", world_size=4)).name == "nvidia-h200-x4.json"
    assert path_for(Machine("../../Émil\x00's / GPU", world_size=4)).name == "mil-s-gpu-x4.json"
    assert path_for(Machine("板", world_size=4)).name == "unnamed-x4.json"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/path"):  # by the XDG rules such a path is not used
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert path_for(HERE) == tmp_path / "home" / ".cache" / "fusion_core" / "tables" / "cpu-x2.json"


def test_the_file_has_a_line_for_each_row_and_is_read_back(tmp_path: Path) -> None:
    recorded = read(RECORDED)
    (tmp_path / "again.json").write_text(to_json(recorded))
    assert read(tmp_path / "again.json") == recorded
    assert sum('"tokens"' in line for line in to_json(recorded).splitlines()) == len(recorded.rows)
    empty = dataclasses.replace(recorded, rows=())
    (tmp_path / "empty.json").write_text(to_json(empty))
    assert read(tmp_path / "empty.json") == empty


def test_a_cache_directory_that_cannot_be_written_is_an_error_that_says_what_to_do(cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    with pytest.raises(ConfigError, match=rf"cannot be written to {path_for(HERE)} .*set XDG_CACHE_HOME to one"):
        save(table())
    assert find(CPU, 2).problems == ()  # it holds no table, and that is no problem


def test_without_a_home_nothing_is_written_to_the_working_directory(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does without a home
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"would be written to ~/\.cache/fusion_core.*set XDG_CACHE_HOME"):
        save(table())
    assert not (tmp_path / "~").exists()
    assert find(CPU, 2) == store.Found(None)


def test_a_reader_sees_one_whole_table_whoever_writes() -> None:
    tables = [table(float(us)) for us in (1, 1000)]
    path = save(tables[0])
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(lambda one: [save(one) for _ in range(50)], one) for one in tables]
        while not all(writer.done() for writer in writers):
            assert read(path) in tables
    assert [file.name for file in path.parent.iterdir()] == ["cpu-x2.json"]


# finding


def test_without_any_table_nothing_is_found_and_nothing_is_wrong() -> None:
    assert find(CPU, 2) == store.Found(None, "", ())


def test_a_package_table_is_used_where_the_user_has_none_and_whatever_the_versions(package: Path) -> None:
    shipped = table(20.0, other(driver="1", versions={"torch": "1.0"}))
    (package / "cpu-x2.json").write_text(to_json(shipped))
    found = find(CPU, 2)
    assert found == store.Found(shipped, "cpu-x2.json of fusion-core")
    path = save(table())
    assert find(CPU, 2) == store.Found(table(), str(path))
    assert find(CPU, 4) == store.Found(None)


def test_of_the_packages_tables_the_one_for_these_links_is_used(package: Path) -> None:
    (package / "cpu-x2.json").write_text(to_json(table(1.0, other(links="nvlink 18"))))
    (package / "cpu-x20.json").write_text("not looked at")
    (package / "cpu-x2.json.orig").write_text("not looked at")
    assert find(CPU, 2) == store.Found(None)
    (package / "cpu-x2-slow.json").write_text(to_json(table(2.0)))
    store._find.cache_clear()
    assert find(CPU, 2) == store.Found(table(2.0), "cpu-x2-slow.json of fusion-core")


def test_the_users_own_table_of_other_versions_gives_way_with_the_reason(package: Path) -> None:
    path = path_for(HERE)
    save(table(machine=other(versions={**HERE.versions, "torch": "1.0"})))
    found = find(CPU, 2)
    assert found.table is None
    (problem,) = found.problems
    assert problem.code == "machine"
    assert str(problem) == (
        f"{path}: the table was measured with torch 1.0, needs torch {HERE.versions['torch']}, as here; "
        "fusion-core tune measures this machine"
    )
    (package / "cpu-x2.json").write_text(to_json(table(20.0)))
    store._find.cache_clear()
    assert find(CPU, 2) == store.Found(table(20.0), "cpu-x2.json of fusion-core", (problem,))


def test_a_broken_table_of_the_user_or_the_package_is_a_problem_and_the_next_one_is_used(package: Path) -> None:
    path = save(table())
    path.write_text("{}")
    (package / "cpu-x2-a.json").write_text("[]")
    (package / "cpu-x2-b.json").write_text(to_json(table(20.0)))
    found = find(CPU, 2)
    assert found.table == table(20.0)
    own, shipped = found.problems
    assert own.code == shipped.code == "table"
    assert str(own).startswith(f"{path}: the table has no schema, machine")
    assert str(shipped).startswith("cpu-x2-a.json of fusion-core: the table is [], needs an object")


def test_none_is_no_table_at_all(package: Path) -> None:
    save(table())
    (package / "cpu-x2.json").write_text(to_json(table()))
    assert find(CPU, 2, "none") == store.Found(None)


def test_a_path_is_that_table_alone(package: Path, tmp_path: Path, monkeypatch: Any) -> None:
    save(table())
    (package / "cpu-x2.json").write_text(to_json(table()))
    mine = tmp_path / "mine.json"
    mine.write_text(to_json(table(30.0)))
    assert find(CPU, 2, str(mine)) == store.Found(table(30.0), str(mine))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find(CPU, 2, "~/mine.json") == store.Found(table(30.0), str(mine))
    mine.write_text(to_json(table(30.0, other(driver="1"))))
    found = find(CPU, 2, str(mine))
    assert found.table is None
    assert [problem.code for problem in found.problems] == ["machine"]
    found = find(CPU, 4, str(mine))
    assert "ranks 2, driver 1, needs ranks 4, driver none, as here; fusion-core tune" in str(found.problems[0])


@pytest.mark.parametrize("setting", ["missing.json", "missing/too.json", "", ".", "a\0b", "~nobody-of-that-name/x"])
def test_a_path_without_a_table_is_a_problem_and_no_exception(
    setting: str, package: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    save(table())
    monkeypatch.chdir(tmp_path)
    found = find(CPU, 2, setting)
    assert (found.table, found.origin) == (None, "")
    assert [problem.code for problem in found.problems] == ["table"]
    assert "needs a table; fusion-core tune" in str(found.problems[0])


def test_a_file_that_is_not_there_is_said_to_be_that(tmp_path: Path) -> None:
    (problem,) = find(CPU, 2, f"{tmp_path}/gone.json").problems
    assert str(problem) == (
        f"{tmp_path}/gone.json does not exist, needs a table; fusion-core tune measures this machine"
    )


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(monkeypatch: Any) -> None:
    path = save(table())
    first = find(CPU, 2)
    monkeypatch.setattr(store, "read", lambda path: pytest.fail("read again"))
    assert find(CPU, 2) is first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parents[2]))
    save(table(30.0))  # of the same size
    assert find(CPU, 2).table == table(30.0)
    path.unlink()
    assert find(CPU, 2).table is None


# reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON in UTF-8"),
        (b"\x80\x04K\x05.", "is not JSON in UTF-8"),  # a pickle
        (b'{"a": "\xff"}', "is not JSON in UTF-8"),
        (b'{"schema": 1, "rows": [', "is not JSON in UTF-8"),
        (b'{"schema": NaN}', "NaN is not JSON"),
        (b'{"schema": -Infinity}', "-Infinity is not JSON"),
        (b'{"schema": 1, "schema": 1}', "the key 'schema' occurs twice"),
        (b"[" * 100_000, "is not JSON in UTF-8"),
        (b'{"schema": ' + b"1" * 5000 + b"}", "is not JSON in UTF-8"),
        (b"[]", r"the table is \[\], needs an object"),
        (b'{"schema": 7}', "schema is 7, needs 1; fusion-core tune"),
    ],
)
def test_a_file_that_holds_no_table_is_named_with_what_is_wrong(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(TableError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_far_too_large_is_refused_unread(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "table.json"
    with path.open("wb") as file:
        file.truncate(16 * 2**20 + 1)
    monkeypatch.setattr(store.json, "loads", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(TableError, match=f"{path} has 16777217 bytes, needs a table of at most 16777216"):
        read(path)


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(TableError, match=f"{path} is not a file, needs a table"):
            read(path)


def test_a_table_that_may_not_be_read_is_a_problem_until_it_may(monkeypatch: Any) -> None:
    path = save(table())

    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)  # what root never sees

    monkeypatch.setattr(store, "_without_waiting", refuse)
    assert f"{path} cannot be read ([Errno 13] Permission denied" in str(find(CPU, 2).problems[0])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parents[2]))
    path.chmod(0o640)
    assert find(CPU, 2).table == table()


@given(st.data())
def test_any_change_of_a_files_bytes_is_read_as_it_is_or_refused(data: Any) -> None:
    content = bytearray(RECORDED.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        loaded = store._parsed(bytes(content), "table.json")
    except TableError:
        return
    assert loaded.to_dict() == json.loads(content)


# the package


def test_every_table_of_the_package_can_be_used_and_is_found_by_its_name(monkeypatch: Any) -> None:
    monkeypatch.undo()
    for file in store._package_tables():
        shipped = store._parsed(file.read_bytes(), file.name)
        assert file in store._shipped(shipped.machine)
        assert shipped.machine.links != "unknown"  # it would hold nowhere

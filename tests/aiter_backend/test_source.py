"""What is read from AITER's source, without an import, and what when it cannot be read."""

import inspect
from pathlib import Path

import pytest

from fusion_aiter.availability import unavailable
from fusion_aiter.source import Call, Source, Unreadable, installed
from tests.aiter_backend import releases
from tests.aiter_backend.on_disk import MI300X, codes, communicator, said

pytestmark = pytest.mark.usefixtures("machine")


def methods(folder, text):
    communicator(folder, text)
    found = installed()
    assert isinstance(found, Source)
    return {name: [str(signature) for signature in some] for name, some in found.methods.items()}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"class CustomAllreduce(:\n", "(line 1)"),
        (b"x = 1\n\xff\xfe\n", "utf-8"),
        (b"x = 1\n\x00\n", "null bytes"),
        (b"class CustomAllreduce:\n    def close(self, a, a): ...\n", "duplicate parameter name"),
    ],
    ids=["syntax", "encoding", "null bytes", "duplicate parameter"],
)
def test_a_file_that_cannot_be_parsed(tmp_path, content, problem):
    path = communicator(tmp_path, "")
    path.write_bytes(content)
    assert isinstance(installed(), Unreadable)
    (reason,) = unavailable(MI300X)
    assert reason.code == "unreadable"
    assert reason.found.startswith(f"{path} cannot be read: ")
    assert problem in reason.found


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = communicator(tmp_path, releases.source("HEAD"))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert installed() == Unreadable(path, "Permission denied")


def test_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    path = communicator(tmp_path, releases.source("HEAD"))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    assert installed() == Unreadable(path, "Permission denied")


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    path = communicator(tmp_path, releases.source("v0.1.18"))
    assert codes() == ["version"]
    assert installed() is installed()
    path.write_text(releases.source("HEAD"), encoding="utf-8")
    assert codes() == []


def test_a_warning_of_the_parser_is_not_passed_on(tmp_path):
    communicator(tmp_path, releases.source("HEAD") + "\npattern = '\\d'\n")
    assert said() == []


def test_definitions_in_blocks(tmp_path):
    assert methods(
        tmp_path,
        """
class CustomAllreduce:
    if torch.version.hip:
        def close(self): ...
    else:
        def close(self, wait): ...
    try:
        def capture(self): ...
    except Exception:
        pass
    finally:
        async def dispose(self): ...
    with something:
        match arch:
            case "gfx942":
                def all_reduce(self, inp, /, *args, out=None, **kwargs): ...
    def twice(self, old): ...
    def twice(self, new=1): ...
    @overload
    def twice(self, typed): ...
    @staticmethod
    def shape(dim): ...
    @functools.wraps(shape)
    @contextmanager
    def wrapped(self, *, size): ...
""",
    ) == {
        "close": ["()", "(wait)"],
        "capture": ["()"],
        "dispose": ["()"],
        "all_reduce": ["(inp, /, *args, out='None', **kwargs)"],
        "twice": ["(new='1')"],
        "shape": ["(dim)"],
        "wrapped": ["(*, size)"],
    }


def test_a_class_in_blocks_and_with_bases(tmp_path):
    assert methods(
        tmp_path,
        """
class Base(elsewhere.Unknown):
    def close(self): ...
    def capture(self): ...
class Gfx1250:
    def vmm(self): ...
if is_gfx1250:
    class CustomAllreduce(Gfx1250):
        def capture(self, stream): ...
else:
    class CustomAllreduce(Base, metaclass=Meta):
        def all_reduce(self, inp): ...
class Circle(CustomAllreduce): ...
""",
    ) == {
        "vmm": ["()"],
        "capture": ["(stream)", "()"],
        "close": ["()"],
        "all_reduce": ["(inp)"],
    }


def test_names_that_the_module_has(tmp_path):
    communicator(
        tmp_path,
        """
import os.path
import torch.distributed as dist
from aiter.utility import fp8 as float8, _expandable_segments_enabled
first, (second, *rest) = 1, (2, 3)
typed: int = 4
thing.attribute = 5
def function():
    local = 6
try:
    class Inner:
        member = 7
except ImportError:
    fallback = None
""",
    )
    expected = "os dist float8 _expandable_segments_enabled first second rest typed function Inner fallback"
    assert installed().names == set(expected.split())


def test_a_parameter_counts_where_every_definition_has_it():
    with_it, without = inspect.signature(lambda inp, *, eps: 0), inspect.signature(lambda inp: 0)
    found = Source(Path("aiter"), frozenset(), {"both": (with_it, with_it), "one": (with_it, without)})
    assert found.takes("both", "eps")
    assert not found.takes("one", "eps")
    assert not found.takes("none", "eps")
    assert found.problem("both", Call(1, ("eps",))) is None
    assert "unexpected keyword argument 'eps'" in found.problem("one", Call(1, ("eps",)))


@pytest.mark.parametrize("release", releases.ALL[1:])
def test_what_is_written_is_what_is_read(tmp_path, release):
    releases.write_package(tmp_path, release)
    read = installed()
    assert isinstance(read, Source)
    names = [name for name in releases.names(release) if name.startswith("CustomAllreduce.")]
    assert set(read.methods) == {name.partition(".")[2] for name in names}
    for name in names:
        (signature,) = read.methods[name.partition(".")[2]]
        _, *known = releases.signature(name, release).parameters.values()
        facts = [(each.name, each.kind, each.default is each.empty) for each in signature.parameters.values()]
        assert facts == [(each.name, each.kind, each.default is each.empty) for each in known]

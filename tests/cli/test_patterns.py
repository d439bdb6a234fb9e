import json

from fusion_core.patterns import CORE_PATTERNS


def test_text(run):
    text = run("patterns").stdout
    for pattern in CORE_PATTERNS:
        assert f"{pattern.name}\n  signature  {pattern.name}(" in text
    assert "words      all_reduce -> add -> rms_norm\n" in text
    assert "reduced = sum_r x_r" in text


def test_json(run):
    answer = json.loads(run("patterns", "--json").stdout)["patterns"]
    assert [pattern["name"] for pattern in answer] == [pattern.name for pattern in CORE_PATTERNS]
    for pattern in answer:
        assert pattern.keys() == {"name", "signature", "outputs", "returns", "words", "formula", "doc"}
        assert pattern["doc"].startswith(pattern["formula"])


def test_one_pattern_is_shown_whole(run):
    text = run("patterns", "all_reduce_rms_norm").stdout
    assert "Args:\n" in text
    assert "all_reduce_add_rms_norm\n" not in text
    (one,) = json.loads(run("patterns", "all_reduce_rms_norm", "--json").stdout)["patterns"]
    assert one["name"] == "all_reduce_rms_norm"


def test_an_unknown_pattern(run):
    error = run("patterns", "all_reduce_group_norm", status=2).stderr
    assert "'all_reduce_group_norm' is unknown, needs one of all_reduce, all_reduce_bias, all_reduce_rms_norm" in error


def test_support(run):
    lines = run("patterns", "--support").stdout.splitlines()
    assert lines[0].startswith("| pattern | ")
    assert lines[0].endswith("| reference |")
    assert lines.index("") == 2 + len(CORE_PATTERNS)
    assert [line for line in lines if line.startswith("## ")] == [
        f"## {name}" for name in lines[0].strip("| ").split(" | ")[1:]
    ]
    answer = json.loads(run("patterns", "--support", "--json").stdout)["support"]
    assert answer["all_reduce"]["reference"]["reference.all_reduce"] == []


def test_support_of_one_pattern_is_a_wrong_call(run):
    assert "--support" in run("patterns", "all_reduce", "--support", status=2).stderr

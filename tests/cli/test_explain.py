import json
import sys
import textwrap

import pytest
import torch.distributed as dist

MODEL = """
    import torch
    import torch.distributed as dist
    import torch.distributed._functional_collectives as funcol

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.RMSNorm(64, eps=1e-6)

        def forward(self, x, *, residual):
            return self.norm(residual + funcol.all_reduce(x, "sum", dist.group.WORLD))

    def build():
        print("the user speaks")
        return Block(), (torch.randn(4, 64),), {"residual": torch.randn(4, 64)}

    def breaks():
        raise RuntimeError("my own mistake")

    def breaks_later():
        def model(x):
            raise RuntimeError("the model's own mistake")

        return model, (torch.ones(3),)

    def wrong():
        return 3

    def no_tuple():
        return Block(), torch.ones(3)

    def initialises():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    not_a_function = 3
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "user_model.py").write_text(textwrap.dedent(MODEL))
    (tmp_path / "user_imports.py").write_text("import there_is_no_such_module\n")
    (tmp_path / "user_exits.py").write_text("raise SystemExit('usage')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("user_", "_user_"))]:
        del sys.modules[name]
    assert not dist.is_initialized()


@pytest.mark.usefixtures("user")
def test_text(run):
    text = run("explain", "user_model:build").stdout
    assert (
        "dry run: nothing was changed; 0 of 1 all_reduces would be on a kernel, 1 as before (reference), on 1 x cpu"
        in text
    )
    assert "-> reference.all_reduce_add_rms_norm" in text


def test_json_and_html(run, user):
    result = run("explain", "user_model.py:build", "--json", "--html", "report.html", "--order", "reference")
    report = json.loads(result.stdout)
    assert report["origin"] == "explained"
    assert [site["strategy"] for site in report["sites"]] == ["reference.all_reduce_add_rms_norm"]
    assert report["order"] == ["reference"]
    assert "the user speaks" in result.stderr
    assert "all_reduce_add_rms_norm" in (user / "report.html").read_text()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("user_model", "names no function, needs MODULE:FUNCTION"),
        ("user_model:", "names no function"),
        ("user_model:nope", "has no 'nope', needs a function; it has build, breaks"),
        ("user_model:not_a_function", "is 3, needs a function"),
        ("user_model:wrong", "returned int, needs (model, args)"),
        ("user_model:no_tuple", "returned (Block, Tensor), needs (model, args)"),
        ("user_imports:build", "No module named 'there_is_no_such_module' (at "),
        ("user_exits.py:build", "cannot be imported: SystemExit: usage"),
        ("no_such_module:build", "'no_such_module' cannot be imported"),
        ("no_such_file.py:build", "'no_such_file.py' does not exist"),
    ],
)
@pytest.mark.usefixtures("user")
def test_a_function_that_cannot_be_used(run, spec, says):
    error = run("explain", spec, status=2).stderr
    assert says in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "function", "says"),
    [("breaks", "breaks", "my own mistake"), ("breaks_later", "model", "the model's own mistake")],
)
@pytest.mark.usefixtures("user")
def test_an_error_of_the_users_own_keeps_its_traceback(run, name, function, says):
    result = run("explain", f"user_model:{name}", status=1)
    assert result.stderr.startswith("Traceback")
    assert f"in {function}" in result.stderr
    assert f"RuntimeError: {says}" in result.stderr
    assert "fusion_core/cli/commands" not in result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("user")
def test_a_function_that_makes_its_own_process_group(run):
    assert (
        "needs a check of torch.distributed.is_initialized()"
        in run("explain", "user_model:initialises", status=1).stderr
    )


def test_half_an_environment_of_torchrun(run, user, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "RANK alone, needs RANK and WORLD_SIZE" in run("explain", "user_model:build", status=2).stderr

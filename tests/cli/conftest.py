import pytest
import typer.testing

from fusion_core.cli.app import app


@pytest.fixture
def run():
    """Run `fusion-core` in this process."""
    runner = typer.testing.CliRunner()

    def call(*args, status=0):
        result = runner.invoke(app, list(args), catch_exceptions=False)
        assert result.exit_code == status, result.output
        assert "Traceback" not in result.stderr or status == 1
        return result

    return call

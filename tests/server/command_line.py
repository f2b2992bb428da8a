"""How tests use the command line in process."""

import re

from typer.testing import CliRunner, Result

from server.cli import app


def sightline(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="sightline")


def refusal(result: Result, code: int) -> str:
    """The one line on stderr of a command that failed."""
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("sightline: ")
    return line


def cells(line: str) -> list[str]:
    """A line of a table: columns are at least two spaces apart."""
    return re.split(r"\s{2,}", line.strip())

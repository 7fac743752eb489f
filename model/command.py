"""What the commands share."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(error: Exception) -> NoReturn:
    """A user's mistake: one line on stderr, exit status 2."""
    typer.echo(f"tileconv: {error}", err=True)
    raise typer.Exit(2)

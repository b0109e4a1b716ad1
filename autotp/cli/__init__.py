"""The command line has one file for each group of commands; `commands` puts them together."""

from __future__ import annotations

from autotp.cli.commands import app, main, run

__all__ = ["app", "main", "run"]

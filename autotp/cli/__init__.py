"""The command line: one file a group of commands, put together in `commands`."""

from __future__ import annotations

from autotp.cli.commands import app, main, run

__all__ = ["app", "main", "run"]

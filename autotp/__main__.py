"""`python -m autotp` runs the command `autotp`."""

from __future__ import annotations

from autotp.cli.commands import main

main()

"""Renders templates that extend `base.html.j2`. Every value is escaped, and the page allows no script but its own."""

from __future__ import annotations

import base64
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autotp.errors import InputError


def require() -> None:
    """Refuses to go on where pages cannot be made.

    Raises:
        InputError: jinja2 is not installed.
    """
    if find_spec("jinja2") is None:
        raise InputError("a page needs jinja2, which is not installed: pip install 'autotp[report]'")


def render(template: Path, *, script: str = "", **values: Any) -> str:
    """Returns the page.

    Args:
        template: Its file, which extends `base.html.j2`.
        script: The one script of the page. Its digest is in the page's policy, so a browser runs no other one.
        values: What the template names.

    Raises:
        InputError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise InputError("a page needs jinja2, which is not installed: pip install 'autotp[report]'") from error
    loader = FileSystemLoader((template.parent, Path(__file__).parent))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text: str = environment.get_template(template.name).render(policy=policy, script=script, **values)
    return text

"""Model types whose config needs a hand. Test data: the library itself knows no model by name.

`FIELDS[model_type] = (arguments of the default config, fields to set after shrinking)`.
"""

from __future__ import annotations

from typing import Any

FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

"""Pages of one HTML file each: one stylesheet, no network, light and dark."""

from __future__ import annotations

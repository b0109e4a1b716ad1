"""Small configs like large ones: `autotp.twin.shrink` under the name that tests know it by."""

from autotp.twin.shrink import shrink_config, sizes_like

__all__ = ["shrink_config", "sizes_like"]

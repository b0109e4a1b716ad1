"""Parameters as DTensors over the tp mesh."""

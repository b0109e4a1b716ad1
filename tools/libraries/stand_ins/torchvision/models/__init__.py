"""Names without anything behind them, see the package."""

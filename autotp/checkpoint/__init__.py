"""Models from files and back, a rank's part at a time."""

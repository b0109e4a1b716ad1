"""Holds small models in the idioms of other people's code as values, and writes the text of each."""

"""Small models in the idioms of other people's code, as values, and the text of each."""

"""From text to a corpus of tokens, once."""

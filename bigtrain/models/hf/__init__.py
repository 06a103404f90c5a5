"""Models of transformers: built, initialised, loaded, and written so that transformers opens them."""

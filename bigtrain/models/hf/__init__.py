"""Models of transformers: built, initialised, loaded and exported."""

"""Between a model and the people who read or load it: the flat single file."""

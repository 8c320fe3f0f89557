"""The command line, `hf-moe`. It may import everything; nothing imports it."""

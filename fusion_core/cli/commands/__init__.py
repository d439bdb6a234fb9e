"""One file for each command: a function of the file's own name."""

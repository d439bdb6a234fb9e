"""One file for each command: it defines a function with the file's name."""

"""Applications to run, to read and to start your own from."""

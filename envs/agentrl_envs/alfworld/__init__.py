"""ALFWorld in pure Python: an engine for its game files, a generator of games, and experts."""

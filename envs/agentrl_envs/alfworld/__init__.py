"""ALFWorld's rules and text in pure Python: game files, an engine for them, a generator of games, and experts."""

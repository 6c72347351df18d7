"""Planning: what a run needs, and what is missing, found before it starts."""

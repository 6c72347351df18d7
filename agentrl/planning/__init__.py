"""Planning: what a run needs, and what this machine lacks, found before the run starts."""

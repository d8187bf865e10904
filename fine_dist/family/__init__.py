"""A family of targets: its settings, its grid, the packs it becomes, running them, and what became of each."""

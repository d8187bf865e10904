"""A family of targets: its settings, its grid, its packs, their training, and the files and summary of the targets."""

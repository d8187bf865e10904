"""What all packages share: errors, atomic files, processes, settings, the command line, grids. No torch."""

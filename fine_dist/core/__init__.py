"""What every room rests on: errors, atomic files, processes, settings, the command line, grids. No torch."""

"""What `python -m fine_dist.benchmark` measures; each module has `run(quick) -> list[Row]`."""

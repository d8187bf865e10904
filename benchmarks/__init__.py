"""What `python -m benchmarks` measures; each module has `run(quick) -> list[BenchmarkRow]`."""

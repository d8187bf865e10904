"""Estimates of a job before it starts: memory, the time of a step, and scaling to many processes."""

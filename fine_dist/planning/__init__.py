"""What a job will need, before it starts: memory, time of a step, many processes."""

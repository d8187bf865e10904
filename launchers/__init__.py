"""Where jobs run: `here`, a local pool, SLURM through submitit, Ray. `launch` is what every command calls."""

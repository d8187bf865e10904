"""A family of targets: its grid, the packs it becomes, running them, and the table of what became of each."""

from fine_dist.family.grid import DomainConfig, Family, InitConfig, Member, expand, run_dir_of

__all__ = ["DomainConfig", "Family", "InitConfig", "Member", "expand", "run_dir_of"]

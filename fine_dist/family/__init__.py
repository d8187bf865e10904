"""A family of targets: its settings, its grid, the packs it becomes, running them, and what became of each."""

from fine_dist.family.config import DomainConfig, InitConfig
from fine_dist.family.grid import Family, Member, expand, run_dir_of

__all__ = ["DomainConfig", "Family", "InitConfig", "Member", "expand", "run_dir_of"]

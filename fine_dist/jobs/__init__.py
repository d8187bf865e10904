"""Jobs: what one is, a grid's points, and the durable table of what became of each task."""

from fine_dist.jobs.points import Axis, Point, expand
from fine_dist.jobs.spec import Finding, JobSpec, Room, Task, check_name
from fine_dist.jobs.table import FINAL, Claim, Row, State, StateTable, Submissions

__all__ = [
    "FINAL",
    "Axis",
    "Claim",
    "Finding",
    "JobSpec",
    "Point",
    "Room",
    "Row",
    "State",
    "StateTable",
    "Submissions",
    "Task",
    "check_name",
    "expand",
]

"""Trackers of a run: TensorBoard, Weights & Biases, MLflow, or a class of another package.

`metrics.jsonl` is the record of a run, and trackers display it: one that fails is dropped for the rest of the run, with
one warning, and training continues. Another package adds a tracker by an entry point of the group
`fine_dist.trackers` that names a class with the methods of `Tracker`. No tracker's library is imported before a run
opens it, and this module is read without torch, because settings name trackers.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, cast

from pydantic import BeforeValidator

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

CLOSE_S = 60.0
"""Seconds that a tracker gets to send its remaining data when a run ends; a server that hangs delays no exit longer."""
FINAL = "final/"
"""Prefix of a run's final numbers. Every stage uses the same names, so that a table of runs compares stages."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker displays."""

    folder: Path
    """The run directory."""
    step: int = 0
    """Updates that are done. An earlier start may have logged later steps, which are no longer valid."""
    config: str = ""
    """The run's settings as YAML or JSON text; empty: no settings are displayed."""

    @property
    def name(self) -> str:
        """The run directory as a user would type it: relative if it is below the working directory."""
        relative = os.path.relpath(self.folder)
        return self.folder.name if relative.startswith(("..", ".")) else relative


class Tracker(Protocol):
    """Displays one run. The constructor takes a `TrackedRun`. An exception in a method disables the tracker, not the
    run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag, such as `train/loss`."""

    def images(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Log images [3 or 1, H, W] in 0..1 by tag."""

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Log the distributions of tensors of any shape, by tag."""

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Log texts (Markdown) by tag."""

    def hparams(self, step: int, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        """Add the finished run to a table of runs: settings by name, final numbers by tag."""

    def close(self) -> None:
        """Called when the run ends or is interrupted."""


class Trackers:
    """The trackers of one run. A tracker that raises is dropped with a warning.

    Args:
        run: The run.
        names: Names of trackers, as in the setting `engine.tracker`.
    """

    def __init__(self, run: TrackedRun, names: Sequence[str]) -> None:
        self._open: dict[str, Tracker] = {}
        for name in names:
            try:
                self._open[name] = _load_class(name)(run)
            except Exception as error:
                self._leave_out(name, error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag."""
        self._all("scalars", step, values)

    def images(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Log images [3 or 1, H, W] in 0..1 by tag."""
        self._all("images", step, images)

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Log the distributions of tensors by tag."""
        self._all("histograms", step, values)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Log texts (Markdown) by tag."""
        self._all("texts", step, values)

    def finish(self, step: int, settings: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        """Add the finished run to the tables of runs.

        Args:
            settings: By name. Only numbers, strings and booleans are logged.
            losses: The run's last losses. Measured losses are logged as `final/NAME`, the training loss only if there
                are none.
        """
        plain = {key: value for key, value in settings.items() if isinstance(value, (int, float, str, bool))}
        measured = [key for key in losses if not key.startswith(("raw_", "loss"))] or ["loss"]
        self._all("hparams", step, plain, {f"{FINAL}{key}": losses[key] for key in measured})

    def close(self) -> None:
        """Close all trackers; one that takes longer than `CLOSE_S` is abandoned."""
        for name, tracker in self._open.items():
            closing = threading.Thread(target=self._close, args=(name, tracker), daemon=True)
            closing.start()
            closing.join(CLOSE_S)
            if closing.is_alive():
                log.warning("tracker %s still sends after %g s and is left behind", name, CLOSE_S)
        self._open = {}

    def _close(self, name: str, tracker: Tracker) -> None:
        try:
            tracker.close()
        except Exception as error:
            self._leave_out(name, error)

    def _all(self, method: str, *values: Any) -> None:
        for name, tracker in list(self._open.items()):
            try:
                getattr(tracker, method)(*values)
            except Exception as error:
                del self._open[name]
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning(
            "tracker %s failed and shows no more of this run (%s); the numbers are in metrics.jsonl", name, reason
        )


# --- names of trackers -----------------------------------------------------------------------------------------------

ENTRY_POINTS = "fine_dist.trackers"
_BUILT_IN = {
    "tensorboard": "fine_dist.engine.tracker_services:TensorBoardTracker",
    "wandb": "fine_dist.engine.tracker_services:WandbTracker",
    "mlflow": "fine_dist.engine.tracker_services:MlflowTracker",
}
"""Built-in trackers as MODULE:CLASS, imported when a run opens them; each needs the library that it is named after."""
_CLASSES = {**{point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS)}, **_BUILT_IN}


def _as_list(value: Any) -> Any:
    """A single name as a list of one; `none` as an empty list."""
    value = [value] if isinstance(value, str) or value is None else value
    return [name for name in value if name not in ("none", None)] if isinstance(value, (list, tuple)) else value


_NAMES = (*_BUILT_IN, *(name for name in _CLASSES if name not in _BUILT_IN), "none")
_LEGAL: Any = cast(Any, Literal)[_NAMES]
TrackerNames: Any = Annotated[cast(Any, tuple)[_LEGAL, ...], BeforeValidator(_as_list)]
"""Annotation of the setting `engine.tracker`: one name or several."""


def _load_class(name: str) -> Callable[[TrackedRun], Tracker]:
    module, _, attribute = _CLASSES[name].partition(":")
    tracker_class: Callable[[TrackedRun], Tracker] = getattr(importlib.import_module(module), attribute)
    return tracker_class


def check_installed(names: Sequence[str]) -> None:
    """Raise `ModuleNotFoundError`, which a command answers with the extra to install, for a library that is absent."""
    for name in names:
        if name in _BUILT_IN and util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

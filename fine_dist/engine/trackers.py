"""Where the numbers and pictures of a run are shown while it trains: TensorBoard, Weights & Biases, MLflow.

`metrics.jsonl` is the record of a run, and trackers are views of it: one that fails is left out for the rest of the
run, with one warning, and training goes on. Another package adds a tracker by an entry point of the group
`fine_dist.trackers` that names a class with the methods of `Tracker`. No tracker's library is imported before a run
opens it, and this module is read without torch, because settings name trackers.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, cast

from pydantic import BeforeValidator

from fine_dist.core.errors import RunDirError
from fine_dist.core.files import write_atomic
from fine_dist.core.json_files import read_json
from fine_dist.core.retry import retry
from fine_dist.core.yaml_files import parse_yaml

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

CLOSE_S = 60.0
"""Seconds that a tracker gets to send what it still has when a run ends; a server that hangs delays no exit longer."""
FINAL = "final/"
"""Prefix of a run's final numbers: the same names in every stage, so that their tables of runs compare stages."""
LAYOUT = {
    "Stages 1 to 3": {
        "held-out loss": ["Multiline", ["train/held_out_loss$"]],
        "training loss, and its diffusion term": ["Multiline", ["train/loss$", "train/loss_diffusion$"]],
        "scores of samples": ["Multiline", ["train/(fid|sfid|kid|fd_.*|accuracy)$"]],
    },
    "Speed": {"images a second": ["Multiline", ["train/images_per_s$"]], "MFU": ["Multiline", ["train/mfu$"]]},
}
"""TensorBoard's page of custom scalars: runs of all stages in one chart for each quantity."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run that it shows."""

    folder: Path
    """The run directory."""
    step: int = 0
    """Updates that are done; an earlier start may have shown more, which then no longer hold."""
    config: str = ""
    """The run's settings as YAML or JSON text; empty: none are shown."""

    @property
    def name(self) -> str:
        """The folder as a user would type it: relative where it is below the working directory."""
        relative = os.path.relpath(self.folder)
        return self.folder.name if relative.startswith(("..", ".")) else relative


class Tracker(Protocol):
    """Shows one run. Made with a `TrackedRun`; whatever a method raises ends this tracker's part, never the run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by tag, such as `train/loss`."""

    def images(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Images [3 or 1, H, W] in 0..1 by tag."""

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Tensors of any shape by tag, whose distribution is shown."""

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Texts (Markdown) by tag."""

    def hparams(self, step: int, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        """The run as a row of a table of runs, when it has finished: settings by name, final numbers by tag."""

    def close(self) -> None:
        """The run ends, or is interrupted."""


class TensorBoardTracker:
    """Event files in the run directory itself, so that TensorBoard calls a run by its folder."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes two seconds, on rank 0 alone

        _silence_writer_threads()
        self.folder = str(run.folder)
        self.board = SummaryWriter(self.folder, purge_step=run.step + 1 if run.step else None)
        if run.config:
            self.board.add_text("config", f"```yaml\n{run.config}\n```", run.step)
            self.board.add_custom_scalars(LAYOUT)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add("add_scalar", name, value, step)

    def images(self, step: int, images: Mapping[str, Tensor]) -> None:
        for name, image in images.items():
            self._add("add_image", name, image, step)

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._add("add_histogram", name, value, step)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        for name, value in values.items():
            self._add("add_text", name, value, step)

    def hparams(self, step: int, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        # `SummaryWriter.add_hparams` would open a second writer in a subfolder, and the run would show twice.
        self.scalars(step, final)  # first, since whatever fails is then met by a method that tries again
        writer: Any = self.board.file_writer
        for summary in hparams(dict(settings), dict(final)):
            writer.add_summary(summary)

    def close(self) -> None:
        self.board.close()

    def _add(self, method: str, *values: Any) -> None:
        """Write an event; after a failure of the storage to a new file, because a writer that failed is dead."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            getattr(self.board, method)(*values)
        except OSError:
            self.board = retry(lambda: SummaryWriter(self.folder))
            getattr(self.board, method)(*values)


def _silence_writer_threads() -> None:
    """Keep the traceback of TensorBoard's writing thread off stderr: its error is raised in the main thread as well."""
    before = threading.excepthook
    if getattr(before, "silences_writers", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            before(args)

    hook.silences_writers = True  # type: ignore[attr-defined]
    threading.excepthook = hook


class WandbTracker:
    """Weights & Biases, by its own variables: WANDB_MODE=offline writes to RUN_DIR/wandb, WANDB_PROJECT is a project.

    A resumed run continues the same run there, by the id in RUN_DIR/trackers.json.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        ids = _ids(run.folder)
        ids.setdefault("wandb", secrets.token_hex(6))
        self.wandb, self.finished = wandb, not run.config  # a family's figure alone ends with itself
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fine_dist"),
            id=ids["wandb"],
            name=run.name,
            dir=str(run.folder),
            config=parse_yaml(run.config, "config") if run.config else None,
            resume="allow",
            reinit="create_new",  # the targets of a pack are several runs in one process
            settings=wandb.Settings(console="off", silent=True, login_timeout=30),
        )
        _keep_ids(run.folder, ids)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def images(self, step: int, images: Mapping[str, Tensor]) -> None:
        self.run.log({name: self.wandb.Image(_pixels(image)) for name, image in images.items()}, step=step)

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        shown = {name: self.wandb.Histogram(value.float().flatten().tolist()) for name, value in values.items()}
        self.run.log(shown, step=step)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        from html import escape

        shown = {name: self.wandb.Html(f"<pre>{escape(text)}</pre>") for name, text in values.items()}
        self.run.log(shown, step=step)

    def hparams(self, step: int, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        self.run.config.update(dict(settings), allow_val_change=True)
        self.run.summary.update(dict(final))
        self.finished = True

    def close(self) -> None:
        self.run.finish(exit_code=0 if self.finished else 1)


class MlflowTracker:
    """MLflow at MLFLOW_TRACKING_URI; without it, files in `mlruns/` of the working directory.

    Histograms are left out, which MLflow does not have. A resumed run continues the same run there.
    """

    def __init__(self, run: TrackedRun) -> None:
        # a server that does not answer is given up after seconds, not after MLflow's usual minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").absolute().as_uri()
        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self.client, self.finished = MlflowClient(uri), not run.config
        ids = _ids(run.folder)
        if "mlflow" not in ids:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fine_dist")
            found = self.client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self.client.create_experiment(name)
            ids["mlflow"] = self.client.create_run(experiment, run_name=run.name).info.run_id
            _keep_ids(run.folder, ids)
        self.id = ids["mlflow"]
        self.client.update_run(self.id, status="RUNNING")
        if run.config:
            self.client.log_text(self.id, run.config, "config.yaml")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, float(v), now, step) for name, v in values.items()])

    def images(self, step: int, images: Mapping[str, Tensor]) -> None:
        for name, image in images.items():
            self.client.log_image(self.id, _pixels(image), f"{name}/step_{step:08d}.png")

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        pass

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        for name, text in values.items():
            self.client.log_text(self.id, text, f"{name}/step_{step:08d}.md")

    def hparams(self, step: int, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        from mlflow.entities import Param

        known = self.client.get_run(self.id).data.params  # a parameter keeps its first value: MLflow's own rule
        new = [Param(name, str(value)) for name, value in settings.items() if name not in known]
        self.client.log_batch(self.id, params=new)
        self.scalars(step, final)
        self.finished = True

    def close(self) -> None:
        self.client.set_terminated(self.id, "FINISHED" if self.finished else "KILLED")


class Trackers:
    """The trackers of one run. A tracker that fails is left out from then on, with a warning.

    Args:
        names: As `engine.tracker` gives them.
    """

    def __init__(self, run: TrackedRun, names: Sequence[str]) -> None:
        self._open: dict[str, Tracker] = {}
        for name in names:
            try:
                self._open[name] = _class_of(name)(run)
            except Exception as error:
                self._leave_out(name, error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by tag."""
        self._all("scalars", step, values)

    def images(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Images [3 or 1, H, W] in 0..1 by tag."""
        self._all("images", step, images)

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Tensors by tag."""
        self._all("histograms", step, values)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Texts (Markdown) by tag."""
        self._all("texts", step, values)

    def finish(self, step: int, settings: Mapping[str, Any], losses: Mapping[str, float]) -> None:
        """Add the finished run to the tables of runs.

        Args:
            settings: By name; those that are no numbers, texts or flags are left out.
            losses: The run's last losses. The measured ones are shown as `final/NAME`, the training loss only where
                nothing was measured.
        """
        plain = {key: value for key, value in settings.items() if isinstance(value, (int, float, str, bool))}
        measured = [key for key in losses if not key.startswith(("raw_", "loss"))] or ["loss"]
        self._all("hparams", step, plain, {f"{FINAL}{key}": losses[key] for key in measured})

    def close(self) -> None:
        """Close all; one that takes longer than a minute is left behind."""
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
        said = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning(
            "tracker %s failed and shows no more of this run (%s); the numbers are in metrics.jsonl", name, said
        )


# --- which there are -------------------------------------------------------------------------------------------------

ENTRY_POINTS = "fine_dist.trackers"
_LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Built-in trackers, and the library that each needs."""
_CLASSES: dict[str, Any] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker, "mlflow": MlflowTracker}
_OTHERS = {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINTS) if point.name not in _CLASSES}


def _listed(value: Any) -> Any:
    """`wandb` is `[wandb]`, and `none` no tracker."""
    value = [value] if isinstance(value, str) or value is None else value
    return [name for name in value if name not in ("none", None)] if isinstance(value, (list, tuple)) else value


_NAMES = (*_CLASSES, *_OTHERS, "none")
_LEGAL: Any = cast(Any, Literal)[_NAMES]
TrackerNames: Any = Annotated[cast(Any, tuple)[_LEGAL, ...], BeforeValidator(_listed)]
"""Annotation of the setting: one name or several."""


def _class_of(name: str) -> Any:
    if name in _CLASSES:
        return _CLASSES[name]
    module, _, attribute = _OTHERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_installed(names: Sequence[str]) -> None:
    """Raise `ModuleNotFoundError`, which a command answers with the extra to install, for a library that is absent."""
    for name in names:
        library = _LIBRARIES.get(name)
        if library and util.find_spec(library) is None:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)


def _ids(folder: Path) -> dict[str, str]:
    """Names of this run in trackers that keep runs elsewhere."""
    try:
        found = read_json(folder / "trackers.json", RunDirError, "remove it: the run then appears anew in its trackers")
    except FileNotFoundError:
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _keep_ids(folder: Path, ids: Mapping[str, str]) -> None:
    write_atomic(folder / "trackers.json", json.dumps(dict(ids), indent=1) + "\n")


def _pixels(image: Tensor) -> Any:
    """An image [C, H, W] in 0..1 as bytes [H, W, 3], which every library takes."""
    levels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return levels.expand(3, *levels.shape[1:]).permute(1, 2, 0).numpy()

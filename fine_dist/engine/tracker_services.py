"""The built-in trackers: TensorBoard, Weights & Biases and MLflow, each behind the interface `trackers.Tracker`.

Each class imports its library when it is made, so that a run pays only for the trackers that it uses.

Shapes: C channels (1 or 3), H and W sides of an image.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.core.errors import RunDirError
from fine_dist.core.files import write_atomic
from fine_dist.core.json_files import read_json
from fine_dist.core.retry import retry
from fine_dist.core.yaml_files import parse_yaml
from fine_dist.engine.trackers import TrackedRun

if TYPE_CHECKING:
    from torch import Tensor

LAYOUT = {
    "Stages 1 to 3": {
        "held-out loss": ["Multiline", ["train/held_out_loss$"]],
        "training loss, and its diffusion term": ["Multiline", ["train/loss$", "train/loss_diffusion$"]],
        "scores of samples": ["Multiline", ["train/(fid|sfid|kid|fd_.*|accuracy)$"]],
    },
    "Speed": {"images a second": ["Multiline", ["train/images_per_s$"]], "MFU": ["Multiline", ["train/mfu$"]]},
}
"""Layout of TensorBoard's custom scalars: one chart for each quantity, with the runs of all stages."""


class TensorBoardTracker:
    """Writes event files into the run directory itself, so that TensorBoard names a run by its folder."""

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
        self.scalars(step, final)  # first, because `_add` recovers from a failed write and the calls below do not
        writer: Any = self.board.file_writer
        for summary in hparams(dict(settings), dict(final)):
            writer.add_summary(summary)

    def close(self) -> None:
        self.board.close()

    def _add(self, method: str, *values: Any) -> None:
        """Write an event; after an I/O error write it to a new file, because TensorBoard's writer thread has ended."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            getattr(self.board, method)(*values)
        except OSError:
            self.board = retry(lambda: SummaryWriter(self.folder))
            getattr(self.board, method)(*values)


def _silence_writer_threads() -> None:
    """Suppress the traceback of TensorBoard's writer thread, whose error is raised in the main thread as well."""
    before = threading.excepthook
    if getattr(before, "silences_writers", False):
        return

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            before(args)

    hook.silences_writers = True  # type: ignore[attr-defined]
    threading.excepthook = hook


class WandbTracker:
    """Weights & Biases, configured by its environment variables, such as WANDB_MODE=offline and WANDB_PROJECT.

    A resumed run continues the same W&B run, whose id is in RUN_DIR/trackers.json.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        ids = _read_ids(run.folder)
        ids.setdefault("wandb", secrets.token_hex(6))
        # A run without settings is a single figure of a family, which is complete when it is logged.
        self.wandb, self.finished = wandb, not run.config
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
        _write_ids(run.folder, ids)

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
    """MLflow at MLFLOW_TRACKING_URI, or by default in `mlruns/` of the working directory.

    MLflow has no histograms, so they are not logged. A resumed run continues the same MLflow run.
    """

    def __init__(self, run: TrackedRun) -> None:
        # A server that does not answer fails after seconds instead of MLflow's default of minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").absolute().as_uri()
        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self.client, self.finished = MlflowClient(uri), not run.config
        ids = _read_ids(run.folder)
        if "mlflow" not in ids:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fine_dist")
            known = self.client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self.client.create_experiment(name)
            ids["mlflow"] = self.client.create_run(experiment, run_name=run.name).info.run_id
            _write_ids(run.folder, ids)
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

        known = self.client.get_run(self.id).data.params  # MLflow refuses to change a parameter
        new = [Param(name, str(value)) for name, value in settings.items() if name not in known]
        self.client.log_batch(self.id, params=new)
        self.scalars(step, final)
        self.finished = True

    def close(self) -> None:
        self.client.set_terminated(self.id, "FINISHED" if self.finished else "KILLED")


def _read_ids(folder: Path) -> dict[str, str]:
    """The ids of this run in services that store runs elsewhere, by tracker; empty before the first start."""
    try:
        values = read_json(
            folder / "trackers.json", RunDirError, "remove it: the run then appears anew in its trackers"
        )
    except FileNotFoundError:
        return {}
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}


def _write_ids(folder: Path, ids: Mapping[str, str]) -> None:
    write_atomic(folder / "trackers.json", json.dumps(dict(ids), indent=1) + "\n")


def _pixels(image: Tensor) -> Any:
    """An image [C, H, W] in 0..1 as uint8 [H, W, 3], which every library accepts."""
    levels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return levels.expand(3, *levels.shape[1:]).permute(1, 2, 0).numpy()

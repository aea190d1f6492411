"""Lightning's interface to Trackio, which Lightning itself does not have."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class TrackioLogger(Logger):
    """Logs to Trackio (https://github.com/gradio-app/trackio), Hugging Face's experiment tracker.

    Args:
        project: its name; created where it does not exist.
        name: of the run; null is a name that Trackio chooses.
        group: of the run.
        space_id: USER/NAME of a Space to log to; null is the local database.

    Raises:
        ValueError: Trackio is not installed.
    """

    def __init__(
        self,
        project: str = "slipstream",
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
    ) -> None:
        super().__init__()
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("trackio is not installed: pip install trackio") from error
        self._trackio = trackio
        self._project = project
        self._settings: dict[str, Any] = {"name": name, "group": group, "space_id": space_id}
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        """Name of the Trackio project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's name, None before the first metric."""
        return self._settings["name"]

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, started when first needed: its config cannot change later."""
        if self._run is None:
            self._run = self._trackio.init(
                self._project, config=self._config, embed=False, resume="allow", **self._settings
            )
            self._settings["name"] = self._run.name
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        """The run's config, known before its first metric."""
        self._config |= _convert_params(params if isinstance(params, Namespace) else dict(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Metrics of one optimiser step."""
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait until all metrics are stored; a later metric resumes the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None

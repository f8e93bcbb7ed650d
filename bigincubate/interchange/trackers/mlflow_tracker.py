"""Send metrics to an MLflow server, or write them to a database for MLflow."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import MissingDependencyError
from ...files import make_folder
from .base import Row, TrackedPhase

ID_TAG, GROUP_TAG, PHASE_TAG = "bigincubate.id", "bigincubate.run", "bigincubate.phase"
MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH = 1000, 100, 500  # limits per request; and of a value, in older versions
SQLITE = "sqlite:///"


class MlflowTracker:
    """Writes one MLflow run per phase.

    Args:
        uri: Tracking URI: ``http://…``, ``sqlite:///…`` or ``file:…``.
        experiment: Name of the experiment; created if it does not exist.

    Raises:
        MissingDependencyError: MLflow is not installed.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise MissingDependencyError(f"this needs MLflow ({error}); install it: pip install mlflow") from None
        if uri.startswith(SQLITE):
            make_folder(Path(uri.removeprefix(SQLITE)).parent)
        for name in ("alembic", "mlflow.store.db.utils"):  # they log every step of creating a database
            logging.getLogger(name).setLevel(logging.WARNING)
        self.uri, self.name = uri, experiment
        self.client = MlflowClient(tracking_uri=uri)
        self.experiment: str = self._find_experiment()

    def open(self, phase: TrackedPhase) -> MlflowRecord:
        """Open the run of a phase."""
        return MlflowRecord(self.client, self.experiment, phase)

    def describe(self, group: str) -> str:
        """Return how to find the runs."""
        return f"MLflow: {self.uri}, experiment {self.name!r}, runs with the tag {GROUP_TAG} = {group!r}"

    def _find_experiment(self) -> str:
        """Return the ID of the experiment, and create it if needed. Another process may create it at the same time."""
        found = self.client.get_experiment_by_name(self.name)
        if found is None:
            try:
                return str(self.client.create_experiment(self.name))
            except Exception:
                found = self.client.get_experiment_by_name(self.name)
                if found is None:
                    raise
        return str(found.experiment_id)


class MlflowRecord:
    """The MLflow run of one phase, found by its tag. Values that the run already has for a step are not sent again.

    Args:
        client: Client of the server.
        experiment: ID of the experiment.
        phase: The phase.
    """

    def __init__(self, client: Any, experiment: str, phase: TrackedPhase) -> None:
        self.client = client
        found = client.search_runs([experiment], f"tags.`{ID_TAG}` = '{phase.id}'", max_results=1)
        tags = {ID_TAG: phase.id, GROUP_TAG: phase.group, PHASE_TAG: phase.key}
        run = found[0] if found else client.create_run(experiment, tags=tags, run_name=f"{phase.group}/{phase.key}")
        self.run, self.status = run.info.run_id, run.info.status
        for key, value in tags.items():
            if run.data.tags.get(key) != value:  # the run directory was renamed
                client.set_tag(self.run, key, value)
        self._add_params(phase.config, run.data.params)
        self.recorded: dict[str, set[int]] = {
            key: {point.step for point in client.get_metric_history(self.run, key)} for key in run.data.metrics
        }

    def append(self, rows: Sequence[Row]) -> int:
        """Send the metrics of the steps that the run does not have."""
        missing = list(self._missing(rows))
        self._send(missing)
        return len({step for _, _, step in missing})

    def finish(self, summary: Mapping[str, float]) -> None:
        """Record the result as metrics of the last step, and mark the run as finished."""
        self._send(list(self._missing([{"step": int(summary["result/steps"]), **summary}])))
        if self.status != "FINISHED":
            self.client.set_terminated(self.run)
            self.status = "FINISHED"

    def close(self) -> None:
        """Do nothing: every request is complete."""

    def _missing(self, rows: Sequence[Row]) -> Iterator[tuple[str, float, int]]:
        for row in rows:
            for key, value in row.items():
                if key != "step" and row["step"] not in self.recorded.get(key, ()):
                    yield key, value, row["step"]

    def _send(self, points: Sequence[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        for start in range(0, len(points), MAX_METRICS):
            some = points[start : start + MAX_METRICS]
            self.client.log_batch(self.run, metrics=[Metric(key, value, now, step) for key, value, step in some])
            for key, _, step in some:
                self.recorded.setdefault(key, set()).add(step)

    def _add_params(self, config: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Record the settings that are missing. MLflow does not allow changing the value of a parameter."""
        from mlflow.entities import Param

        new = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in config.items() if key not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.run, params=new[start : start + MAX_PARAMS])

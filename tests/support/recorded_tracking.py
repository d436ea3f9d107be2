"""A tracking client that keeps what it is given to log, without MLflow."""

from pathlib import Path
from typing import Any


class RecordedTracking:
    """Records results by key, the names of files by folder, and JSON files by name."""

    def __init__(self) -> None:
        self.client = self
        self.results: dict[str, float] = {}
        self.files: dict[str, list[str]] = {}
        self.texts: dict[str, Any] = {}

    def log_results(self, run_id: str, values: dict[str, float], prefix: str = "") -> None:
        self.results |= {prefix + key: value for key, value in values.items()}

    def log_artifact(self, run_id: str, file: str, folder: str = "") -> None:
        assert Path(file).exists()
        self.files.setdefault(folder, []).append(Path(file).name)

    def log_figure(self, run_id: str, file: Path, title: str) -> None:
        self.log_artifact(run_id, str(file), "figures")

    def log_artifacts(self, run_id: str, path: str, folder: str = "") -> None:
        self.files.setdefault(folder, []).extend(sorted(file.name for file in Path(path).iterdir()))

    def log_dict(self, run_id: str, value: Any, name: str) -> None:
        self.texts[name] = value

"""Which decisions a reader is shown: the newest run's, or the shipped sample's."""

from pathlib import Path

from caching_heuristics import HeuristicConfig
from kvttl import user_path
from kvttl.decisions.log import read_records
from kvttl.settings import FILE_NAME as SETTINGS_FILE
from kvttl.settings import load_settings

FILE_NAME = "sample_decisions.jsonl"


def latest_log(data_folder: str | Path = "data") -> Path:
    """Return the folder of the newest run that has decisions; else the shipped sample.

    `read_records` takes either.

    Examples
    --------
    >>> latest_log("no/such/folder").name
    'sample_decisions.jsonl'
    """
    newest = {}  # folder -> when it was last written to
    for log in user_path(data_folder).glob("runs/*/*.jsonl"):
        newest[log.parent] = max(log.stat().st_mtime, newest.get(log.parent, 0.0))
    runs = sorted(newest, key=lambda folder: (newest[folder], folder.name), reverse=True)
    made = (run for run in runs if any(r.ttl_s for r in read_records(run, ("generation",))))
    return next(made, user_path(data_folder) / FILE_NAME)


def settings_of(log: str | Path) -> HeuristicConfig:
    """Return the settings that a run was made with: those in its folder, else the defaults."""
    log = user_path(log)
    return load_settings(log / SETTINGS_FILE) if log.is_dir() else HeuristicConfig()

"""Figures for a paper: PNG (300 dpi), SVG and PDF that carry the settings they were made with.

Equal figures and settings give equal bytes: no file holds a date or a random id.
"""

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from caching_heuristics import HeuristicConfig
from kvttl import plain_name, user_path
from kvttl.decisions.log import DecisionRecord
from kvttl.plots import decision_plots as plots
from kvttl.plots.panels import LOOK

SIDECAR = "settings.json"
DPI = 300

_TITLE = "KV cache TTL kit"


def all_figures(config: HeuristicConfig, records: Iterable[DecisionRecord]) -> dict[str, Figure]:
    """Return every figure of these settings and this run, by file name."""
    records = list(records)
    return {
        "ttl_curves": plots.ttl_curves(config),
        "ttl_surface": plots.ttl_surface(config),
        "tier_map_time_variance": plots.tier_map(config, "time_variance", records),
        "tier_map_seconds_since_access": plots.tier_map(config, "seconds_since_access", records),
        "decision_distributions": plots.decision_distributions(records, config),
        "timeline": plots.plot_timeline(records),
    }


def export_plots(
    folder: str | Path,
    name: str,
    figures: Mapping[str, Figure],
    config: HeuristicConfig,
    **facts: object,
) -> list[Path]:
    """Write each figure as PNG, SVG and PDF, and a JSON file that says how they were made.

    Parameters
    ----------
    folder : str or Path
        Of all exports; the files go to ``<folder>/<name>/``.
    name : str
        A folder's name, in any alphabet; what it held under the same names is replaced.
    figures : mapping
        File name without suffix -> figure.
    config : HeuristicConfig
        Becomes the files' metadata.
    **facts
        More of what the sidecar should say (JSON values), such as the log's name.

    Returns
    -------
    list of Path
        The files, the sidecar last.

    Raises
    ------
    ValueError
        A name that not every system can open, or that leaves the folder.
    """
    target = user_path(folder) / plain_name(name, "the export")
    figures = {plain_name(stem, "the figure"): figure for stem, figure in figures.items()}
    target.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(config.to_dict(), sort_keys=True)
    paths = []
    for stem, figure in figures.items():
        for kind, metadata in _metadata(stem, settings).items():
            paths.append(target / f"{stem}.{kind}")
            with matplotlib.rc_context(LOOK):
                figure.savefig(paths[-1], dpi=DPI, metadata=metadata)
    sidecar = {
        "settings": config.to_dict(),
        "figures": [path.name for path in paths],
        "png_dpi": DPI,
        "versions": {name: version(name) for name in ("matplotlib", "numpy")},
        **facts,
    }
    paths.append(target / SIDECAR)
    paths[-1].write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    return paths


def _metadata(title, settings):
    """Return each format's metadata; the settings are under a key that the format knows."""
    return {
        "png": {"Title": title, "Software": _TITLE, "Settings": settings},
        "svg": {"Title": title, "Creator": _TITLE, "Description": settings, "Date": None},
        "pdf": {"Title": title, "Creator": _TITLE, "Keywords": settings, "CreationDate": None},
    }

"""report.html of a training run: what came out, how it got there, where it fails, and how to run it again.

The page reads the run folder; for example pictures it opens the data, for group pictures it loads the model. Whatever
of this is missing is said on the page in its place, and the rest stands. Nothing on the page points outside it.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.engine.files import atomic_write
from coterie.inspect import page
from coterie.inspect.charts import short
from coterie.inspect.language import TEXT, language_report
from coterie.inspect.network import Network, open_run
from coterie.inspect.report_curves import curves_section, is_number, pretty, training_seconds
from coterie.inspect.report_groups import choose_samples, groups_section
from coterie.inspect.report_results import Results, read_results
from coterie.inspect.report_setup import data_section, setup_section
from coterie.inspect.runs import Run, read_run

logger = logging.getLogger("coterie.inspect")

REPORT = "report.html"
SUMMARIES = {"class": ("accuracy",), "label_map": ("miou",), "instances": ("mask_ap", "ap")}
"""The figure by which runs are compared, for each target; the first that was logged."""


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a run folder.
    """
    run = read_run(run_dir)
    if run.target == TEXT:
        return atomic_write(run.folder / REPORT, language_report(run))
    source, network = _open_source(run), _open_network(run)
    return atomic_write(run.folder / REPORT, build_report(run, source, network))


def build_report(run: Run, source: Any | None, network: Network | None) -> str:
    """The report's HTML. `source` is the opened data of the run, `network` its model; None where one cannot be had."""
    classes = _class_names(run, source)
    results = read_results(run, classes, source, network)
    sections: list[tuple[str, str, str]] = [("overview", "Overview", _overview(run, classes, results))]
    if run.train or run.evals:
        sections.append(("curves", "Curves", curves_section(run, _shares(run))))
    if results is not None:
        sections += results.sections
    else:
        resume = f"coterie train --resume {shlex.quote(run.folder.as_posix())}"
        message = (
            "There are no predictions of the test split, so nothing can be said about its classes and images. They are "
            f"written when training ends; a run that was stopped goes on with: {resume}"
        )
        sections.append(("results", "Results", page.note(message)))
    if network is not None:
        chosen = results.worth_a_look if results is not None else choose_samples(run, source)
        sections.append(("groups", "Groups", groups_section(network, run, classes, source, chosen)))
    sections.append(("data", "Data", data_section(run, classes, source)))
    sections.append(("setup", "Setup", setup_section(run)))
    kicker = " · ".join(
        str(p) for p in (run.setting("model.name"), run.source.get("name") or run.data, "training report") if p
    )
    figures = headline(run, network, results)
    return page.page(run.folder.resolve().name, figures, sections, kicker=kicker, footer=page.FOOTER)


def headline(run: Run, network: Network | None = None, results: Results | None = None) -> list[tuple[str, str]]:
    """The figures of the header, the most important first; only those that are known."""
    results = results or read_results(run, _class_names(run, None), None, None)
    figures: list[tuple[str, str]] = [*results.headline] if results else []
    evals, train = run.evals, run.train
    summary = _summary(run)
    best = max((e for e in evals if is_number(e.get(summary))), key=lambda e: e[summary], default=None)
    if best is not None:
        figures.append((f"best {run.monitored} {pretty(summary)}", f"{best[summary]:.2%}"))
    if evals and is_number(evals[-1].get("loss")):
        figures.append((f"{run.monitored} loss", short(evals[-1]["loss"])))
    elif train and is_number(train[-1].get("loss")):
        figures.append(("training loss", short(train[-1]["loss"])))
    done = max((e["epoch"] for e in train + evals if is_number(e.get("epoch"))), default=None)
    if done is not None and run.setting("train.epochs"):
        figures.append(("epochs", f"{done:.4g} of {run.setting('train.epochs')}"))
    if network is not None:
        figures.append(("parameters", short(network.parameters)))
    speeds = sorted(e["images_per_s"] for e in train if is_number(e.get("images_per_s")))
    if speeds:
        figures.append(("images/s", short(speeds[len(speeds) // 2])))
    seconds = training_seconds(run)
    if seconds:
        figures.append(("training time", _duration(seconds)))
    return figures


def _overview(run: Run, classes: Sequence[str], results: Results | None) -> str:
    model, data = run.setting("model.name", "A network"), run.source.get("name") or run.data
    sentence = f"<b>{page.text(model)}</b> trained"
    task = run.setting("task.name", "classification")
    if task != "classification":
        sentence += f" for {page.text(task.replace('-', ' '))}"
    if data:
        sentence += f" on <b>{page.text(data)}</b>"
    if classes:
        sentence += f" ({len(classes)} class{'es' if len(classes) != 1 else ''})"
    if run.setting("train.epochs"):
        size, rate = run.setting("train.batch_size", "?"), run.setting("optim.lr", "?")
        sentence += page.text(f" for {run.setting('train.epochs')} epochs, {size} images a step, learning rate {rate}")
    out = page.lede(sentence + ".")
    if results is not None:
        out += page.lede(page.text(results.sentence))
    warnings = list(run.notes)
    losses = [e.get("loss") for e in run.train]
    if any(isinstance(loss, float) and not math.isfinite(loss) for loss in losses):
        warnings.append(
            "The training loss became NaN or infinite. A lower learning rate, a longer warm-up or gradient clipping "
            "usually helps."
        )
    return out + "".join(page.note(message, warn=True) for message in warnings)


def _summary(run: Run) -> str:
    names = SUMMARIES.get(run.target, SUMMARIES["class"])
    return next((name for name in names if any(name in event for event in run.evals)), names[-1])


def _shares(run: Run) -> list[str]:
    """The logged figures that are shares and belong into one chart, the one that runs are compared by first."""
    keys = sorted({key for event in run.evals for key in event})
    if run.target == "instances":
        kinds = ("", "50", "75")
        return [f"{_summary(run)}{kind}" for kind in kinds] + (["ap"] if _summary(run) != "ap" else [])
    found = [key for key in keys if "accuracy" in key or key == "miou"]
    return sorted(found, key=lambda key: (key != _summary(run), key))


def _open_source(run: Run) -> Any | None:
    from coterie.data import open_data

    if run.data is None:
        return None
    size = run.setting("transform.image_size")
    try:
        return open_data(run.data, target=run.target, image_size=tuple(size) if isinstance(size, list) else size)
    except (OSError, ValueError, TypeError, ImportError) as error:
        _missing(run, f"The data {run.data} cannot be opened here, so pictures are missing", error)
        return None


def _open_network(run: Run) -> Network | None:
    try:
        return open_run(run.folder)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
        _missing(run, "The network cannot be loaded, so its groups are not shown", error)
        return None


def _missing(run: Run, what: str, error: Exception) -> None:
    message = f"{what}: {' '.join(str(error).split()) or type(error).__name__}"
    logger.warning("report: %s", message)
    run.notes.append(message)


def _class_names(run: Run, source: Any | None) -> list[str]:
    count = None
    if run.predictions is not None:
        count = run.predictions.probabilities.shape[1]
    elif run.label_maps is not None:
        count = run.label_maps.confusions.shape[1]
    for names in (run.source.get("classes"), getattr(source, "classes", None)):
        if isinstance(names, list) and (count is None or len(names) == count):
            return [str(name) for name in names]
    if run.detections is not None and len(run.detections.labels):
        count = int(run.detections.labels.max()) + 1
    return [f"class {index}" for index in range(count or 0)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

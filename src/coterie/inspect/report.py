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
from coterie.inspect.charts import Series, line_chart, short, smooth
from coterie.inspect.network import Network, open_run
from coterie.inspect.report_groups import groups_section
from coterie.inspect.results import classes_section, confusion_section, examples_section
from coterie.inspect.runs import CONFIG, ENVIRONMENT, Run, read_run

logger = logging.getLogger("coterie.inspect")

REPORT = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not a run folder.
    """
    run = read_run(run_dir)
    source, network = _open_source(run), _open_network(run)
    return atomic_write(run.folder / REPORT, build_report(run, source, network))


def build_report(run: Run, source: Any | None, network: Network | None) -> str:
    """The report's HTML. `source` is the opened data of the run, `network` its model; None where one cannot be had."""
    classes = _class_names(run, source)
    sections: list[tuple[str, str, str]] = [("overview", "Overview", _overview(run, classes))]
    if run.train or run.evals:
        sections.append(("curves", "Curves", _curves(run)))
    if run.predictions is not None:
        sections += [
            ("confusion", "Confusion", confusion_section(run.predictions, classes)),
            ("classes", "Classes", classes_section(run.predictions, classes)),
            ("examples", "Examples", examples_section(run.predictions, classes, source)),
        ]
    else:
        resume = f"coterie train --resume {shlex.quote(run.folder.as_posix())}"
        message = (
            "There are no predictions of the test split, so no confusion matrix and no examples. They are written when "
            f"training ends; a run that was stopped goes on with: {resume}"
        )
        sections.append(("results", "Results", page.note(message)))
    if network is not None:
        sections.append(("groups", "Groups", groups_section(network, run, classes, source)))
    sections.append(("data", "Data", _data(run, classes, source)))
    sections.append(("setup", "Setup", _setup(run)))
    kicker = " · ".join(
        str(p) for p in (run.setting("model.name"), run.source.get("name") or run.data, "training report") if p
    )
    return page.page(run.folder.resolve().name, headline(run, network), sections, kicker=kicker, footer=page.FOOTER)


def headline(run: Run, network: Network | None = None) -> list[tuple[str, str]]:
    """The figures of the header, the most important first; only those that are known."""
    figures: list[tuple[str, str]] = []
    evals, train = run.evals, run.train
    if run.predictions is not None:
        figures.append(("test accuracy", f"{run.predictions.accuracy:.2%}"))
    best = max((e for e in evals if _number(e.get("accuracy"))), key=lambda e: e["accuracy"], default=None)
    if best is not None:
        figures.append((f"best {run.monitored} accuracy", f"{best['accuracy']:.2%}"))
    if evals and _number(evals[-1].get("loss")):
        figures.append((f"{run.monitored} loss", short(evals[-1]["loss"])))
    elif train and _number(train[-1].get("loss")):
        figures.append(("training loss", short(train[-1]["loss"])))
    done = max((e["epoch"] for e in train + evals if _number(e.get("epoch"))), default=None)
    if done is not None and run.setting("train.epochs"):
        figures.append(("epochs", f"{done:.4g} of {run.setting('train.epochs')}"))
    if network is not None:
        figures.append(("parameters", short(sum(p.numel() for p in network.model.parameters()))))
    speeds = sorted(e["images_per_s"] for e in train if _number(e.get("images_per_s")))
    if speeds:
        figures.append(("images/s", short(speeds[len(speeds) // 2])))
    seconds = training_seconds(run)
    if seconds:
        figures.append(("training time", _duration(seconds)))
    return figures


def training_seconds(run: Run) -> float:
    """Time spent in training steps, evaluations aside: from the logged speeds, so that breaks do not count."""
    size, seconds, before = run.setting("train.batch_size"), 0.0, 0.0
    for event in run.train:
        step, speed = event.get("step"), event.get("images_per_s")
        if isinstance(step, int | float) and _number(step):
            if _number(size) and isinstance(speed, int | float) and speed > 0:
                seconds += (step - before) * size / speed
            before = step
    return seconds


def _overview(run: Run, classes: Sequence[str]) -> str:
    model, data = run.setting("model.name", "A network"), run.source.get("name") or run.data
    sentence = f"<b>{page.text(model)}</b> trained"
    if data:
        sentence += f" on <b>{page.text(data)}</b>"
    if classes:
        sentence += f" ({len(classes)} class{'es' if len(classes) != 1 else ''})"
    if run.setting("train.epochs"):
        size, rate = run.setting("train.batch_size", "?"), run.setting("optim.lr", "?")
        sentence += page.text(f" for {run.setting('train.epochs')} epochs, {size} images a step, learning rate {rate}")
    out = page.lede(sentence + ".")
    found = run.predictions
    if found is not None:
        wrong = int((found.predicted != found.labels).sum())
        said = f"{len(found.labels) - wrong} of {len(found.labels)} test samples are right, {wrong} wrong."
        margin = 1.96 * math.sqrt(found.accuracy * (1 - found.accuracy) / len(found.labels))
        out += page.lede(f"{said} With so many samples the accuracy is known to about ±{margin:.1%} (95 % interval).")
    warnings = list(run.notes)
    losses = [e.get("loss") for e in run.train]
    if any(isinstance(loss, float) and not math.isfinite(loss) for loss in losses):
        warnings.append(
            "The training loss became NaN or infinite. A lower learning rate, a longer warm-up or gradient clipping "
            "usually helps."
        )
    return out + "".join(page.note(message, warn=True) for message in warnings)


def _curves(run: Run) -> str:
    train, evals = run.train, run.evals
    cards = []

    def column(events: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
        have = [(e.get("step", i), e[key]) for i, e in enumerate(events) if isinstance(e.get(key), int | float)]
        return [x for x, _ in have], [y for _, y in have]

    def lines(keys: Sequence[str], style: int = 0) -> list[Series]:
        return [
            Series(_pretty(key), *column(evals, key), style=(style + i) % 4, points=True)
            for i, key in enumerate(keys)
            if column(evals, key)[0]
        ]

    steps, losses = column(train, "loss")
    loss_lines = (
        [Series("raw", steps, losses, faint=True), Series("training (smoothed)", steps, list(smooth(losses)))]
        if steps
        else []
    )
    keys = sorted({key for e in evals for key, value in e.items() if _number(value)} - {"step", "epoch"})
    for line in lines([k for k in keys if "loss" in k], style=1):
        line.name = run.monitored if line.name == "loss" else line.name
        loss_lines.append(line)
    if loss_lines:
        finite = [y for line in loss_lines for y in line.y if math.isfinite(y) and y > 0]
        log = bool(finite) and max(finite) / min(finite) > 50
        title = "Loss" + (" (logarithmic)" if log else "")
        cards.append(
            page.card(
                line_chart(loss_lines, x_label="step", describe="Loss over the steps of training", log=log), title
            )
        )
    accuracy = sorted((k for k in keys if "accuracy" in k), key=lambda k: (k != "accuracy", k))
    averaged = ", of the averaged weights" if run.setting("optim.ema_decay") else ""
    if accuracy:
        cards.append(
            page.card(
                line_chart(
                    lines(accuracy[:4]),
                    x_label="step",
                    describe=f"Accuracy on the {run.monitored} split over the steps of training",
                    percent=True,
                ),
                f"Accuracy on the {run.monitored} split{averaged}",
            )
        )
    rates = column(train, "lr")
    if rates[0]:
        cards.append(
            page.card(
                line_chart(
                    [Series("learning rate", *rates)],
                    x_label="step",
                    describe="Learning rate over the steps of training",
                ),
                "Learning rate",
            )
        )
    speed = column(train, "images_per_s")
    if speed[0]:
        cards.append(
            page.card(
                line_chart([Series("images/s", *speed)], x_label="step", describe="Training speed over the steps"),
                "Speed, images per second",
            )
        )
    norms = column(train, "grad_norm")
    if norms[0]:
        norm_lines = [Series("raw", *norms, faint=True), Series("norm (smoothed)", norms[0], list(smooth(norms[1])))]
        cards.append(
            page.card(
                line_chart(norm_lines, x_label="step", describe="Norm of the gradient before clipping, over the steps"),
                "Gradient norm before clipping",
            )
        )
    for key in [
        k for k in keys if "loss" not in k and "accuracy" not in k and not k.endswith(("seconds", "_s", "samples"))
    ][:4]:
        cards.append(
            page.card(
                line_chart(lines([key]), x_label="step", describe=f"{_pretty(key)} over the steps"),
                _pretty(key).capitalize(),
            )
        )
    return page.cards(cards) if cards else page.note("The log holds no figures to draw.")


def _data(run: Run, classes: Sequence[str], source: Any | None) -> str:
    rows: list[tuple[str, object]] = [("data", run.data or "not known")]
    if classes:
        rows.append(("classes", ", ".join(classes[:30]) + (f" … {len(classes)} in all" if len(classes) > 30 else "")))
    if source is not None:
        rows += [(f"{split} samples", f"{len(dataset):,}") for split, dataset in source.splits.items()]
        rows.append(
            (
                "size of the pictures",
                " × ".join(str(n) for n in source.native_size)
                + f" pixels, {source.channels} channel{'s' if source.channels != 1 else ''}",
            )
        )
    out = page.card(page.pairs(rows))
    bad = bad_samples(run)
    if not bad:
        return out + page.note("No unreadable sample was met.")
    listed = [[page.text(name), page.text(reason)] for name, reason in list(bad.items())[:200]]
    table = (
        page.table(["sample", "reason"], listed, "Unreadable samples")
        .replace("<td>", '<td class="left wrapped">')
        .replace('<th scope="col">', '<th scope="col" class="left">')
    )
    more = f" The first {len(listed)} are listed." if len(bad) > len(listed) else ""
    count = "1 sample" if len(bad) == 1 else f"{len(bad)} samples"
    sentence = f"{count} could not be read and {'was' if len(bad) == 1 else 'were'} left out.{more}"
    return f'<div class="stack">{out}{page.note(sentence, warn=True)}{page.card(table, "Unreadable samples")}</div>'


def bad_samples(run: Run) -> dict[str, str]:
    """Samples that could not be read, with the reason, from the run's log."""
    bad: dict[str, str] = {}
    for event in run.events:
        if isinstance(event.get("bad_samples"), dict):
            bad |= {str(name): str(reason) for name, reason in event["bad_samples"].items()}
    return bad


def _setup(run: Run) -> str:
    parts = []
    command = reproduce(run)
    parts.append(
        page.card(
            f"<pre>{page.text(command)}</pre>"
            + '<p class="muted small">On the CPU the same command gives the same weights, bit for bit.</p>',
            "Run it again",
        )
    )
    environment = [(_pretty(name), _flat(value)) for name, value in run.environment.items()]
    box = (
        page.pairs(environment)
        if environment
        else page.note(f"{ENVIRONMENT} is missing or empty: the machine of this run is not known.")
    )
    parts.append(page.card(box, "Environment"))
    if run.config_text:
        parts.append(
            page.card(
                page.details(f"All settings ({CONFIG})", f"<pre>{page.text(run.config_text)}</pre>"), "Configuration"
            )
        )
    return f'<div class="stack">{"".join(parts)}</div>'


def reproduce(run: Run) -> str:
    """The command that trains this run again, into another folder."""
    config = (run.folder / CONFIG).as_posix()
    return f"coterie train --config {shlex.quote(config)} --output.dir {shlex.quote(run.folder.as_posix() + '-again')}"


def _open_source(run: Run) -> Any | None:
    from coterie.data import open_data

    if run.data is None:
        return None
    size = run.setting("transform.image_size")
    try:
        return open_data(run.data, image_size=tuple(size) if isinstance(size, list) else size)
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
    count = run.predictions.probabilities.shape[1] if run.predictions is not None else None
    for names in (run.source.get("classes"), getattr(source, "classes", None)):
        if isinstance(names, list) and (count is None or len(names) == count):
            return [str(name) for name in names]
    return [f"class {index}" for index in range(count or 0)]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pretty(key: str) -> str:
    return key.replace("_", " ")


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items())
    return ", ".join(_flat(v) for v in value) if isinstance(value, list) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

"""The last parts of a report: the data, the machine, the settings, and the command that repeats the run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from coterie.inspect import page
from coterie.inspect.report_curves import pretty
from coterie.inspect.runs import CONFIG, ENVIRONMENT, Run


def data_section(run: Run, classes: Sequence[str], source: Any | None) -> str:
    """What the run was trained on, and what of it could not be read."""
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


def setup_section(run: Run) -> str:
    """How to run it again, on what it ran, and all settings."""
    parts = []
    command = reproduce(run)
    parts.append(
        page.card(
            f"<pre>{page.text(command)}</pre>"
            + '<p class="muted small">On the CPU the same command gives the same weights, bit for bit.</p>',
            "Run it again",
        )
    )
    environment = [(pretty(name), _flat(value)) for name, value in run.environment.items()]
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


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items())
    return ", ".join(_flat(v) for v in value) if isinstance(value, list) else str(value)

"""report.html of a language model's run: how well it predicts text, what it writes, and how it got there."""

from __future__ import annotations

import math
from typing import Any

from coterie.inspect import page
from coterie.inspect.charts import short
from coterie.inspect.report_curves import curves_section, is_number, training_seconds
from coterie.inspect.report_setup import setup_section
from coterie.inspect.runs import Run

TEXT = "text"  # the target of a run on text
FIGURES = {
    "loss": "nats per token",
    "perplexity": "perplexity of a token",
    "bits_per_byte": "bits per byte",
    "bits_per_character": "bits per character",
}
KINDS = {
    "bytes": "bytes",
    "characters": "characters",
    "bpe": "byte-pair encoding, trained on the training text",
    "file": "a tokenizer.json that was given",
}


def language_report(run: Run) -> str:
    """The report's HTML."""
    sections = [("overview", "Overview", _overview(run))]
    if run.evals:
        sections.append(("text", "Prediction", _predictions(run)))
    samples = [event for event in run.evals if isinstance(event.get("sample"), str)]
    if samples:
        sections.append(("samples", "Samples", _samples(samples)))
    if run.train or run.evals:
        per_step = tokens_per_step(run)
        sections.append(("curves", "Curves", curves_section(run, (), per_step=per_step, x_label="tokens")))
    sections.append(("data", "Data", _data(run)))
    sections.append(("setup", "Setup", setup_section(run)))
    name = run.source.get("name") or run.data
    kicker = " · ".join(str(part) for part in (run.setting("model.name"), name, "training report") if part)
    return page.page(run.folder.resolve().name, headline(run), sections, kicker=kicker, footer=page.FOOTER)


def headline(run: Run) -> list[tuple[str, str]]:
    """The figures of the header, the most important first; only those that are known."""
    figures: list[tuple[str, str]] = []
    split, last = ("test", run.tested) if run.tested else (run.monitored, run.evals[-1] if run.evals else {})
    for key in ("bits_per_byte", "perplexity", "loss"):
        if is_number(last.get(key)):
            figures.append((f"{split} {FIGURES[key]}", short(last[key])))
    facts = model_facts(run)
    if is_number(facts.get("parameters")):
        figures.append(("parameters", short(facts["parameters"])))
    tokens = _tokens_seen(run)
    if tokens:
        figures.append(("tokens trained on", short(tokens)))
    speeds = sorted(e["tokens_per_s"] for e in run.train if is_number(e.get("tokens_per_s")))
    if speeds:
        figures.append(("tokens/s", short(speeds[len(speeds) // 2])))
    if seconds := training_seconds(run):
        figures.append(("training time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"))
    return figures


def model_facts(run: Run) -> dict[str, Any]:
    """What the log says about the model: parameters, and FLOPs of training per token."""
    return next((event for event in run.events if event.get("event") == "model"), {})


def tokens_per_step(run: Run) -> float:
    """Tokens of an optimizer step; 1 where the run does not say."""
    rows, length = run.setting("train.batch_size"), run.setting("text.sequence_length")
    return float(rows * length) if is_number(rows) and is_number(length) else 1.0


def _tokens_seen(run: Run) -> float:
    steps = [event["step"] for event in run.train + run.evals if is_number(event.get("step"))]
    return max(steps, default=0) * tokens_per_step(run)


def _overview(run: Run) -> str:
    model, data = run.setting("model.name", "A model"), run.source.get("name") or run.data
    sentence = f"<b>{page.text(model)}</b> trained to predict the next token"
    if data:
        sentence += f" of <b>{page.text(data)}</b>"
    out = page.lede(f"{sentence}, {short(_tokens_seen(run))} tokens in rows of {run.setting('text.sequence_length')}.")
    facts = model_facts(run)
    rows: list[tuple[str, object]] = []
    if is_number(facts.get("parameters")):
        rows.append(("parameters", f"{facts['parameters']:,}"))
    if is_number(facts.get("parameters_without_embeddings")):
        rows.append(("without embeddings", f"{facts['parameters_without_embeddings']:,}"))
    if is_number(facts.get("flops_per_token")):
        flops = float(facts["flops_per_token"])
        total = f"{short(flops)} per token, {flops * _tokens_seen(run):.3g} in all"
        rows.append(("floating-point operations of training", total))
    out += page.card(page.pairs(rows)) if rows else ""
    losses = [event.get("loss") for event in run.train]
    notes = list(run.notes)
    if any(isinstance(loss, float) and not math.isfinite(loss) for loss in losses):
        notes.append(
            "The training loss became NaN or infinite. A lower learning rate or a longer warm-up usually helps."
        )
    if not run.evals:
        notes.append("The run has not been evaluated yet.")
    return out + "".join(page.note(message, warn=True) for message in notes)


def _predictions(run: Run) -> str:
    """The figures of every split that was evaluated."""
    found = [(f"{run.monitored}, the latest", run.evals[-1])]
    best = min((e for e in run.evals if is_number(e.get("loss"))), key=lambda e: e["loss"], default=None)
    if best is not None and best is not run.evals[-1]:
        found.append((f"{run.monitored}, at its best (step {best['step']:,})", best))
    if run.monitored != "test" and run.tested:
        found.append(("test", run.tested))
    keys = [key for key in FIGURES if any(is_number(event.get(key)) for _, event in found)]
    rows = [[page.text(name), *(f"{event[key]:.4f}" if is_number(event.get(key)) else "–" for key in keys)]
            for name, event in found]  # fmt: skip
    remark = page.lede(
        "Bits per byte and per character are counted over the text itself, so they compare between tokenizers; nats "
        "and perplexity are those of a token and do not."
    )
    return remark + page.card(page.table(["split", *(FIGURES[key] for key in keys)], rows, "Figures of each split"))


def _samples(events: list[dict[str, Any]]) -> str:
    """The last sample, and earlier ones folded away."""

    def shown(event: dict[str, Any]) -> str:
        return f'<pre class="prose">{page.text(event["sample"])}</pre>'

    last = events[-1]
    out = page.card(shown(last), f"After {last['step']:,} steps")
    earlier = "".join(f"<h3>After {event['step']:,} steps</h3>{shown(event)}" for event in events[:-1])
    return f'<div class="stack">{out}{page.details("Earlier samples", earlier) if earlier else ""}</div>'


def _data(run: Run) -> str:
    known = run.source.get("text")
    if not isinstance(known, dict):
        return page.note("What the run knew of its text is not stored.")
    separate = "attend to themselves only" if known.get("separate") else "are attended across, or there is one"
    rows: list[tuple[str, object]] = [
        ("text", run.source.get("name", "not known")),
        ("tokenizer", KINDS.get(str(known.get("kind")), known.get("kind"))),
        ("vocabulary", f"{known.get('vocab_size', 0):,} tokens"),
        ("tokens of a row", known.get("sequence_length")),
        ("documents", separate),
    ]
    lines = []
    for split, sizes in known.get("splits", {}).items():
        per = sizes["bytes"] / max(sizes["tokens"], 1)
        lines.append([page.text(split), *(f"{sizes[key]:,}" for key in ("bytes", "characters", "documents", "tokens",
                      "unknown")), f"{per:.2f}"])  # fmt: skip
    head = ["split", "bytes", "characters", "documents", "tokens", "of unknown characters", "bytes per token"]
    return f'<div class="stack">{page.card(page.pairs(rows))}{page.card(page.table(head, lines, "Sizes"))}</div>'

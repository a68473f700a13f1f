"""How strongly the attention heads of a language model compose, by layer and by token, on a text.

Between a query t and a key s the scores (pre) and the weights (post) of all heads are multiplied by

    identity + query's map(t) + key's map(s) [+ static map],    a map = inner^T outer + diag(gate)

and the strength of a map is its Frobenius norm over that of the identity, the square root of the number of heads: 0 is
plain attention, 1 a map as large as the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from coterie.attention.head_maps import SIDES, USES, HeadMaps
from coterie.engine.files import atomic_write
from coterie.inspect import page
from coterie.inspect.charts import Series, line_chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from coterie.ops import HeadComposition

LONGEST_SHOWN = 600  # tokens of the text on the page
CELL = 1.5  # inches of a picture of a map


@dataclass
class LayerComposition:
    """What one layer does.

    Attributes:
        layer: Its number, from 1.
        strength: Mean over the tokens, by (use, side): side "query", "key", "static", or "together", the sum of all of
            them for pairs of a token and the one halfway back to the beginning.
        by_token: (tokens,) strength of what each token says, the mean over uses and sides.
        maps: For each use the mean over tokens of the absolute sum of both sides' maps, (heads in, heads out).
    """

    layer: int
    strength: dict[tuple[str, str], float] = field(default_factory=dict)
    by_token: Float[np.ndarray, " tokens"] = field(default_factory=lambda: np.zeros(0))
    maps: dict[str, Float[np.ndarray, "heads heads"]] = field(default_factory=dict)


@torch.inference_mode()
def inspect_composition(model: nn.Module, tokens: Sequence[int]) -> list[LayerComposition]:
    """Look at the maps of every layer while the model reads `tokens`.

    Raises:
        ValueError: no layer composes, or there are no tokens.
    """
    modules = [module for module in model.modules() if isinstance(module, HeadMaps) and module.uses]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no layers whose heads compose; takes a DCFormer with composition_uses"
        )
    if not tokens:
        raise ValueError("text: there are no tokens in it")
    outputs: list[tuple[HeadComposition, HeadComposition]] = []
    hooks = [module.register_forward_hook(lambda _, __, out: outputs.append(out)) for module in modules]
    try:
        device = next(model.parameters()).device
        model(input_ids=torch.tensor([list(tokens)], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        _layer(number, dict(zip(USES, maps, strict=True)), module.num_heads)
        for number, (module, maps) in enumerate(zip(modules, outputs, strict=True), start=1)
    ]


def _layer(number: int, uses: dict[str, HeadComposition], heads: int) -> LayerComposition:
    found = LayerComposition(number)
    per_token = []
    for use, composition in uses.items():
        parts: dict[str, Tensor] = {}
        for side in SIDES:
            inner, outer, gate = (getattr(composition, f"{side}_{part}") for part in ("in", "out", "gate"))
            if inner is not None:
                parts[side] = _matrices(inner[0], outer[0], gate[0])
                norms = parts[side].flatten(1).norm(dim=1) / heads**0.5
                found.strength[use, side] = float(norms.mean())
                per_token.append(norms)
        static = composition.static
        if static is not None:
            found.strength[use, "static"] = float(static.float().norm()) / heads**0.5
        if not parts and static is None:
            continue
        pairs: Tensor | float = 0.0 if static is None else static.float().unsqueeze(0)
        if "query" in parts:
            pairs = pairs + parts["query"]
        if "key" in parts:
            half_way = torch.arange(len(parts["key"]), device=parts["key"].device) // 2
            pairs = pairs + parts["key"][half_way]
        assert isinstance(pairs, Tensor)
        found.strength[use, "together"] = float(pairs.flatten(1).norm(dim=1).mean()) / heads**0.5
        found.maps[use] = pairs.abs().mean(0).cpu().numpy()
    if per_token:
        found.by_token = torch.stack(per_token).mean(0).cpu().numpy()
    return found


def _matrices(
    inner: Float[Tensor, "tokens rank heads"],
    outer: Float[Tensor, "tokens rank heads"],
    gate: Float[Tensor, "tokens heads"],
) -> Float[Tensor, "tokens heads heads"]:
    return torch.einsum("trn,trm->tnm", inner.float(), outer.float()) + torch.diag_embed(gate.float())


def summary(layers: Sequence[LayerComposition]) -> list[str]:
    """One line for each layer."""
    lines = []
    for layer in layers:
        shown = f"layer {layer.layer}:"
        for use in USES:
            if (use, "together") in layer.strength:
                sides = [side for side in (*SIDES, "static") if (use, side) in layer.strength]
                parts = ", ".join(f"{side} {layer.strength[use, side]:.2f}" for side in sides)
                shown += f"  {use} {layer.strength[use, 'together']:.2f} ({parts})"
        lines.append(shown)
    return lines


def maps_figure(layers: Sequence[LayerComposition]) -> Figure:
    """The mean absolute map of each layer: rows are uses, columns layers; in a map, row n gives to column m."""
    from matplotlib.figure import Figure

    uses = [use for use in USES if any(use in layer.maps for layer in layers)]
    figure = Figure(
        figsize=(0.9 + CELL * len(layers), 0.7 + (CELL + 0.25) * len(uses)),
        dpi=110,
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots(len(uses), len(layers), squeeze=False)
    highest = max(float(map_.max()) for layer in layers for map_ in layer.maps.values()) or 1.0
    shown = None
    for row, use in enumerate(uses):
        for column, layer in enumerate(layers):
            place = axes[row, column]
            place.set_xticks([])
            place.set_yticks([])
            if use in layer.maps:
                shown = place.imshow(layer.maps[use], cmap="Blues", vmin=0, vmax=highest)
            if row == 0:
                place.set_title(f"layer {layer.layer}", fontsize=9)
            if column == 0:
                place.set_ylabel(f"{use}: from head", fontsize=9)
            if row == len(uses) - 1:
                place.set_xlabel("to head", fontsize=9)
    if shown is not None:
        figure.colorbar(shown, ax=axes, fraction=0.03, label="mean size of the map")
    return figure


def write_page(
    layers: Sequence[LayerComposition], words: Sequence[str], out: Path, *, title: str, parameters: int
) -> Path:
    """Write `composition.png` and `index.html` into `out`; returns the page. `words` are the texts of the tokens."""
    import base64
    import io

    buffer = io.BytesIO()
    maps_figure(layers).savefig(buffer, format="png")
    atomic_write(out / "composition.png", buffer.getvalue())
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    width = round(110 * CELL * (len(layers) + 1))
    drawn = f'<div style="max-width:{width}px">{page.picture(uri, "Mean maps of all layers")}</div>'
    remark = "How much each head takes from every other: the absolute map that is added to the identity, on average."
    sections = [
        ("layers", "By layer", _layers_section(layers)),
        ("maps", "Maps", page.lede(remark) + page.card(drawn)),
        ("text", "By token", _text_section(layers, words)),
    ]
    strongest = max(layers, key=_total)
    figures = [
        ("strongest layer", f"{strongest.layer} of {len(layers)}"),
        ("its strength", f"{_total(strongest):.2f}"),
        ("heads", str(len(next(iter(strongest.maps.values()))))),
        ("tokens", str(len(words))),
        ("parameters", f"{parameters:,}"),
    ]
    content = page.page(title, figures, sections, kicker="how strongly heads compose", footer=page.FOOTER)
    return atomic_write(out / "index.html", content)


def _total(layer: LayerComposition) -> float:
    return sum(value for (_, side), value in layer.strength.items() if side == "together")


def _layers_section(layers: Sequence[LayerComposition]) -> str:
    cards = []
    numbers = [layer.layer for layer in layers]
    for use, what in (("pre", "Scores, before the softmax"), ("post", "Weights, after the softmax")):
        lines = [
            Series(
                side,
                numbers,
                [layer.strength.get((use, side), float("nan")) for layer in layers],
                style=style,
                points=True,
            )
            for style, side in enumerate(("together", *SIDES, "static"))
            if any((use, side) in layer.strength for layer in layers)
        ]
        if lines:
            cards.append(page.card(line_chart(lines, x_label="layer", describe=f"{what}: strength by layer"), what))
    sides = list(dict.fromkeys(key for layer in layers for key in layer.strength))
    rows = [
        [str(layer.layer), *(f"{layer.strength[key]:.3f}" if key in layer.strength else "–" for key in sides)]
        for layer in layers
    ]
    table = page.card(page.table(["layer", *(f"{use}, {side}" for use, side in sides)], rows, "Strength by layer"))
    remark = page.lede(
        "The size of what is added to the identity, relative to the identity: 0 is plain attention. Query and key are "
        "what either token of a pair says; together is their sum (and the static map)."
    )
    return remark + page.cards(cards) + table


def _text_section(layers: Sequence[LayerComposition], words: Sequence[str]) -> str:
    by_token = [layer.by_token for layer in layers if len(layer.by_token)]
    if not by_token:
        return page.note("Only static maps compose here: all tokens say the same.")
    strength = np.mean(by_token, axis=0)
    low, high = float(strength.min()), float(strength.max())
    share = (strength - low) / (high - low) if high > low else np.zeros_like(strength)
    spans = "".join(
        f'<span title="{value:.3f}" style="background:color-mix(in srgb, var(--accent) {70 * part:.0f}%, transparent)">'
        f"{page.text(word)}</span>"
        for word, value, part in zip(words[:LONGEST_SHOWN], strength, share, strict=False)
    )
    cut = page.note(f"The first {LONGEST_SHOWN} of {len(words)} tokens.") if len(words) > LONGEST_SHOWN else ""
    remark = page.lede(
        f"The stronger the colour, the stronger the token's maps, from {low:.3f} to {high:.3f}: the mean over layers, "
        "uses and sides."
    )
    return remark + page.card(f'<pre style="white-space:pre-wrap">{spans}</pre>') + cut


def inspect_run(run_dir: Path, text: str | None, out: Path) -> tuple[list[LayerComposition], Path]:
    """Look at a run on `text` (by default the beginning of its test split) and write the page.

    Raises:
        FileNotFoundError, ValueError: no run of a language model, one that does not compose, or a text without tokens.
    """
    from coterie.engine import load_run

    run = load_run(run_dir)
    facts, tokenizer = run.source.text, run.source.tokenizer
    if facts is None or tokenizer is None:
        raise ValueError(f"{run_dir} is a run of {run.config.task.name}, not of a language model")
    ids = _test_tokens(run) if text is None else tokenizer.encode(text.encode(), "the text").tolist()
    if facts.several_documents and ids[:1] != [facts.end]:
        ids = [facts.end, *ids]
    ids = ids[: facts.sequence_length]
    layers = inspect_composition(run.model, ids)
    words = ["¶" if number == facts.end else tokenizer.decode([number]) for number in ids]
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return layers, write_page(layers, words, out, title=run_dir.resolve().name, parameters=parameters)


def _test_tokens(run: Any) -> list[int]:
    from coterie.engine.inputs import open_source

    source = open_source(run.config, run.source.tokenizer)
    stream: Any = source.splits["test"]
    return stream.tokens[: run.source.text.sequence_length].tolist()

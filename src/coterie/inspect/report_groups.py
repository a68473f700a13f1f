"""The groups part of a report: what the network's groups are on a few test images, and how large they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from coterie.inspect import page
from coterie.inspect.group_html import LEGEND, block_tiles, pick_blocks, sizes_table
from coterie.inspect.groups import by_block, explain_no_groups
from coterie.inspect.network import Network
from coterie.inspect.page import text
from coterie.inspect.results import sample_picture
from coterie.inspect.runs import Run

IMAGES = 3


def groups_section(
    network: Network, run: Run, classes: Sequence[str], source: Any | None, chosen: Sequence[int]
) -> str:
    """Group pictures of `network` for the `chosen` test images, or one sentence why there are none."""
    if not network.has_groups:
        return page.note(explain_no_groups(network.model))
    parts, table = [], ""
    for index in chosen:
        image, name = sample_picture(source, index)
        if image is None:
            continue
        view = network.look(image)
        if not view.found:
            continue
        answer = f"test image {index}"
        if source is not None and network.predictor is None:
            answer = classes[int(source.splits["test"].labels[index])]
        if run.predictions is not None and index in (indices := run.predictions.indices.tolist()):
            row = indices.index(index)
            label, said = int(run.predictions.labels[row]), int(run.predictions.predicted[row])
            answer = (
                f"{classes[label]}, recognised" if label == said else f"{classes[label]}, taken for {classes[said]}"
            )
        tiles = "".join(
            block_tiles(view.picture, heads, f"{answer} ({name})") for heads in pick_blocks(by_block(view.found))
        )
        parts.append(page.card(f'<div class="small-tiles">{tiles}</div>', answer))
        table = table or sizes_table(view.found)
    if not parts:
        return page.note("There is no test image at hand to show groups on. For any picture: coterie inspect RUN IMAGE")
    lead = page.lede(
        f"{LEGEND}. For every block and head, and for your own pictures: "
        f"<code>coterie inspect {text(run.folder.as_posix())} IMAGE</code>"
    )
    sizes = page.card(table, "Group sizes on the first of these images")
    return f'{lead}<div class="stack">{"".join(parts)}{sizes}</div>'


def choose_samples(run: Run, source: Any | None) -> list[int]:
    """Test samples worth a look: a sure right answer, one of another class, and a mistake if there is one."""
    found = run.predictions
    if found is None:
        return (
            list(range(min(IMAGES, len(source.splits["test"]))))
            if source is not None and "test" in source.splits
            else []
        )
    truth = found.probabilities[np.arange(len(found.labels)), found.labels]
    right = found.predicted == found.labels
    order = np.argsort(np.where(right, -truth, 2.0), kind="stable")[: max(int(right.sum()), 1)]
    _, first = np.unique(found.labels[order], return_index=True)
    chosen = [int(order[i]) for i in np.sort(first)[: IMAGES - 1]]
    wrong = np.flatnonzero(~right)
    if len(wrong):
        chosen.append(int(wrong[truth[wrong].argmin()]))
    chosen += [int(i) for i in order if int(i) not in chosen][: IMAGES - len(chosen)]
    return list(dict.fromkeys(int(found.indices[i]) for i in chosen))[:IMAGES]

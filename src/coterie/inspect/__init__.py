"""Looks into trained models: which tokens group together, which keys each group chose, and how a run went.

groups.py    reads the groups out of a network while it sees one image
tiles.py     draws them as small pictures (numpy and Pillow)
figures.py   draws them as matplotlib figures, for PNG files
explore.py   `coterie inspect`: the PNG files and one interactive, self-contained page
report.py    report.html of a training run
runs.py      reads a run folder, whatever is missing from it
page.py, charts.py, style.css, explore.js   the parts of the pages
"""

from coterie.inspect.groups import StageGroups, inspect_groups

__all__ = ["StageGroups", "inspect_groups"]

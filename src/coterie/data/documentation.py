"""Half a megabyte and more of real prose that every installation has: documentation of Python, scikit-learn and torch.

Python's language reference as `pydoc_data.topics` holds it for `help()`, scikit-learn's descriptions of its data sets,
and the docstrings of torch's functions. What it is exactly depends on the installed versions, so runs on it compare
only within one installation. Paragraphs that occur twice (topics overlap) are kept once: otherwise held-out documents
would be known from training.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

SHORTEST = 500  # characters; shorter ones are stubs


def documentation() -> list[bytes]:
    """All documents, in an order that scatters each source over the whole."""
    documents = {**_python_reference(), **_data_set_descriptions(), **_torch_docstrings()}
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    seen: set[str] = set()
    out = []
    for name in order:
        kept = []
        for paragraph in documents[name].split("\n\n"):
            if len(paragraph) < 40 or paragraph not in seen:
                kept.append(paragraph)
                seen.add(paragraph)
        text = "\n\n".join(kept).strip() + "\n"
        if len(text) >= SHORTEST:
            out.append(text.encode())
    return out


def _python_reference() -> dict[str, str]:
    from pydoc_data.topics import topics

    return {f"python {name}": text for name, text in topics.items()}


def _data_set_descriptions() -> dict[str, str]:
    import sklearn

    folder = Path(sklearn.__file__).parent / "datasets" / "descr"
    return {f"scikit-learn {path.stem}": path.read_text("utf-8") for path in sorted(folder.glob("*.rst"))}


def _torch_docstrings() -> dict[str, str]:
    import torch

    places = {"torch": torch, "Tensor": torch.Tensor, "nn": torch.nn, "functional": torch.nn.functional,
              "linalg": torch.linalg, "optim": torch.optim}  # fmt: skip
    found: dict[str, str] = {}
    for place, owner in places.items():
        for name in sorted(vars(owner)):
            value = vars(owner)[name]
            if (
                not name.startswith("_")
                and (callable(value) or inspect.isroutine(value))
                and isinstance(value.__doc__, str)
            ):
                found[f"torch {place}.{name}"] = inspect.cleandoc(value.__doc__)
    return found

"""Whether Triton can be used, without importing it before a kernel runs."""

import importlib.util
import os


def interpreting() -> bool:
    """True if Triton kernels run in Triton's interpreter, on CPU tensors (the tests do so)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and missing() is None


def missing() -> str | None:
    """One sentence if Triton is not installed, else None."""
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"

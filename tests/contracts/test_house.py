"""The floors hold, and importing stays light."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_imports_only_go_down():
    out = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.parametrize("room", ["coterie", "coterie.ops", "coterie.attention"])
def test_importing_loads_nothing_heavy(room):
    heavy = "('triton', 'timm', 'transformers', 'torchvision', 'matplotlib', 'accelerate', 'sklearn', 'datasets')"
    code = (
        f"import sys, time, torch; before = set(sys.modules); t = time.process_time(); import {room}\n"
        f"seconds = time.process_time() - t; new = set(sys.modules) - before\n"
        f"print([m for m in {heavy} if m in new]); assert seconds < 1, seconds"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_reference_runs_where_triton_cannot_be_imported():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, coterie\n"
        "q = torch.randn(1, 2, 20, 8)\n"
        "print(tuple(coterie.dynamic_group_attention(q, q, q, torch.randn(2, 3, 8), 4, backend='reference').shape))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "(1, 2, 20, 8)"


@pytest.mark.parametrize("first", ["import coterie.ops", "import torch.utils.flop_counter"])
def test_flops_are_counted_at_the_first_call_whatever_is_imported_first(first):
    code = (
        f"import torch\n{first}\nimport coterie.ops\nfrom torch.utils.flop_counter import FlopCounterMode\n"
        "q = torch.randn(1, 2, 20, 8)\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    coterie.ops.dynamic_group_attention(q, q, q, torch.randn(2, 3, 8), 4, backend='cpu')\n"
        "print(counter.get_total_flops())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == 2 * 2 * 40 * 3 * 8 + 2 * 2 * 20 * 4 * 16

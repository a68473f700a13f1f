"""The Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time for an H100."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed")

CASES = Path(__file__).with_name("composable_triton_cases.py")


def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(next(line for line in run.stdout.splitlines() if line.startswith("SKIPPED")))
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout), run.stdout


# ---------------------------------------------------------------------------- compiled for sm_90, without such a device
FLOATS = ("logsumexp", "delta", "grad_static", "grad_query_side", "grad_key_side")
SIZES = ("heads", "group", "queries", "keys", "window", "mask_b", "mask_t", "mask_s")
SHARED_MEMORY = 227 * 1024  # bytes that one program may take on sm_90
KERNELS = ("statistics", "output", "delta", "query_gradient", "value_gradient", "key_gradient")


def compile_kernel(kernel, element: str, constants: dict[str, object], options: dict[str, object]):
    """Compile as a launch would."""
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(place,)] = "constexpr", constants[name]
        elif name in SIZES:
            signature[name] = "i32"
        elif name == "scale":
            signature[name] = "fp32"
        else:
            wide = name in FLOATS or name.startswith(("pre_", "post_"))
            signature[name] = "*u8" if name == "mask" else "*fp32" if wide else f"*{element}"
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constexprs, attributes),
        target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
        options=options,
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists(), reason="this Triton brings no ptxas"
)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes the compiler's place")
@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "kernels", "mask"),
    [
        (torch.bfloat16, 16, 64, KERNELS, False),
        (torch.bfloat16, 32, 128, ("statistics", "output"), True),
        (torch.float32, 8, 64, ("output",), True),
    ],
    ids=str,
)
def test_compiles_for_an_h100(dtype, heads, head_dim, kernels, mask):
    from coterie.ops.composable import triton_kernels

    blocks = triton_kernels.choose_blocks(heads, head_dim, False, dtype.itemsize)
    constants = {"CAUSAL": True, "HEADS": blocks.heads, "DIM": head_dim, "VALUE_DIM": head_dim, "STEP": blocks.step}
    constants |= {"SLICE": blocks.slice, "BM": blocks.queries, "BK": blocks.keys}
    constants |= {f"{name}{side}_RANK": 2 for name in ("", "PRE_", "POST_") for side in ("QUERY", "KEY")}
    constants |= {"pre_static": None, "post_static": None, "grad_static": None} | ({} if mask else {"mask": None})
    for name in kernels:
        kernel = getattr(triton_kernels, f"_{name}_kernel")
        used = {key: value for key, value in constants.items() if key in kernel.arg_names}
        element = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        compiled = compile_kernel(kernel, element, used, triton_kernels.launch(blocks))
        assert compiled.metadata.shared <= SHARED_MEMORY, name
        if dtype == torch.bfloat16:
            assert "mma" in compiled.asm["ptx"], f"{name} does not use the tensor cores"

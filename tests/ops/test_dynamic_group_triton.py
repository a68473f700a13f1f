"""The Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time for an H100."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed")

CASES = Path(__file__).with_name("dynamic_group_triton_cases.py")


def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(next(line for line in run.stdout.splitlines() if line.startswith("SKIPPED")))
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout), run.stdout


# ---------------------------------------------------------------------------- compiled for sm_90, without such a device
POINTERS = {
    "order": "i64", "starts": "i64", "selected": "i64", "entry": "i64", "slot_segment": "i32", "sorted_key": "i32",
    "ordered": "i16", "key_mask": "u8", "logsumexp": "fp32", "delta": "fp32", "partial": "fp32",
}  # fmt: skip
LAYOUT = re.compile(r"[qkvg]_(batch|head|token)")
SIZES = ("heads", "groups", "queries", "keys", "count", "total", "segments", "entries", "all_keys")
SHARED_MEMORY = 227 * 1024  # bytes that one program may take on sm_90


def compile_kernel(kernel, element: str, constants: dict[str, object], warps: int):
    """Compile as a launch would, for contiguous tensors with head_dim a multiple of 16."""
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(place,)] = "constexpr", constants[name]
        elif LAYOUT.fullmatch(name) or name in SIZES:
            signature[name] = "i32"
        else:
            signature[name] = "fp32" if name == "scale" else "*" + POINTERS.get(name, element)
        if signature[name].startswith("*") or LAYOUT.fullmatch(name):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        triton.compiler.ASTSource(kernel, signature, constexprs, attributes),
        target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True},
    )


def compile_all(dtype: torch.dtype, head_dim: int, mean_group: float, key_mask: bool) -> dict[str, object]:
    from coterie.ops.dynamic_group import triton_kernels as kernels

    element = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    blocks = kernels.choose_blocks(mean_group, 98, head_dim, dtype.itemsize)
    constants = {"HEAD_DIM": head_dim, "VALUE_DIM": head_dim, "BLOCK_D": head_dim, "BLOCK_V": head_dim}
    constants |= {f"{name}_dim": 1 for name in "qkvg"} | ({} if key_mask else {"key_mask": None})
    tiles = constants | {"TILE": blocks.tile, "BLOCK_N": blocks.keys}
    pieces = constants | {"PIECE": blocks.piece, "BLOCK_M": blocks.step, "BLOCK_N": blocks.keys}
    reduce = constants | {"PIECE": blocks.piece, "ROWS": kernels.REDUCED // head_dim, "STEP": kernels.REDUCE_STEP}
    return {
        "plan": compile_kernel(kernels._plan_kernel, element, {"SIZE": blocks.tile, "BLOCK": 128}, 1),
        "forward": compile_kernel(kernels._forward_kernel, element, tiles, blocks.warps),
        "dq": compile_kernel(kernels._query_gradient_kernel, element, tiles, blocks.warps),
        "dk, dv": compile_kernel(kernels._key_gradient_kernel, element, pieces, blocks.step_warps),
        "reduce": compile_kernel(kernels._reduce_kernel, element, reduce, 4),
    }


def registers_and_stack(cubin: bytes, folder: Path) -> tuple[int, int] | None:
    """Registers and bytes of stack a thread, by the cuobjdump that comes with Triton; None where it does not."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    (folder / "kernel.cubin").write_bytes(cubin)
    command = [tool, "--dump-resource-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists(), reason="this Triton brings no ptxas"
)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes the compiler's place")
@pytest.mark.parametrize(
    ("dtype", "head_dim", "mean_group", "key_mask"),
    [
        (torch.bfloat16, 32, 65.0, True),
        (torch.bfloat16, 64, 1045.0, False),
        (torch.bfloat16, 128, 261.0, False),
        (torch.float32, 64, 261.0, True),
    ],
    ids=str,
)
def test_compiles_for_an_h100(dtype, head_dim, mean_group, key_mask, tmp_path):
    for name, compiled in compile_all(dtype, head_dim, mean_group, key_mask).items():
        assert compiled.metadata.shared <= SHARED_MEMORY, name
        if name in ("forward", "dq", "dk, dv") and dtype == torch.bfloat16:
            assert "mma" in compiled.asm["ptx"], f"{name} does not use the tensor cores"
        usage = registers_and_stack(compiled.asm["cubin"], tmp_path)
        if usage is not None:
            registers, stack = usage
            print(f"{name}: {registers} registers, {stack} B stack, {compiled.metadata.shared} B shared memory")
            assert stack <= 128, f"{name} spills {stack} bytes a thread"

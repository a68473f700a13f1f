"""Composable attention in training, against the authors' own module: time of a step and peak memory, on the CPU.

    git clone https://github.com/Caiyun-AI/DCFormer && git -C DCFormer checkout 4375c18
    python benchmarks/dcformer_authors.py DCFormer --tokens 2048

A step is the forward and the backward pass of one attention layer (projections, maps, attention), causal over all
tokens, batch 1, float32, with the same weights in all contenders; outputs are compared before anything is timed.
Contenders take turns in one process, and the peak memory of each is taken in a process of its own, as `coterie bench`
does. Their code is imported from the folder given. Two of its paths can be trained:

    training   what their module does with `is_training`: chunks of 128 queries. It fails on global layers, so that it
               is given a window as long as the sequence, and it does not scale scores, which the weights make up for.
    prefill    what it does at inference with a whole sequence: all scores at once.

Compiled, the first is compiled per chunk, the second as a whole. Compilation is not timed.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from coterie.attention import create_attention
from coterie.bench import memory
from coterie.bench.conditions import conditions
from coterie.bench.timing import Settings, alternate

OURS = "coterie"
CONTENDERS = (OURS, "training", "training, compiled", "prefill", "prefill, compiled")
# Peak memory of a step in tensors of all scores, heads x tokens x tokens, as measured at 2,048 tokens and rounded up.
COPIES = {"training": 3, "training, compiled": 3, "prefill": 9, "prefill, compiled": 9}


def authors_code(folder: str) -> types.ModuleType:
    """Their modeling_dcformer.py, anew at every call."""
    where = Path(folder) / "pytorch" / "dcformer"
    if not (where / "modeling_dcformer.py").is_file():
        raise SystemExit(
            f"{folder} holds no pytorch/dcformer/modeling_dcformer.py: give a checkout of Caiyun-AI/DCFormer"
        )
    with mock.patch.object(sys, "path", [str(where), *sys.path]):
        spec = importlib.util.spec_from_file_location("modeling_dcformer", where / "modeling_dcformer.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


class AuthorsAttention(nn.Module):
    """Their attention layer, in float32, causal, over the whole sequence."""

    def __init__(self, folder: str, tokens: int, heads: int, head_dim: int, path: str) -> None:
        super().__init__()
        code, (way, _, compiled) = authors_code(folder), path.partition(", ")
        config = code.DCFormerConfig(
            block_size=tokens, n_head=heads, head_dim=head_dim, dim=heads * head_dim, window_size=tokens,
            is_training=way == "training",
        )  # fmt: skip
        self.attention = code.DCMHAttention(config, 0).float()
        # Its training path gives the output of attention in half precision, which the next product does not take.
        self.attention.wo.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        angles = torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()], -1))
        self.register_buffer("causal", torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None])
        self.layer: Callable[..., Tensor] = self.attention
        if compiled and way == "training":
            vars(code)["_atten_context"] = torch.compile(code._atten_context, dynamic=True)
        elif compiled:
            self.layer = torch.compile(self.attention)
        self.merged = way == "training"

    def load(self, ours: nn.Module) -> None:
        """The weights of our layer."""
        maps, theirs = ours.get_submodule("maps"), self.attention.dyn_w_proj
        assert isinstance(maps.mix, Tensor)
        with torch.no_grad():
            self.attention.wqkv.weight.copy_(ours.get_parameter("qkv.weight"))
            if self.merged:
                self.attention.wqkv.weight[: self.attention.dim] *= self.attention.scale_factor
            self.attention.wo.weight.copy_(ours.get_parameter("proj.weight"))
            theirs.dw1.copy_(maps.get_parameter("hidden.weight").T.reshape(theirs.dw1.shape))
            theirs.dd.copy_(maps.get_parameter("gate.weight").T.reshape(theirs.dd.shape))
            theirs.qkw.copy_(maps.mix.reshape(theirs.qkw.shape))
            theirs.merge_weights()

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the path reads: the merged copies, or what they are made of."""
        dynamic, attention = self.attention.dyn_w_proj, self.attention
        parts = (dynamic.dw_m, dynamic.qkw_m) if self.merged else (dynamic.dw1, dynamic.qkw, dynamic.dd)
        return [attention.wqkv.weight, attention.wo.weight, *parts]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.rotation, self.causal)


def make_step(folder: str, name: str, tokens: int, heads: int, head_dim: int) -> Callable[[], list[Tensor]]:
    """A function that makes one forward and backward pass: output, gradient of the input, gradients of parameters."""
    torch.manual_seed(0)
    ours = create_attention("composable", heads * head_dim, heads, rotary=10000.0, qkv_bias=False)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape))
        ours.get_parameter("proj.bias").zero_()
    x = torch.randn(1, tokens, heads * head_dim, requires_grad=True)
    slope = torch.randn(x.shape)
    if name == OURS:
        run, parameters = (lambda: ours(x, is_causal=True)), list(ours.parameters())
    else:
        theirs = AuthorsAttention(folder, tokens, heads, head_dim, name)
        theirs.load(ours)
        run, parameters = (lambda: theirs(x)), theirs.trained()

    def step() -> list[Tensor]:
        output = run()
        return [output.detach(), *torch.autograd.grad(output, [x, *parameters], slope)]

    return step


def memory_job(**sizes: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    """For the measuring process: a step to load and compile everything, and the step that is measured."""
    step = make_step(**sizes)
    return step, step


def check(found: list[Tensor], truth: list[Tensor]) -> float:
    """Error of output and input gradient, relative to their size."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found[:2], truth[:2], strict=True))


def refusal(name: str, tokens: int, heads: int) -> str | None:
    """Why a contender is left out, or None."""
    free = memory.available_bytes(torch.device("cpu"))
    needed = COPIES.get(name, 0) * heads * tokens**2 * 4
    if free is None or needed <= 0.8 * free:
        return None
    return f"would take about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("authors", metavar="FOLDER", help="a checkout of Caiyun-AI/DCFormer at 4375c18")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048], help="multiples of 128 (default 2048)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds of timing; three rounds are run anyway")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also say in which operators our step spends its time")
    args = parser.parse_args()
    if wrong := [n for n in args.tokens if n < 128 or n % 128]:
        parser.error(f"--tokens must be multiples of 128, the authors' chunk, got {wrong[0]}")
    torch.set_num_threads(args.threads)
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    for tokens in args.tokens:
        measure(args, tokens)
    found = conditions(torch.device("cpu"))
    print(f"{found['cpu']}, {found['threads']} threads, torch {found['versions']['torch']}, {found['date']}")


def measure(args: argparse.Namespace, tokens: int) -> None:
    """One table."""
    print(f"\n{tokens} tokens, {args.heads} heads of {args.head_dim}, float32, forward + backward of one layer")
    sizes = {"folder": args.authors, "heads": args.heads, "head_dim": args.head_dim}
    truth = make_step(name=OURS, tokens=256, **sizes)()
    calls = {}
    for name in dict.fromkeys([OURS, *args.contenders]):
        if reason := refusal(name, tokens, args.heads):
            print(f"{name}: left out, it {reason}")
            continue
        error = check(make_step(name=name.partition(",")[0], tokens=256, **sizes)(), truth)
        if not error < 2e-3:  # half precision inside their training path
            print(f"{name}: wrong result, not timed: relative error {error:.1e}")
            continue
        calls[name] = make_step(name=name, tokens=tokens, **sizes)
    timings = alternate(calls, Settings(time_limit=args.time_limit)).timings
    if args.profile:
        profile(calls[OURS])
    print(f"{'contender':<22}{'median':>10}{'quartiles':>20}{'rounds':>8}{'times ours':>12}{'peak extra memory':>20}")
    ours = timings[OURS].samples
    for name, timing in timings.items():
        ratio = statistics.median(a / b for a, b in zip(timing.samples, ours, strict=True))
        low, high = timing.quartiles
        peak = "-"
        if not args.no_memory:
            job = {"name": name, "tokens": tokens, **sizes}
            found = memory.measure_in_child("dcformer_authors:memory_job", job, timeout=900)
            peak = found.get("reason") or f"{found['peak_extra_bytes'] / 2**20:,.0f} MiB"
        print(
            f"{name:<22}{timing.median:>8.3f} s{f'{low:.3f} .. {high:.3f} s':>20}{len(timing.samples):>8}"
            f"{ratio:>11.1f}x{peak:>20}",
            flush=True,
        )


def profile(step: Callable[[], object], steps: int = 5) -> None:
    """The operators in which a step spends more than a hundredth of its time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows:
        if row.self_cpu_time_total > total / 100:
            print(
                f"  {row.self_cpu_time_total / total:6.1%} {row.self_cpu_time_total / steps / 1000:8.1f} ms  {row.key}"
            )


if __name__ == "__main__":
    main()

"""`coterie bench model`: whole vision models against each other, ours and timm's, on random images.

A model is named as `coterie.create_model` takes it, with options of its constructor behind commas:
`dgt_tiny,attention=global`. Weights are random: speed does not depend on them, and nothing is downloaded.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.bench import memory
from coterie.bench.conditions import DTYPES, matmul_rate, open_device, open_dtype, synchronizer
from coterie.bench.console import Progress
from coterie.bench.record import first_line, is_out_of_memory, new_report, timing_record
from coterie.bench.registry import suggest
from coterie.bench.timing import DEFAULT_SETTINGS, Settings, alternate


@dataclass(frozen=True)
class ModelCase:
    """How the models are run: `size` in pixels, of squares or (height, width). `train` times forward, cross-entropy
    and backward, without an optimizer step."""

    size: int | tuple[int, int] = 224
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    train: bool = False
    channels_last: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or min(self.height_width) < 1:
            raise ValueError(f"size and batch must be at least 1, got {self.pixels} and {self.batch}")
        open_dtype(self.dtype)
        open_device(self.device)

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height, width

    @property
    def pixels(self) -> str:
        """The size as the command takes it: 224, or 800x1333."""
        return str(self.size) if isinstance(self.size, int) else "x".join(map(str, self.size))


def bench_model(
    names: Sequence[str],
    cases: Sequence[ModelCase],
    *,
    baseline: str | None = None,
    settings: Settings = DEFAULT_SETTINGS,
    measure_memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure models side by side.

    Args:
        names: model names with options, e.g. "dgt_tiny" or "dgt_tiny,attention=global"; all different.
        cases: how to run them.
        baseline: the one the others are compared with; the last if None.
        settings: when to stop timing.
        measure_memory: also measure peak extra memory (on the CPU one process per model and case).
        progress: told what goes on; None keeps silent.

    Returns:
        The report, JSON-ready (docs/benchmarking.md lists its fields).

    Raises:
        ValueError: an unknown model, option or baseline; a model twice; an image size that a model does not take.
    """
    progress = progress or Progress(silent=True)
    if not names or not cases:
        raise ValueError("nothing to measure: give at least one model and one size")
    if len(set(names)) < len(names):
        raise ValueError(f"each model may be named once, got {', '.join(names)}")
    baseline = baseline or names[-1]
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} is none of the models measured: {', '.join(names)}")
    for name in names:
        parse_model(name)
    subject = f"{len(names)}-models"  # a file is named after it
    if len(names) <= 4:
        subject = "-".join(name.replace(",", "-") for name in names)
    report = new_report("model", subject, baseline, open_device(cases[0].device), settings)
    try:
        for case in cases:
            report["results"].append(_measure(names, case, baseline, settings, measure_memory, progress))
    except KeyboardInterrupt:
        report["interrupted"] = True
    return report


def parse_model(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the constructor options of "name,key=value,...".

    Raises:
        ValueError: unknown name, or an option that is not key=value.
    """
    import timm

    import coterie.models  # noqa: F401  (registers ours with timm)

    name, *pairs = spec.split(",")
    if not timm.is_model(name):
        known = timm.list_models()
        raise ValueError(
            f"unknown model {name!r}{suggest(name, known)}; it takes the {len(known)} names of timm and ours"
        )
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"model {spec!r}: {pair!r} is not key=value, as in dgt_tiny,attention=global")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return name, options


def make_model(spec: str, case: ModelCase) -> nn.Module:
    """The model on its device, ready to be called; `img_size` is told to those that want to know it.

    Raises:
        ValueError: the name, an option or the image size does not fit.
    """
    import timm

    name, options = parse_model(spec)
    torch.manual_seed(case.seed)
    try:
        try:
            model = timm.create_model(name, **{"img_size": case.size, **options})
        except TypeError as error:
            if "img_size" not in str(error) or "img_size" in options:
                raise
            model = timm.create_model(name, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"model {spec!r} at {case.pixels} pixels: {first_line(error)}") from error
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    model = model.to(open_device(case.device), DTYPES[case.dtype]).train(case.train)
    return model.to(memory_format=layout)


def make_images(model: nn.Module, case: ModelCase) -> Tensor:
    """(batch, channels, height, width) normal numbers in the case's layout."""
    channels = getattr(model, "pretrained_cfg", {}).get("input_size", (3,))[0]
    generator = torch.Generator().manual_seed(case.seed)
    images = torch.randn(case.batch, getattr(model, "in_chans", channels), *case.height_width, generator=generator)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return images.to(device=open_device(case.device), dtype=DTYPES[case.dtype], memory_format=layout)


def make_call(model: nn.Module, images: Tensor, case: ModelCase) -> Callable[[], Tensor]:
    """One call as it is timed, compiled where the case says so; it returns the output, or the loss in training."""
    run: Callable[[Tensor], Tensor] = torch.compile(model) if case.compile else model
    if not case.train:

        def infer() -> Tensor:
            with torch.no_grad():
                return run(images)

        return infer

    # Groups that nobody told the learning rate complain; here nothing is learned.
    warnings.filterwarnings("ignore", message="centroids of dynamic groups")
    labels = torch.zeros(case.batch, dtype=torch.long, device=images.device)

    def train() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(run(images).float(), labels)
        loss.backward()
        return loss.detach()

    return train


def memory_job(spec: str, case: dict[str, Any]) -> tuple[Callable[[], object], Callable[[], object]]:
    """For the measuring process: (warm_up, call). The warm-up is the call itself, because a model may not take a
    smaller image."""
    case_ = ModelCase(**case)
    model = make_model(spec, case_)
    call = make_call(model, make_images(model, case_), case_)

    def warm_up() -> None:
        call()
        model.zero_grad(set_to_none=True)

    return warm_up, call


def _measure(
    names: Sequence[str], case: ModelCase, baseline: str, settings: Settings, measure_memory: bool, progress: Progress
) -> dict[str, Any]:
    direction = "forward+backward" if case.train else "forward"
    result: dict[str, Any] = {"case": asdict(case), "direction": direction, "skipped": [], "contenders": []}
    label, device = f"{case.pixels} pixels, {direction}", open_device(case.device)
    calls: dict[str, Callable[[], Tensor]] = {}
    known: dict[str, dict[str, Any]] = {}
    for name in names:
        progress.stage(f"{label}: checking {name}")
        model = make_model(name, case)
        images = make_images(model, case)
        try:
            facts, error = _check(model, images, case)
            if error is None:
                call = make_call(model, images, case)
                error = _check_compiled(model, images, call, case) if case.compile else None
        except (RuntimeError, MemoryError) as problem:
            if is_out_of_memory(problem):
                result["skipped"].append({"name": name, "reason": "out of memory"})
                continue
            facts, error = {}, f"failed: {first_line(problem)}"
        except (ValueError, AssertionError, TypeError) as problem:
            raise ValueError(f"model {name!r} does not take {case.pixels} pixels: {first_line(problem)}") from problem
        if error is not None:
            result["contenders"].append({"name": name, "error": error})
            continue
        known[name], calls[name] = facts, call
    if not calls:
        return result

    dtype = DTYPES[case.dtype]
    rate = matmul_rate(device, dtype)
    alternation = alternate(
        calls, settings, synchronize=synchronizer(device), on_round=progress.rounds(label, settings)
    )
    rate = max(rate, matmul_rate(device, dtype))
    result |= {
        "rounds": alternation.rounds,
        "stopped_by": alternation.stopped_by,
        "order": alternation.order[: 2 * len(calls)],
        "matmul_flops_per_second": rate,
    }
    for name, call in calls.items():
        entry = timing_record(name, alternation, baseline, known[name]["flops"], rate)
        entry |= {
            "parameters": known[name]["parameters"],
            "macs_per_image": known[name]["forward_flops"] / 2 / case.batch,
            "images_per_second": case.batch / alternation.timings[name].median,
        }
        if measure_memory:
            progress.stage(f"{label}: memory of {name}")
            if device.type == "cpu":
                timeout = 300 + 10 * alternation.timings[name].median
                job = {"spec": name, "case": asdict(case)}
                entry["memory"] = memory.measure_in_child("coterie.bench.model:memory_job", job, timeout=timeout)
            else:
                entry["memory"] = memory.measure_in_process(call, device)
        result["contenders"].append(entry)
    return result


def _check(model: nn.Module, images: Tensor, case: ModelCase) -> tuple[dict[str, Any], str | None]:
    """Parameters and FLOPs, and why the model must not be timed (None if it may be)."""
    from torch.utils.flop_counter import FlopCounterMode  # loads triton

    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        output = model.eval()(images)
    model.train(case.train)
    flops = forward.get_total_flops()
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        # The gradients of inputs and of weights cost a forward pass each. (torch's own count of a backward pass takes
        # grouped convolutions for full ones.)
        "flops": 3 * flops if case.train else flops,
        "forward_flops": flops,
    }
    if output.ndim != 2 or output.shape[0] != case.batch:
        return facts, f"wrong result, not timed: the output has shape {tuple(output.shape)}, not (batch, classes)"
    if not bool(torch.isfinite(output).all()):
        return facts, "wrong result, not timed: the output holds NaN or infinity"
    return facts, None


def _check_compiled(model: nn.Module, images: Tensor, call: Callable[[], Tensor], case: ModelCase) -> str | None:
    """A compiled model may differ from the eager one by no more than twice what the eager one differs from float64, and
    roundings of the size of the output. Only outputs in eval mode are compared: dropout and the like may differ in
    training."""
    compiled = call()
    if case.train:
        return None if bool(torch.isfinite(compiled)) else "wrong result, not timed: the compiled loss is not finite"
    with torch.no_grad():
        if images.device.type == "mps":
            return None  # it has no float64
        eager = model(images).double()
        exact = model.double()(images.double())
        model.to(images.dtype)
    error = (compiled.double() - exact).abs().max().item()
    budget = 2 * (eager - exact).abs().max().item() + 8 * torch.finfo(images.dtype).eps * exact.abs().max().item()
    return (
        None
        if error <= budget
        else f"wrong result, not timed: compiled output: error {error:.2e}, allowed {budget:.2e}"
    )

"""What torch is doing right now, asked in a way that torch.compile can trace from torch 2.11 on."""

import torch


def exporting() -> bool:
    """Whether torch.export is running.

    While torch.compile of torch 2.11 traces, `torch.compiler.is_exporting()` is always True; the flag behind it is not.
    """
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else bool(flag)


def autocasting(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; the meta device has none, and asking would be an error."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)

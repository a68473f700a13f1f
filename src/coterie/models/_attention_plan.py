"""Which attention each stage of a pyramid uses, from the short forms in which people say it."""

from collections.abc import Mapping, Sequence
from typing import Any

from coterie.attention import attention_class, attention_options

Options = Mapping[str, Any]


def plan_attention(
    attention: str | Sequence[str],
    options: Options | Sequence[Options] | None,
    defaults: Mapping[str, Sequence[Options]],
    stages: int,
) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the attention of each stage.

    Args:
        attention: one name for all stages, or one per stage.
        options: one mapping, of which each stage takes what its attention knows, or one mapping per stage.
        defaults: the model's own options: attention name to one mapping per stage; `options` go over them.
        stages: number of stages.

    Raises:
        TypeError: something else than names and mappings was given.
        ValueError: a wrong number of stages, an unknown attention, or an option that no stage's attention has.
    """
    names = [attention] * stages if isinstance(attention, str) else list(attention)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"attention must be a name or one name per stage, got {attention!r}")
    if len(names) != stages:
        raise ValueError(f"attention must be one name or {stages}, one per stage, got {len(names)}: {attention!r}")
    for name in names:
        attention_class(name)  # refuses an unknown name, listing the known ones
    given = _per_stage(options, names)
    return [
        (name, {**(defaults[name][stage] if name in defaults else {}), **given[stage]})
        for stage, name in enumerate(names)
    ]


def _per_stage(options: Options | Sequence[Options] | None, names: list[str]) -> list[Options]:
    if options is None:
        return [{} for _ in names]
    if not isinstance(options, Mapping):
        options = list(options)
        if not all(isinstance(one, Mapping) for one in options):
            raise TypeError(f"attention_options must be a mapping or one mapping per stage, got {options!r}")
        if len(options) != len(names):
            raise ValueError(
                f"attention_options must be one mapping or {len(names)}, one per stage, got {len(options)}: {options!r}"
            )
        return options
    known = [attention_options(name) for name in names]
    homeless = sorted(key for key in options if not any(key in one for one in known))
    if homeless:
        takes = "; ".join(f"{name!r} takes {', '.join(sorted(one))}" for name, one in dict(zip(names, known)).items())
        raise ValueError(f"attention_options: no stage's attention has {', '.join(map(repr, homeless))}: {takes}")
    return [{key: value for key, value in options.items() if key in one} for one in known]

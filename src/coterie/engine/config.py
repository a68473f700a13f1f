"""The typed configuration of a run: nested dataclasses, read from YAML and dotted overrides, saved with the run.

`coterie train --config recipes/digits.yaml --train.epochs 5` reads the file, then applies the overrides. A key or a
type that is wrong is an error that names it. What a run was trained with stands in `config.yaml` in its folder; the
file reads back to the same configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from coterie.data.packing import TextConfig
from coterie.data.transforms import TransformConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Value = TypeVar("Value")


@dataclass
class TaskConfig:
    """What the model is trained for.

    Attributes:
        name: A name that `coterie list tasks` prints.
        options: Keyword arguments of the task, for example `--task.options.decoder fpn` of semantic segmentation.
    """

    name: str = "classification"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    """The network.

    Attributes:
        name: A name that `coterie list models` prints, or that of any timm model. If not given, by the size of the
            pictures: dgt_nano up to 64 pixels, dgt_tiny above; for dense tasks dgt_pico with strides from 4 on up to
            192 pixels, dgt_tiny above. For language modelling `dcformer` (the default), one of its published sizes, or
            a model type of transformers, such as `llama`.
        options: Keyword arguments of the model, for example `--model.options.attention global`.
        drop_path: Probability of dropping a residual branch (stochastic depth); grows linearly up to this.
        centroid_init: Where the centroids of dynamic groups start: random unit vectors, or k-means of the first batch.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    drop_path: float = 0.0
    centroid_init: Literal["random", "data"] = "random"


@dataclass
class DataConfig:
    """The pictures, or the text.

    Attributes:
        source: `digits`, `folder:PATH`, `parquet:PATH`, `hf:NAME`, `webdataset:PATTERN`, or the path of a folder; for
            dense tasks `digit-scenes`, `coco:PATH`, `voc:PATH`, `maps:PATH`, `parquet:PATH`, or the path of a folder;
            for language modelling `documentation`, `text:FILE[,FILE...]`, `parquet:PATH`, `hf:NAME`, or the path of a
            folder or file. If not given, that of the task which needs no file.
        workers: Processes that load pictures; 0 loads in the training process.
        max_bad_share: Share of unreadable pictures past which the run stops.
    """

    source: str | None = None
    workers: int = 0
    max_bad_share: float = 0.01


@dataclass
class AugmentConfig:
    """Regularisation of the labels. What is done to each single picture stands under `transform`.

    Attributes:
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.
        label_smoothing: Share of the target spread over all classes.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0


@dataclass
class OptimConfig:
    """AdamW, and what surrounds it.

    Attributes:
        lr: Peak learning rate; if not given, that of the task (classification: 1e-3).
        weight_decay: Decoupled weight decay; norms, biases and other one-dimensional parameters are spared.
        betas: Decay rates of the two moment estimates.
        clip_norm: Largest norm of the whole gradient; 0 does not clip.
        ema_decay: Decay of the moving average of the weights, which is then evaluated and kept; 0 for none.
    """

    lr: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    ema_decay: float = 0.0


@dataclass
class ScheduleConfig:
    """The course of the learning rate: linear warm-up, then half a cosine.

    Attributes:
        warmup_epochs: Epochs of warm-up; a fraction is fine. If not given, that of the task (classification: 1).
        final_share: Share of the peak learning rate at which the run ends.
    """

    warmup_epochs: float | None = None
    final_share: float = 0.01


@dataclass
class TrainConfig:
    """The loop.

    Attributes:
        epochs: Passes over the training pictures; if not given, those of the task (classification: 10).
        batch_size: Pictures per optimizer step, over all processes together; if not given, that of the task
            (classification: 64).
        accumulate: Parts in which each process computes its share of a batch, to save memory; the step stays the same.
        precision: Automatic mixed precision: no, bf16 or fp16 (fp16 needs a GPU).
        seed: Seed of the initial weights, of the order of the pictures and of every random choice.
        device: auto takes a GPU if there is one.
    """

    epochs: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"


@dataclass
class OutputConfig:
    """What is written, and how often.

    Attributes:
        dir: Folder of the run; if not given `runs/DATA`, and `runs/DATA-TASK` for tasks other than classification.
        overwrite: Delete the run that the folder holds.
        log_every: Steps between two lines of the log.
        eval_every: Epochs between two evaluations; a fraction is fine (0.25: four times an epoch). The end is always
            evaluated.
        checkpoint_every: Steps between two checkpoints, besides those at evaluations and ends of epochs; 0 for none.
        keep: Checkpoints that are kept, besides the best one.
    """

    dir: str | None = None
    overwrite: bool = False
    log_every: int = 10
    eval_every: float = 1
    checkpoint_every: int = 0
    keep: int = 2


@dataclass
class RunConfig:
    """A complete run.

    Attributes:
        task: What the model is trained for.
        model: The network.
        data: The pictures.
        transform: What is done to each picture.
        text: How text becomes rows of tokens.
        augment: Regularisation of the labels.
        optim: The optimizer.
        schedule: The course of the learning rate.
        train: The loop.
        output: What is written.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    text: TextConfig = field(default_factory=TextConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        if self.output.dir is not None:
            return Path(self.output.dir)
        source = self.data.source or _task_defaults(self).get("data.source", "data")
        data = re.sub(r"[^\w.-]+", "-", source.rstrip("/").split("/")[-1]).strip("-.")
        return Path("runs", data if self.task.name == TaskConfig().name else f"{data}-{self.task.name}")


# What may change when a run goes on: none of it touches the weights.
CHANGEABLE = ("output.", "data.workers", "data.max_bad_share")


def add_arguments(parser: ArgumentParser) -> None:
    """Give a jsonargparse parser `--config FILE` and one dotted option for each field of `RunConfig`."""
    parser.add_argument("--config", action="config", help="YAML file with a configuration; options prevail over it")
    parser.add_class_arguments(RunConfig)


def config_from_arguments(arguments: Any) -> RunConfig:
    """The `RunConfig` of the namespace that a parser with `add_arguments` gave."""
    values = arguments.as_dict()
    return config_from_dict({name: values[name] for name in values if name in _field_names()})


def config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Build and check a configuration from nested dictionaries, as YAML gives them; missing fields take their defaults.

    Raises:
        ValueError: an unknown field, a wrong type or a value out of its range; the message names the field.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    _check_names(values)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    try:
        parsed = parser.instantiate(parser.parse_object(values))
    except ArgumentError as error:
        raise ValueError(f"configuration: {' '.join(str(error).split())}") from error
    config = RunConfig(**{name: parsed[name] for name in _field_names()})
    check(config)
    return config


def load_config(path: str | Path) -> RunConfig:
    """Read a configuration from a YAML file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return config_from_dict(values)


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML text that `load_config` reads back."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, width=120)


def check(config: RunConfig) -> None:
    """Refuse values that no run can have, before anything is built. Raises ValueError naming the field."""
    at_least = {
        "train.epochs": 1, "train.batch_size": 1, "train.accumulate": 1, "train.seed": 0, "data.workers": 0,
        "optim.lr": 0, "optim.weight_decay": 0, "optim.clip_norm": 0, "schedule.warmup_epochs": 0,
        "output.log_every": 1, "output.checkpoint_every": 0, "output.keep": 1,
        "augment.mixup": 0, "augment.cutmix": 0,
    }  # fmt: skip
    shares = (
        "optim.ema_decay",
        "schedule.final_share",
        "data.max_bad_share",
        "augment.label_smoothing",
        "model.drop_path",
    )
    flat = flatten(config)
    for name, least in at_least.items():
        if flat[name] is not None and not flat[name] >= least:
            raise ValueError(f"{name} is {flat[name]}; it takes a number of at least {least}")
    if not flat["output.eval_every"] > 0:
        raise ValueError(f"output.eval_every is {flat['output.eval_every']}; it takes a number of epochs above 0")
    for name in shares:
        if not 0 <= flat[name] <= 1:
            raise ValueError(f"{name} is {flat[name]}; it takes a number from 0 to 1")


def flatten(config: RunConfig) -> dict[str, Any]:
    """All fields under their dotted names."""
    return {
        f"{section}.{name}": value
        for section, values in dataclasses.asdict(config).items()
        for name, value in values.items()
    }


def with_task_defaults(config: RunConfig) -> RunConfig:
    """`config` with the fields that it leaves open as its task takes them (`defaults` of the task's class).

    Raises:
        ValueError: an unknown task.
    """
    values = dataclasses.asdict(config)
    for dotted, value in _task_defaults(config).items():
        section, name = dotted.split(".")
        if values[section][name] is None:
            values[section][name] = value
    return config_from_dict(values)


def _task_defaults(config: RunConfig) -> dict[str, Any]:
    from coterie.tasks import task_class

    return task_class(config.task.name).defaults


def settled(value: Value | None, name: str) -> Value:
    """A field that cannot be open any more once the task's defaults are in. Raises ValueError where it still is."""
    if value is None:
        raise ValueError(f"{name} is not given and the task has no default for it; set it")
    return value


def merge_for_resume(saved: RunConfig, given: RunConfig) -> RunConfig:
    """The configuration with which a run goes on: the saved one, with the changeable fields that were given.

    A field of `given` that has its default value counts as not given.

    Raises:
        ValueError: a field that shapes the weights was given another value than the run was started with.
    """
    before, wanted, default = flatten(saved), flatten(given), flatten(RunConfig())
    changed = [name for name in before if wanted[name] not in (default[name], before[name])]
    refused = [name for name in changed if not name.startswith(CHANGEABLE)]
    if refused:
        differences = "; ".join(f"{name} was {before[name]!r}, is {wanted[name]!r}" for name in refused)
        raise ValueError(f"a run goes on with the configuration it was started with, but {differences}; "
                         "leave these out, or start a new run in another --output.dir")  # fmt: skip
    merged = dataclasses.asdict(saved)
    for name in changed:
        section, key = name.split(".", 1)
        merged[section][key] = wanted[name]
    return config_from_dict(merged)


def _check_names(values: Any) -> None:
    """Refuse sections and fields that do not exist, with the nearest name that does."""
    known = flatten(RunConfig())
    for section, fields in values.items() if isinstance(values, dict) else [(values, None)]:
        if section not in _field_names():
            raise ValueError(f"configuration: no section {section!r}; there are {', '.join(_field_names())}")
        if not isinstance(fields, dict):
            raise ValueError(f"configuration: {section} is {fields!r}; it takes fields with their values")
        for name in fields:
            if f"{section}.{name}" not in known:
                near = difflib.get_close_matches(f"{section}.{name}", known, 1)
                hint = f"did you mean {near[0]}?" if near else f"see coterie train --help for those of {section}"
                raise ValueError(f"configuration: no field {section}.{name}; {hint}")


def _field_names() -> list[str]:
    return [item.name for item in dataclasses.fields(RunConfig)]


def _plain(value: Any) -> Any:
    """Tuples as lists, so that YAML needs no tags of its own."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

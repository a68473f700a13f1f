"""Configurations: YAML and back, overrides, and what is refused."""

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from coterie.engine.config import (
    RunConfig,
    add_arguments,
    config_from_arguments,
    config_from_dict,
    dump_config,
    load_config,
    merge_for_resume,
)

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def parse(*arguments: str) -> RunConfig:
    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return config_from_arguments(parser.parse_args(list(arguments)))


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    config = parse(
        "--model.options.attention", "global", "--transform.image_size", "[24, 32]", "--optim.betas", "[0.8, 0.9]"
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert config.model.options == {"attention": "global"}
    assert config.optim.betas == (0.8, 0.9)


def test_overrides_prevail_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {epochs: 3, batch_size: 8}\nmodel: {options: {dims: [8, 16]}}\n")
    config = parse("--config", str(path), "--train.epochs", "4", "--model.options.depths", "[1, 1]")
    assert (config.train.epochs, config.train.batch_size) == (4, 8)
    assert config.model.options == {"dims": [8, 16], "depths": [1, 1]}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    assert load_config(path).run_dir.parts[0] == "runs"


def test_run_folder_is_named_after_the_data() -> None:
    assert parse("--data.source", "folder:/data/my photos/").run_dir == Path("runs/my-photos")
    assert parse("--data.source", "hf:user/birds?label=kind").run_dir == Path("runs/birds-label-kind")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "trian"),
        ({"train": {"epoch": 1}}, "epoch"),
        ({"train": {"epochs": "many"}}, r"train\.epochs"),
        ({"output": {"eval_every": 0}}, r"output\.eval_every is 0\.0; it takes a number of epochs above 0"),
        ({"train": {"epochs": 0}}, r"train\.epochs is 0; it takes a number of at least 1"),
        ({"train": {"precision": "fp64"}}, r"train\.precision"),
        ({"optim": {"lr": float("nan")}}, r"optim\.lr is nan"),
        ({"optim": {"ema_decay": 1.5}}, r"optim\.ema_decay is 1\.5; it takes a number from 0 to 1"),
        ({"output": {"keep": 0}}, r"output\.keep"),
    ],
)
def test_wrong_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config_from_dict(values)
    assert "\n" not in str(caught.value)


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("train: {epochs: 3\nmodel: ]")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match="no configuration"):
        load_config(tmp_path / "missing.yaml")


def test_resume_keeps_what_shapes_the_weights() -> None:
    saved = config_from_dict({"train": {"epochs": 5}, "data": {"workers": 1}})
    merged = merge_for_resume(saved, config_from_dict({"data": {"workers": 2}, "output": {"keep": 7}}))
    assert (merged.train.epochs, merged.data.workers, merged.output.keep) == (5, 2, 7)
    with pytest.raises(ValueError, match=r"train\.epochs was 5, is 6"):
        merge_for_resume(saved, config_from_dict({"train": {"epochs": 6}}))

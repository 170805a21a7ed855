"""Every configuration parses and instantiates without network; every debug configuration also runs a step."""

from __future__ import annotations

import csv
import logging
import socket
from pathlib import Path

import pytest
import yaml

from aapa_lightning.callbacks.anchor import AnchorCallback
from aapa_lightning.callbacks.samples import SampleWriter
from aapa_lightning.cli import TRAINER_COMMANDS, main
from aapa_lightning.commands.parser import import_components
from aapa_lightning.commands.train import AapaCLI
from aapa_lightning.files import write_text
from aapa_lightning.modules.base import PolicyModule
from aapa_lightning.modules.discriminator import DiscriminatorModule
from aapa_lightning.recipe.plan import load_recipe
from aapa_lightning.strategies import FSDP2Strategy

ROOT = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
RECIPES = [file for file in FILES if "stages" in yaml.safe_load((ROOT / file).read_text())]
MODELS = {"qwen3-0.6b": "Qwen/Qwen3-0.6B", "qwen3-4b": "Qwen/Qwen3-4B"}
STAGED = ["aapa-grpo", "aapa-staged", "aapa-chord", "aapa-uniapl"]
ANCHORED = ["sft", "grpo", "chord", "uniapl", "dpo", "gapo"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with ``configs/``, where nothing reaches the network."""

    def refuse(*args):
        raise AssertionError(f"a configuration wants the network: {args[1:]}")

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AAPA_DATA", "data")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler keeps the stream of the test that imported it
    import_components()
    return tmp_path


def configs(*names: str) -> list[str]:
    return [f"--config=configs/{name}.yaml" for name in names]


def build_recipe(build_cli, file: str, *overrides: str) -> dict[str, AapaCLI]:
    """The trainer stages of a recipe, by name, as their commands would build them."""
    built = {}
    for stage in load_recipe(file, overrides).stages:
        if stage.command[0] in TRAINER_COMMANDS:
            if stage.settings:
                write_text(stage.settings_file, yaml.safe_dump(stage.settings, sort_keys=False))
            built[stage.name] = build_cli(*stage.command, *stage.arguments)
    return built


def anchors(cli: AapaCLI) -> list[AnchorCallback]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, AnchorCallback)]


def check_numbers(cli: AapaCLI) -> None:
    """Raises when devices, accumulation and the sizes of a window do not divide."""
    if isinstance(cli.model, PolicyModule):
        cli.model.make_plan(cli.trainer.accumulate_grad_batches, cli.trainer.world_size)


@pytest.mark.parametrize("file", FILES)
def test_a_config_is_headed_by_a_command_that_uses_it(file, header_commands):
    commands = header_commands(Path(file))
    assert commands
    for words in commands:
        named = [word for word in words if word.endswith(".yaml")]
        assert named
        assert set(named) <= set(FILES)
        if words[0] == "recipe" and file not in named:  # a part of that recipe's stages
            used = [Path(word.partition("=")[2]).resolve() for stage in load_recipe(named[0]).stages for word in stage.arguments]
            assert Path(file).resolve() in used
        else:
            assert file in named


@pytest.mark.parametrize("file", [file for file in FILES if "/debug/" not in file and file not in RECIPES])
def test_a_config_instantiates(file, header_commands, build_cli):
    for words in header_commands(Path(file)):
        if words[0] != "recipe":
            check_numbers(build_cli(*words))


@pytest.mark.parametrize("file", [file for file in RECIPES if Path(file).stem not in STAGED])
def test_the_stages_of_a_recipe_instantiate(file, build_cli):
    built = build_recipe(build_cli, file)
    assert built
    for cli in built.values():
        check_numbers(cli)


@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize("name", STAGED)
def test_staged_recipes_instantiate_for_every_size(name, size, build_cli):
    built = build_recipe(build_cli, f"configs/recipes/{name}.yaml", f"vars.size={size}")
    export = f"runs/{name}-{size}/discriminator/export"
    for stage, cli in built.items():
        check_numbers(cli)
        assert [anchor.discriminator for anchor in anchors(cli)] == ([export] if stage.startswith("aapa_") else [])
        if isinstance(cli.model, DiscriminatorModule):
            assert (cli.model.encoder_path, cli.trainer.num_devices) == (MODELS[size], 1)
            assert cli.datamodule.negatives == [f"runs/{name}-{size}/rollouts/responses.jsonl"]
        else:
            later = name == "aapa-staged" and stage == "aapa_grpo"
            assert cli.model.policy.model == (f"runs/{name}-{size}/aapa_sft/export" if later else MODELS[size])
            assert cli.trainer.num_devices == 8


@pytest.mark.parametrize("name", [*ANCHORED, "reward_model"])
def test_sharding_goes_with_every_objective(name, build_cli):
    cli = build_cli("fit", *configs(f"recipes/{name}", "fsdp2"))
    check_numbers(cli)
    assert isinstance(cli.trainer.strategy, FSDP2Strategy)
    assert cli.trainer.strategy._save_distributed_checkpoint


@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize("name", [*ANCHORED, "rollouts"])
def test_a_model_goes_with_every_policy_recipe(name, size, build_cli):
    cli = build_cli("predict" if name == "rollouts" else "fit", *configs(f"recipes/{name}", f"models/{size}"))
    check_numbers(cli)
    assert cli.model.policy.model == MODELS[size]


@pytest.mark.parametrize("name", ANCHORED)
def test_the_anchor_goes_with_every_objective(name, build_cli):
    bare = build_cli("fit", *configs(f"recipes/{name}"))
    anchored = build_cli("fit", *configs(f"recipes/{name}", "anchor"))
    assert not anchors(bare)
    assert [anchor.discriminator for anchor in anchors(anchored)] == ["runs/discriminator/export"]
    assert type(anchored.model) is type(bare.model)
    assert (str(bare.run_dir), str(anchored.run_dir)) == (f"runs/{name}", f"runs/aapa-{name}")


def test_the_anchor_keeps_the_callbacks_of_the_other_file(build_cli):
    cli = build_cli("fit", *configs("recipes/grpo", "anchor"))
    named = [callback for callback in cli.trainer.callbacks if isinstance(callback, AnchorCallback | SampleWriter)]
    assert [type(callback) for callback in named] == [SampleWriter, AnchorCallback]
    assert named[0].groups == 4


def test_sft_rollouts_and_discriminator_ran_a_debug_step(debug_runs):
    runs = debug_runs / "runs" / "debug"
    assert (runs / "sft" / "export" / "model.safetensors").exists()
    assert (runs / "rollouts" / "responses.jsonl").stat().st_size > 0
    assert (runs / "discriminator" / "export" / "discriminator.json").exists()


OTHERS = [file for file in FILES if "/debug/" in file and Path(file).stem not in ("base", "sft", "rollouts", "discriminator")]


@pytest.mark.parametrize("file", OTHERS)
def test_a_debug_config_runs_a_step(file, header_commands, debug_runs, monkeypatch):
    monkeypatch.chdir(debug_runs)
    for words in header_commands(Path(file)):
        run = words[-1] if words[-2] == "--run_dir" else yaml.safe_load(Path(file).read_text())["run_dir"]
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]
        assert main([*words, "--trainer.max_steps=1", *quiet]) == 0
        with open(f"{run}/metrics.csv", newline="") as table:
            (row,) = csv.DictReader(table)
        assert row["train/skipped_steps"] == "0.0"
        assert ("train/losses/anchor" in row) == ("anchor" in file)
        assert Path(run, "export", "model.safetensors").exists()
        sampled = "anchor" in file or not any(name in file for name in ("preference", "reward_model"))  # pairs alone draw no responses
        assert Path(run, "samples.parquet").is_dir() == sampled

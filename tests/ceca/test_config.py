"""Configuration: defaults, then the recipe, then the command line; an invalid value is one clear error."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ceca.commandline import RECIPES, list_recipes, load_recipe, parse_arguments
from ceca.config import STAGES, DialogueConfig, LossConfig, ModelConfig, TrainConfig, VLLMConfig
from ceca.data.store import version_of
from ceca.settings import ConfigError, check_name, from_mapping, to_mapping

BENCHMARKS = ("cuhk_pedes", "icfg_pedes", "rstpreid", "tiny")
METHODS = sorted(path.stem for path in (RECIPES / "methods").glob("*.yaml"))


def test_recipes_are_those_of_the_benchmarks_and_those_of_the_methods():
    assert sorted(list_recipes()) == sorted([*BENCHMARKS, "views", *METHODS])
    assert {"ceca", "clip", "irra", "rde"} <= set(METHODS)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_resolves_on_every_benchmark(benchmark: str, method: str):
    sections = load_recipe(f"{method}+{benchmark}")
    for stage, section in sections.items():
        from_mapping(STAGES[stage], section)
    config = from_mapping(TrainConfig, sections["train"])
    # Methods lie side by side; one that says nothing of training takes the model of ceca.
    assert config.name == (method if "train" in load_recipe(method) else "ceca")
    alone = from_mapping(TrainConfig, load_recipe(benchmark)["train"])
    assert (config.model.backbone, config.epochs, config.global_batch) == (
        alone.model.backbone,
        alone.epochs,
        alone.global_batch,
    )


def test_a_later_recipe_replaces_what_it_names_and_keeps_the_rest(tmp_path: Path):
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    one.write_text("train:\n  epochs: 7\n  model:\n    local_dim: 32\n    mixer_heads: 4\n")
    other.write_text("train:\n  model:\n    local_dim: 64\nindex:\n  gpus: 1\n")
    assert load_recipe(f"{one}+{other}") == {
        "train": {"epochs": 7, "model": {"local_dim": 64, "mixer_heads": 4}},
        "index": {"gpus": 1},
    }


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": {"summary_weight": 0}}, "the loss cawl needs summary_weight above 0"),
        ({"model": {"local_branch": False}}, "the loss tal_local needs local_branch"),
        ({"workers": 65}, "global_batch 64 must be at least workers 65"),
        ({"workers": 2, "workers_min": 3}, "workers_min 3 must be at most workers 2"),
        ({"offload": True, "zero_stage": 0, "precision": "fp32"}, "offload needs zero_stage 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_starts(settings: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        from_mapping(TrainConfig, settings)


def test_defaults_are_the_published_recipe():
    config = TrainConfig()
    assert (config.epochs, config.global_batch) == (60, 64)
    assert (config.model.image_height, config.model.image_width) == (384, 128)
    assert (config.model.summary_weight, config.model.condition_ratio) == (0.3, 0.3)
    assert (config.losses.temperature, config.losses.margin, config.losses.scale) == (0.015, 0.1, 50.0)
    assert (config.optimiser.learning_rate, config.optimiser.new_learning_rate) == (1e-5, 1e-3)


def test_the_command_line_is_stronger_than_the_recipe_and_the_recipe_than_the_default(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train:\n  epochs: 7\n  model:\n    local_dim: 32\n")
    parsed = parse_arguments("train", ["--data", "there", "--recipe", str(recipe), "--epochs", "9"])
    assert (parsed.data, parsed.config.epochs, parsed.config.model.local_dim) == ("there", 9, 32)
    assert parsed.config.global_batch == TrainConfig().global_batch
    again = parse_arguments("train", ["--data=there", "--recipe=tiny", f"--recipe={recipe}"])
    assert again.config.epochs == 7  # of two recipes, the last


def test_a_config_cannot_be_changed_after_its_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().local_dim = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("stage", "mapping", "says"),
    [
        ("train", {"epoch": 3}, "unknown key 'epoch'; valid keys: name, model"),
        ("train", {"model": {"bakbone": "x"}}, "train.model: unknown key 'bakbone'; valid keys: backbone"),
        ("train", {"losses": {"terms": ["tal_globl"]}}, "'tal_global', 'tal_local', 'cawl', .* or 'words'"),
        ("dialogue", {"engine": "vlm"}, "'vllm', 'openai' or 'oracle'"),
        ("train", {"epochs": 0}, "epochs: .*greater than or equal to 1.*found 0"),
        ("train", {"losses": {"weight_range": [5, 0.2]}}, "weight_range must be"),
        ("dialogue", {"published": "a.json", "only_missing": True}, "choose one of them"),
        ("train", {"model": 3}, "expected keys and values, found 3"),
    ],
)
def test_what_is_not_valid_says_what_would_be(stage: str, mapping: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        from_mapping(STAGES[stage], mapping, stage)


def test_a_config_made_in_python_fails_in_the_same_words():
    with pytest.raises(ConfigError, match=r"summary_weight: .*less than or equal to 1 \(found 1\.5\)"):
        ModelConfig(summary_weight=1.5)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("trian:\n  epochs: 3\n", "unknown stage 'trian'; valid stages: draw, ingest"),
        ("- epochs\n", "expected a mapping of stages, found list"),
        ("train: [\n", "not valid YAML"),
    ],
)
def test_a_recipe_that_cannot_be_used_says_why(tmp_path: Path, content: str, says: str):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(content)
    with pytest.raises(ConfigError, match=says):
        load_recipe(str(recipe))


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"recipes: agreement, ceca, clip, .* tiny, views, several joined by"):
        load_recipe("cuhk")


def test_a_stored_configuration_makes_the_same_config_again():
    config = TrainConfig(workers=2, losses=LossConfig(terms=("tal_global",)))
    assert from_mapping(TrainConfig, to_mapping(config)) == config


def test_how_a_job_runs_does_not_change_what_its_result_is_called():
    def version(config: object) -> str:
        return version_of(to_mapping(config, results_only=True))

    assert version(TrainConfig()) == version(TrainConfig(workers=8, zero_stage=3, checkpoints_kept=5))
    assert version(TrainConfig()) != version(TrainConfig(seed=1))
    assert version(DialogueConfig()) == version(DialogueConfig(replicas=16, conversations=256))
    assert version(DialogueConfig()) != version(DialogueConfig(temperature=0.5))


@pytest.mark.parametrize(
    "name",
    ["../../escaped", "a/b", "a\\b", "..", ".", "", " ", "a b", "a\n", "-x", ".hidden", "~", "é", "s3://b/m", "x" * 65],
)
def test_a_name_that_is_no_folder_of_its_own_is_refused_with_the_configuration(name: str):
    with pytest.raises(ConfigError, match="cannot be a name: use 1 to 64 letters"):
        TrainConfig(name=name)
    with pytest.raises(ConfigError, match="cannot be a name"):
        check_name(name)


@pytest.mark.parametrize("name", ["ceca", "ceca-vitb16", "no-summaries", "irra_2.1", "7"])
def test_names_are_letters_digits_dots_and_lines(name: str):
    assert TrainConfig(name=name).name == name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ('{"max_num_seqs": 8}', r"max_num_seqs \(set sequences\)"),
        ('{"seed": 1, "dtype": "half"}', r"dtype .*, seed"),
    ],
)
def test_further_arguments_of_vllm_are_an_object_and_name_nothing_that_has_a_setting(arguments, said):
    with pytest.raises(ConfigError, match=said):
        VLLMConfig(arguments=arguments)


def test_how_vllm_runs_changes_no_version_and_how_it_rounds_does():
    def settings(**values: object) -> object:
        return to_mapping(DialogueConfig(vllm=VLLMConfig(**values)), results_only=True)

    how = {
        "sequences": 8,
        "batched_tokens": 512,
        "arguments": '{"mm_processor_cache_gb": 1}',
        "accelerator_type": "H100",
    }
    assert settings(**how) == settings()
    assert not {"quantization", "kv_cache_dtype", *how} & settings()["vllm"].keys()
    assert settings(quantization="fp8") != settings()
    assert settings(kv_cache_dtype="fp8") != settings()


@pytest.mark.parametrize("number", [-1, 2, 8])
def test_a_worker_has_one_gpu_or_none(number: int):
    with pytest.raises(ConfigError, match="gpus_per_worker"):
        TrainConfig(gpus_per_worker=number)

"""Who describes an added image: the dataset says what is asked, the service alone says where images and keys go."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ceca.config import DialogueConfig, OpenAIConfig, ServeConfig, VLLMConfig
from ceca.data.store import Store, StoreError
from ceca.errors import UserError
from ceca.search.edition import Edition, find_edition
from ceca.settings import to_mapping
from serve.describer import engine_settings, refuse_without_engine
from tests.serve.dataset import publish_gallery, publish_people, publish_tiny

ELSEWHERE = "http://elsewhere.invalid/v1"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "data"))


def edition(store: Store, asked: dict[str, Any]) -> Edition:
    publish_people(store, 3, asked)
    images, dialogues = store.current("images").version, store.current("dialogues").version
    return Edition(store.uri, "m", "d", 1, "g", images, dialogues, (), ())


def asked(**settings: Any) -> dict[str, Any]:
    return to_mapping(DialogueConfig(**settings), results_only=True)


def test_no_place_and_no_key_comes_from_the_dataset(store: Store) -> None:
    given = asked(engine="openai", questions=3, openai=OpenAIConfig(base_url=ELSEWHERE, model="chat"))
    given["openai"] |= {"api_key_variable": "AWS_SECRET_ACCESS_KEY", "retries": 10**9}
    given["vllm"] |= {"model": "/home/else", "tensor_parallel": 64, "kv_cache_gib": 10**6}
    given["vllm"] |= {"arguments": '{"chat_template": "/home/else"}', "accelerator_type": "X"}
    here = ServeConfig(engine_url="http://here.invalid/v1", engine_key_variable="MY_KEY", engine_model="mine")
    settings = engine_settings(edition(store, given), here)
    assert isinstance(settings, DialogueConfig)
    assert settings.openai == OpenAIConfig(base_url=here.engine_url, api_key_variable="MY_KEY", model="chat")
    assert settings.vllm == VLLMConfig(model="mine")
    assert settings.questions == 3


def test_every_text_in_the_settings_is_accounted_for() -> None:
    """A new setting with a path, URL or name must be decided on in `engine_settings`."""
    texts = {
        f"{config.__name__}.{field.name}"
        for config in (DialogueConfig, OpenAIConfig, VLLMConfig)
        for field in dataclasses.fields(config)
        if "str" in str(field.type)
    }
    decided = {"DialogueConfig.published", "VLLMConfig.model"}
    decided |= {"VLLMConfig.arguments", "VLLMConfig.accelerator_type"}  # how a job runs: never from a manifest
    decided |= {"VLLMConfig.quantization", "VLLMConfig.kv_cache_dtype"}  # names that vLLM knows or refuses
    decided |= {f"OpenAIConfig.{name}" for name in ("base_url", "model", "api_key_variable")}
    assert texts == decided


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (asked(engine="openai", openai=OpenAIConfig(base_url=ELSEWHERE, model="chat")), f"{ELSEWHERE!r}.*engine_url"),
        (asked(engine="openai", openai=OpenAIConfig(model="chat")), "localhost:8000.*engine_url"),
        (asked(vllm=VLLMConfig(model="s3://else/model")), "'s3://else/model'.*engine_model"),
        (asked(vllm=VLLMConfig(model="somebody/else")), "'somebody/else'.*engine_model"),
        (asked(vllm=VLLMConfig(model="/etc")), "'/etc'.*engine_model"),
        (asked(engine="oracle"), "simulated"),
        (asked(published="s3://else/file.json"), "imported"),
        ({}, "imported"),
    ],
)
def test_what_only_the_dataset_names_is_refused_with_the_setting_that_allows_it(
    store: Store, given: dict[str, Any], reason: str
) -> None:
    settings = engine_settings(edition(store, given), ServeConfig())
    with pytest.raises(UserError, match=reason):
        refuse_without_engine(settings, "")
    refuse_without_engine(settings, "a woman in a red coat")


def test_a_model_inside_the_dataset_and_the_default_one_may_run(store: Store) -> None:
    for model in (f"{store.uri}/vlm", VLLMConfig().model):
        settings = engine_settings(edition(store, asked(vllm=VLLMConfig(model=model))), ServeConfig(engine_gpus=0))
        assert isinstance(settings, DialogueConfig)
        assert (settings.vllm.model, settings.vllm.gpus) == (model, 0)
    outside = asked(vllm=VLLMConfig(model=f"{store.uri}/../vlm"))
    assert isinstance(engine_settings(edition(store, outside), ServeConfig()), str)


def test_a_gallery_names_no_model_outside_its_dataset(store: Store) -> None:
    publish_people(store, 3)
    model, published = publish_tiny(store, "tiny", seed=1)
    publish_gallery(store, model, published, "tiny")
    manifest = store.read_json("gallery", "manifest.json")
    for name in ("s3://else/model", "https://else.invalid/model", "/etc", "../else", "..", None, 7):
        manifest["notes"] = {"model": name}
        store.write_json(manifest, "gallery", "manifest.json")
        with pytest.raises(StoreError, match=r"not in this dataset|leads out"):
            find_edition(store)
        assert find_edition(store, "tiny").digest == published.digest
    manifest["notes"] = {"model": f"{store.uri}/models/tiny"}
    store.write_json(manifest, "gallery", "manifest.json")
    assert find_edition(store).digest == published.digest

"""Images per second of the dialogue stage, compared with two alternatives in one run.

    python benchmarks/dialogue.py                      # on a CPU: a random-weight model of 93 M parameters
    python benchmarks/dialogue.py --gpu --width 2048 --layers 24 --vision-depth 24 --images 2000

Each arm holds the same six turns about the same images, with the same random-weight model, vLLM settings and output
lengths:

    ceca            the stage `dialogue` as users run it: Ray Data, one replica
    ray.data.llm    six passes of its vLLM processor over all images, each with the history so far
    turn by turn    one vLLM engine without prefix cache; it takes a turn about all images, then the next turn

The time runs from the first request to the last answer. Starting engines is shown in a column of its own: ceca and turn
by turn start one, ray.data.llm starts six.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import ArmFailed, in_own_process, machine, run_benchmark


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size of the work and of the model."""

    images: int = 64
    width: int = 768
    """Hidden size of the random-weight Qwen2.5-VL, in its language model and its vision tower."""
    layers: int = 6
    vision_depth: int = 8
    answer_tokens: int = 12
    summary_tokens: int = 24
    max_pixels: int = 200_704
    conversations: int = 64
    gpu: bool = False
    out: Path | None = None
    """Also write the figures as JSON."""


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory(prefix="ceca-benchmark-") as folder:
        place = Path(folder)
        parameters = prepare(settings, place)
        print(f"{settings.images} images, six turns, random-weight model of {parameters / 1e6:.0f} M parameters")
        print(f"{machine()}, GPU: {settings.gpu}\n")
        environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2"}
        figures: dict[str, dict[str, float]] = {}
        for arm in ARMS:
            print(f"{arm} …", flush=True)
            try:
                figures[arm] = in_own_process(__file__, arm, settings, place, environment=environment)
            except ArmFailed as error:
                sys.exit(f"{arm} failed:\n{error}")
        report(settings, figures)
        if settings.out is not None:
            settings.out.write_text(json.dumps({"parameters": parameters, "arms": figures}, indent=1))


def prepare(settings: Settings, place: Path) -> int:
    """Draw the images, ingest them and make the model; return its number of parameters."""
    from ceca.config import IngestConfig
    from ceca.datasets.drawn import draw_dataset
    from ceca.dialogue.tiny import make_tiny_vlm
    from jobs.ingest import ingest

    people = -(-settings.images // 2)
    source = place / "drawn"
    draw_dataset(source, seed=0, identities=people + 4, images_per_identity=2, split_identities=(people, 2, 2))
    ingest(str(place / "data"), IngestConfig(source=str(source), limit=settings.images))
    import ray
    from safetensors import safe_open

    ray.shutdown()
    model = make_tiny_vlm(
        place / "model", width=settings.width, layers=settings.layers, vision_depth=settings.vision_depth
    )
    parameters = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is not a mapping)
                size = 1
                for side in weights.get_slice(name).get_shape():
                    size *= side
                parameters += size
    return parameters


def report(settings: Settings, figures: dict[str, dict[str, float]]) -> None:
    ours = figures["ceca"]
    print(f"\n{'':14} {'images/s':>9} {'ratio':>6} {'seconds':>8} {'starting':>9} {'answer tokens':>14}")
    for arm, of_arm in figures.items():
        rate = settings.images / of_arm["seconds"]
        ratio = of_arm["seconds"] / ours["seconds"]
        times = f"{of_arm['seconds']:8.1f} {of_arm['start']:9.1f}"
        print(f"{arm:14} {rate:9.2f} {ratio:6.2f} {times} {of_arm['answered']:14,.0f}")
    print(
        f"\nceca: {ours['cached']:,.0f} of {ours['reusable']:,.0f} reusable prompt tokens from cache "
        f"({ours['cached'] / ours['reusable']:.1%}; whole blocks), {ours['prompt']:,.0f} prompt tokens in all"
    )
    turns = figures["turn by turn"]
    share = turns["prefill"] / turns["seconds"]
    print(f"turn by turn: prefill is {share:.0%} of its time (measured with answers of one token)")


# --- the arms ---------------------------------------------------------------------------------------------
#
# Each returns its figures: `seconds` from the first request to the last answer, `start` for starting engines, and
# `answered`, the number of tokens in all answers.


def measure_ceca(settings: Settings, place: Path) -> dict[str, float]:
    from ceca.config import DialogueConfig, VLLMConfig
    from jobs.dialogue import dialogue

    config = DialogueConfig(
        engine="vllm",
        answer_tokens=settings.answer_tokens,
        summary_tokens=settings.summary_tokens,
        conversations=settings.conversations,
        images_per_part=min(128, settings.images),
        canary=False,
        vllm=VLLMConfig(
            model=str(place / "model"),
            max_model_len=2048,
            max_pixels=settings.max_pixels,
            gpus=int(settings.gpu),
            kv_cache_gib=2,
            dtype=dtype(settings),
            enforce_eager=not settings.gpu,
        ),
    )
    begun = time.monotonic()
    counts = dialogue(str(place / "data"), config)["dialogues"].notes["counts"]
    seconds = counts["engine_busy_s"] + counts["engine_idle_s"]
    return {
        "seconds": seconds,
        "start": time.monotonic() - begun - seconds,
        "answered": counts["completion_tokens"],
        "prompt": counts["prompt_tokens"],
        "cached": counts["cached_tokens"],
        "reusable": counts["reusable_tokens"],
    }


def measure_ray_data_llm(settings: Settings, place: Path) -> dict[str, float]:
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.init(address="local", num_cpus=8, include_dashboard=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    config = vLLMEngineProcessorConfig(
        model_source=str(place / "model"),
        engine_kwargs=engine_arguments(settings, prefix_caching=True),
        concurrency=1,
        batch_size=32,
        prepare_multimodal_stage={"enabled": True, "chat_template_content_format": "openai"},
        chat_template_stage={"enabled": True},
        tokenize_stage={"enabled": False},
        detokenize_stage={"enabled": False},
        accelerator_type=None,
        placement_group_config=None if settings.gpu else {"bundles": [{"CPU": 1}]},
        log_engine_metrics=False,
    )
    subjects = read_subjects(settings, place)
    said: dict[str, list[str]] = {name: [] for name, _ in subjects}
    seconds = answered = 0.0
    begun = time.monotonic()
    for turn, question in enumerate(questions()):
        length = settings.summary_tokens if turn == 5 else settings.answer_tokens

        def ask(row: dict[str, Any], length: int = length) -> dict[str, Any]:
            return {
                "messages": json.loads(row["messages"]),
                "sampling_params": {"max_tokens": length, "temperature": 0.0, "seed": 0},
            }

        def keep(row: dict[str, Any]) -> dict[str, Any]:
            now = time.time()
            return {
                "name": row["name"],
                "text": row["generated_text"],
                "tokens": row["num_generated_tokens"],
                "began": now - row["time_taken_llm"],
                "ended": now,
            }

        rows = [{"name": name, "messages": json.dumps(messages(url, said[name], question))} for name, url in subjects]
        answers = build_processor(config, preprocess=ask, postprocess=keep)(ray.data.from_items(rows)).take_all()
        assert len(answers) == len(subjects)
        for row in answers:
            said[row["name"]].append(" ".join(row["text"].split()))
        seconds += max(row["ended"] for row in answers) - min(row["began"] for row in answers)
        answered += sum(row["tokens"] for row in answers)
    return {"seconds": seconds, "start": time.monotonic() - begun - seconds, "answered": answered}


def measure_turn_by_turn(settings: Settings, place: Path) -> dict[str, float]:
    from vllm import LLM, SamplingParams

    begun = time.monotonic()
    engine = LLM(str(place / "model"), **engine_arguments(settings, prefix_caching=False))
    subjects = read_subjects(settings, place)
    start = time.monotonic() - begun

    def ask_all(said: dict[str, list[str]], question: str, length: int) -> tuple[list[str], float, int]:
        conversations = [messages(url, said[name], question) for name, url in subjects]
        sampling = SamplingParams(max_tokens=length, temperature=0.0, seed=0)
        begun = time.monotonic()
        outputs = engine.chat(conversations, sampling, use_tqdm=False)
        seconds = time.monotonic() - begun
        texts = [" ".join(output.outputs[0].text.split()) for output in outputs]
        return texts, seconds, sum(len(output.outputs[0].token_ids) for output in outputs)

    said: dict[str, list[str]] = {name: [] for name, _ in subjects}
    seconds = prefill = answered = 0.0
    for turn, question in enumerate(questions()):
        texts, took, tokens = ask_all(said, question, settings.summary_tokens if turn == 5 else settings.answer_tokens)
        prefill += ask_all(said, question, 1)[1]  # not in `seconds`; shows how much of them is reading prompts
        for (name, _), text in zip(subjects, texts, strict=True):
            said[name].append(text)
        seconds += took
        answered += tokens
    return {"seconds": seconds, "start": start, "answered": answered, "prefill": prefill}


def engine_arguments(settings: Settings, *, prefix_caching: bool) -> dict[str, Any]:
    """Arguments of vLLM that all arms share, as the stage sets them."""
    arguments: dict[str, Any] = {
        "max_model_len": 2048,
        "dtype": dtype(settings),
        "enforce_eager": not settings.gpu,
        "enable_prefix_caching": prefix_caching,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "seed": 0,
    }
    return arguments if settings.gpu else {**arguments, "block_size": 32}


def dtype(settings: Settings) -> Any:
    return "bfloat16" if settings.gpu else "float32"


def questions() -> tuple[str, ...]:
    from ceca.dialogue.conversation import QUESTIONS, SUMMARY_REQUEST

    return (*QUESTIONS, SUMMARY_REQUEST)


def messages(url: str, said: list[str], question: str) -> list[dict[str, Any]]:
    """A conversation in the format of OpenAI's chat completions.

    Args:
        url: of the image, which is part of the first message.
        said: answers so far.
        question: asked now.
    """
    conversation: list[dict[str, Any]] = []
    for position, text in enumerate([*questions()[: len(said)], question]):
        image = [{"type": "image_url", "image_url": {"url": url}}] if position == 0 else []
        conversation.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
        if position < len(said):
            conversation.append({"role": "assistant", "content": [{"type": "text", "text": said[position]}]})
    return conversation


def read_subjects(settings: Settings, place: Path) -> list[tuple[str, str]]:
    """Name and data URL of every image."""
    import base64

    from ceca.data.store import Store
    from ceca.datasets.images import mime_type

    store = Store(str(place / "data"))
    table = store.read(store.current("images"), ["image_id", "image"]).slice(0, settings.images).to_pylist()
    return [
        (row["image_id"], f"data:{mime_type(row['image'])};base64,{base64.b64encode(row['image']).decode()}")
        for row in table
    ]


ARMS = {"ceca": measure_ceca, "ray.data.llm": measure_ray_data_llm, "turn by turn": measure_turn_by_turn}

if __name__ == "__main__":
    run_benchmark(main, Settings, ARMS, __doc__)

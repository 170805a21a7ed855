"""One run of step_time.py: TRL's GRPOTrainer, or ours, bare or anchored. Prints one JSON object last."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """Sizes of the comparison."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int


CPU = Shape(256, 4, 4, 2, 64, 768, 1024, 4, 8, 64, 64)
CUDA = Shape(1024, 28, 16, 8, 128, 3072, 151_936, 32, 8, 256, 512)
#: Steps of a run that are not counted.
WARM_UP = 2
QUICK = Shape(64, 2, 4, 2, 16, 128, 1024, 2, 2, 16, 8)


def shape_of(quick: bool) -> Shape:
    """The shape for this machine."""
    return QUICK if quick else CUDA if torch.cuda.is_available() else CPU


def word_tokenizer(size: int) -> Any:
    """A word a token, so that what a policy with random weights writes is text, which an encoder reads in as many tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}." if i % 12 == 0 else f"w{i}" for i in range(size - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def prepare(folder: Path, quick: bool) -> dict[str, int]:
    """Write model, tokenizer, prompts and discriminator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from aapa_lightning.anchor.context import Encoding
    from aapa_lightning.anchor.encoder import FrozenEncoder
    from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
    from aapa_lightning.anchor.head import StackedHead

    shape = shape_of(quick)
    tokenizer = word_tokenizer(shape.vocabulary)
    pick = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, len(tokenizer), (shape.prompt_tokens - i % 8,), generator=pick).tolist() for i in range(64)]
    prompts = [tokenizer.decode(row) for row in rows]
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    encoder = FrozenEncoder(str(folder / "model"), Encoding(max_length=4096))
    EncoderHeadDiscriminator(encoder, StackedHead(1, encoder.hidden_size), ("sentence",)).save(folder / "discriminator")
    return asdict(shape)


def reward_of(text: str) -> float:
    """Any reward that differs within a group."""
    return float(len(text) % 7)


class _Reward:
    """The same for ours."""

    name = "length"

    def __call__(self, responses: list[str], records: Any) -> list[float]:
        return [reward_of(text) for text in responses]


def trl_run(folder: Path, steps: int, shape: Shape) -> dict[str, Any]:
    """TRL's trainer with its own defaults, but for what makes it slower or does not run here."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    cuda = torch.cuda.is_available()
    ms: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            synchronise()
            if not hasattr(self, "start"):
                self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronise()
            now = time.perf_counter()
            ms.append(1e3 * (now - self.start))
            self.start = now

    config = GRPOConfig(
        output_dir="out",
        max_steps=steps,
        per_device_train_batch_size=shape.prompts * shape.group,
        num_generations=shape.group,
        max_completion_length=shape.new_tokens,
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        learning_rate=1e-6,
        generation_kwargs={"eos_token_id": None},
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.generation_config.eos_token_id = None
    widths: list[tuple[int, int]] = []
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [reward_of(text) for text in completions],
        args=config,
        train_dataset=Dataset.from_json(str(folder / "prompts.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Clock()],
    )
    generate = trainer.model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = generate(*args, **kwargs)
        widths.append((len(out), out.shape[1] - kwargs["input_ids"].shape[1]))
        return out

    trainer.model.generate = watched
    trainer.train()
    return {"ms": ms, "parts": {}, "generated": widths[-1]}


class Parts:
    """Exclusive seconds of named parts, by wrapping the functions that do them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside, less the parts inside it."""
        synchronise()
        start = time.perf_counter()
        self._stack.append(0.0)
        try:
            yield
        finally:
            synchronise()
            spent = time.perf_counter() - start
            self.seconds[name] += spent - self._stack.pop()
            if self._stack:
                self._stack[-1] += spent

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Count every call of ``owner.method``."""
        inner: Callable[..., Any] = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, counted)


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def aapa_run(folder: Path, steps: int, shape: Shape, anchored: bool) -> dict[str, Any]:
    """Ours, through the Trainer as `aapa fit` runs it."""
    import lightning as L
    from lightning.pytorch.callbacks import Callback

    from aapa_lightning import AapaDataModule, AnchorCallback, GRPOModule, PolicySpec, PromptFormat, SamplingParams, read_records
    from aapa_lightning.loop import window
    from aapa_lightning.rollout.transformers_engine import TransformersEngine

    ms: list[float] = []
    parts, seen = Parts(), Parts()

    class Clock(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            parts.wrap(module.engine, "generate", "generate")
            parts.wrap(module.rewards, "score", "reward")
            if module.anchor is not None:
                parts.wrap(module.anchor, "signal", "anchor")
                parts.wrap(module.anchor, "observe", "guard")
            parts.wrap(window, "response_logprobs", "log-probs")
            parts.wrap(trainer.strategy, "backward", "backward")
            parts.wrap(trainer.strategy, "optimizer_step", "optimiser and rest")

        def on_train_batch_start(self, *args: Any) -> None:
            synchronise()
            if not hasattr(self, "start"):
                self.start = time.perf_counter()

        def on_train_batch_end(self, *args: Any) -> None:
            synchronise()
            now = time.perf_counter()
            ms.append(1e3 * (now - self.start))
            self.start = now
            if len(ms) == WARM_UP:
                seen.seconds = dict(parts.seconds)

    def engine(model: Any, tokenizer: Any, eos_ids: Any) -> TransformersEngine:
        return TransformersEngine(model, tokenizer, ())

    cuda = torch.cuda.is_available()
    module = GRPOModule(
        PolicySpec(model=str(folder / "model")),
        prompts_per_window=shape.prompts,
        group_size=shape.group,
        sampling=SamplingParams(max_new_tokens=shape.new_tokens),
        prompt_format=PromptFormat(chat_template="never"),
        rewards=[_Reward()],
        seed=0,
        engine=engine,
    )
    anchor = [AnchorCallback(str(folder / "discriminator"), weight=0.3)] if anchored else []
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="gpu" if cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if cuda else "32-true",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Clock(), *anchor],
    )
    trainer.fit(module, AapaDataModule(read_records(str(folder / "prompts.jsonl"))))
    count = max(steps - WARM_UP, 1)
    found = {name: 1e3 * (value - seen.seconds.get(name, 0.0)) / count for name, value in parts.seconds.items()}
    responses = module.window.experience.rollouts.response_mask
    return {"ms": ms, "parts": found, "generated": (len(responses), int(responses.sum(-1).min()))}


def main() -> None:
    """Run one kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["trl", "bare", "anchored"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    shape = shape_of(args.quick)
    found = (
        trl_run(args.folder, args.steps, shape) if args.kind == "trl" else aapa_run(args.folder, args.steps, shape, args.kind == "anchored")
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()

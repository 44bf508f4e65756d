"""``train``: a model from scratch on plain text, on any number of processes, resumable at any checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from everlearn.errors import InvalidArgument
from everlearn.models.backbone_config import BackboneConfig
from everlearn.models.hope import HopeConfig
from everlearn.models.presets import preset
from everlearn.models.registry import build
from everlearn.train.data import Corpus, load_corpus, load_tokenizer, pack, train_tokenizer
from everlearn.train.trainer import LevelTrainer

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run made: where it lies, tokens and steps, losses in nats a token, and the log by step."""

    out: str
    tokens: int
    steps: int
    parameters: int
    train_loss: float
    held_out_loss: float
    history: list[dict[str, float]]


def train(
    model: str | BackboneConfig,
    data: str | Path,
    *,
    tokens: int,
    out: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    vocab_size: int | None = None,
    length: int = 512,
    batch_size: int = 8,
    accumulation: int = 1,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    warmup: float = 0.05,
    seed: int = 0,
    held_out: float | Sequence[str] = 0.02,
    text_field: str = "text",
    save_every: int | None = None,
    log_every: int = 10,
    resume: bool = True,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    cpu: bool = False,
    report_to: str = "none",
    **changes: Any,
) -> TrainResult:
    """Train a model from scratch and save it with its tokenizer.

    Under ``torchrun`` every process takes ``batch_size`` rows a step; on CPU the processes speak gloo.

    Args:
        model: a preset's name (``hope-tiny``), or a configuration.
        data: see :func:`everlearn.train.data.load_corpus`.
        tokens: tokens to train on, over all processes; rounded up to whole steps.
        out: folder for checkpoints, the model, the tokenizer and ``result.json``.
        tokenizer: one to reuse, or its folder or name; None trains one on the data.
        vocab_size: size of a tokenizer to be trained; by default the configuration's.
        length: tokens a row.
        batch_size: rows a step and process; ``accumulation`` of them make a step of the optimiser.
        lr: highest rate, reached after ``warmup`` (a share of the steps), then falling to zero along a cosine.
        weight_decay: of matrices.
        seed: of the start and of the order of rows.
        held_out: see :func:`load_corpus`.
        text_field: see :func:`load_corpus`.
        save_every: steps between checkpoints; None is only at the end.
        log_every: steps between log entries.
        resume: go on from the last checkpoint in ``out``, where there is one.
        bf16: autocast to bfloat16.
        gradient_checkpointing: keep only the layers' inputs for the backward.
        cpu: do not use an accelerator.
        report_to: ``"tensorboard"`` also writes its logs under ``out``.
        changes: fields of the preset's configuration to replace.

    Returns:
        a :class:`TrainResult`.

    Raises:
        InvalidArgument: unknown presets or fields, nothing to read, or counts below 1.
    """
    for name, value in {
        "tokens": tokens,
        "length": length,
        "batch_size": batch_size,
        "accumulation": accumulation,
    }.items():
        if not isinstance(value, int) or value < 1:
            raise InvalidArgument(f"{name}: got {value!r}, expected a whole number of at least 1")
    out = Path(out)
    arguments = _arguments(
        out, batch_size, accumulation, lr=lr, weight_decay=weight_decay, warmup=warmup, seed=seed,
        save_every=save_every, log_every=log_every, bf16=bf16, gradient_checkpointing=gradient_checkpointing,
        cpu=cpu, report_to=report_to,
    )  # fmt: skip
    per_step = arguments.world_size * batch_size * accumulation * length
    arguments.max_steps = -(-tokens // per_step)
    corpus = load_corpus(data, held_out, text_field)
    with arguments.main_process_first(local=False, desc="tokenizer"):
        config, encoder = _prepare(model, corpus, tokenizer, vocab_size, out, changes)
    set_seed(seed)
    made = build(config)
    trainer = LevelTrainer(
        made,
        arguments,
        train_dataset=pack(corpus.train, encoder, length),
        tokens_per_step=per_step,
    )
    checkpoint = get_last_checkpoint(str(out)) if resume and out.is_dir() else None
    run = trainer.train(resume_from_checkpoint=checkpoint)
    held_out_loss = trainer.held_out_loss(pack(corpus.held_out, encoder, _held_out_length(corpus, encoder, length)))
    trainer.save_model()
    result = TrainResult(
        out=str(out),
        tokens=run.global_step * per_step,
        steps=run.global_step,
        parameters=sum(p.numel() for p in made.parameters()),
        train_loss=run.training_loss,
        held_out_loss=held_out_loss,
        history=[entry for entry in trainer.state.log_history if "loss" in entry],
    )
    if trainer.is_world_process_zero():
        (out / "result.json").write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")
    return result


def _arguments(
    out: Path,
    batch_size: int,
    accumulation: int,
    *,
    lr: float,
    weight_decay: float,
    warmup: float,
    seed: int,
    save_every: int | None,
    log_every: int,
    bf16: bool,
    gradient_checkpointing: bool,
    cpu: bool,
    report_to: str,
) -> TrainingArguments:
    """The Trainer's settings; see :func:`train`."""
    return TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=lr,
        weight_decay=weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,
        max_grad_norm=1.0,
        logging_steps=log_every,
        save_strategy="no" if save_every is None else "steps",
        save_steps=save_every or 500,
        save_total_limit=2,
        seed=seed,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu and torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to=report_to,
    )


def _prepare(
    model: str | BackboneConfig,
    corpus: Corpus,
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
    vocab_size: int | None,
    out: Path,
    changes: dict[str, Any],
) -> tuple[BackboneConfig, PreTrainedTokenizerBase]:
    """The configuration, and the tokenizer: given, left in ``out`` by an earlier run, or trained and left there."""
    if isinstance(model, str):
        known = set(HopeConfig().to_dict())
        if unknown := set(changes) - known:
            raise InvalidArgument(f"changes: got {sorted(unknown)}, expected fields of the configuration")
        config = preset(model, **changes)
    elif changes:
        raise InvalidArgument(f"changes: got {sorted(changes)} besides a configuration, expected them in it")
    else:
        config = model
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        encoder = tokenizer
    elif tokenizer is not None:
        encoder = load_tokenizer(tokenizer)
    elif (out / "tokenizer.json").is_file():
        encoder = load_tokenizer(out)
    else:
        encoder = train_tokenizer(corpus.train, vocab_size or config.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(out)
    config.vocab_size = len(encoder)
    config.bos_token_id = config.eos_token_id = cast(int, encoder.eos_token_id)
    return config, encoder


def _held_out_length(corpus: Corpus, encoder: PreTrainedTokenizerBase, length: int) -> int:
    """Rows of held-out text are as long as those trained on, or shorter where there is too little of it."""
    return min(length, len(pack(corpus.held_out, encoder, 1)))

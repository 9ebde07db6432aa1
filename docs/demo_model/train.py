"""Train the checkpoint that `flashnorm demo` ships: a byte-level Llama of 1.5 million parameters.

    python docs/demo_model/train.py austen.txt flashnorm_cli/demo_model

Where the text comes from, and how to get it: the model card (README.md) in the output folder.
The output folder is rewritten at every evaluation, so a stopped run leaves a usable checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
BATCH = 8
EVAL_EVERY = 500
WARMUP = 200
PEAK_LR = 3e-3
# Adam moves every weight by about the learning rate per step, whatever its size. Norm weights start at
# one, matrices at 0.02 to 0.1: a larger rate lets the norms travel as far, relative to their size.
NORM_LR_FACTOR = 8.0
END = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value, and one special token: BPE over the byte alphabet, without any merge."""
    # GPT-2's stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest follows from 256.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def chapters(text: str) -> list[str]:
    """Split at the chapter headings; one line per paragraph, so that the model learns no line width."""
    parts = re.split(r"(?im)^\s*(?:chapter|volume)\s+[ivxlc\d]+\.?\s*$", text.replace("_", ""))
    paragraphs = [[" ".join(p.split()) for p in re.split(r"\n\s*\n", part)] for part in parts]
    flowed = ["\n".join(p for p in part if p) for part in paragraphs]
    return [part for part in flowed if len(part) > 1000]  # title pages are shorter


def token_ids(texts: list[str], end: int) -> torch.Tensor:
    """What the tokenizer would return, at once: its ids are the byte values. One end token per chapter."""
    return torch.tensor([i for text in texts for i in (*text.encode(), end)])


def excerpt(chapter: str, size: int = 4096) -> str:
    """The first whole paragraphs of a chapter, about `size` characters."""
    return chapter[: chapter.rindex("\n", 0, size) + 1]


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=120, bos_token_id=end, eos_token_id=end, pad_token_id=end
    )
    return model


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": matrices, "lr": PEAK_LR, "weight_decay": 0.1},
        {"params": norms, "lr": PEAK_LR * NORM_LR_FACTOR, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


@torch.no_grad()
def nats_per_byte(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean loss over windows of CONTEXT bytes laid end to end; a window does not see the one before it."""
    count = (len(ids) - 1) // CONTEXT
    inputs = ids[: count * CONTEXT].view(count, CONTEXT)
    targets = ids[1 : count * CONTEXT + 1].view(count, CONTEXT)
    total = 0.0
    for x, y in zip(inputs.split(64), targets.split(64), strict=True):
        logits = model(input_ids=x).logits.float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / (count * CONTEXT)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, heldout: str, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(heldout, encoding="utf-8")
    tokenizer.save_pretrained(out)
    # A copy is cast: training goes on in float32. Two shards, so that the demo shows an index too.
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(out, max_shard_size="1600KB")
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes 0600


def norm_table(model: LlamaForCausalLM) -> str:
    """The statistics of the model card: how far training has moved each norm weight from one."""
    rows = ["| norm | min | mean | max | mean abs(g - 1) |", "| --- | --- | --- | --- | --- |"]
    for name, p in model.named_parameters():
        if p.ndim == 1:
            g = p.detach().float()
            numbers = (g.min(), g.mean(), g.max(), (g - 1).abs().mean())
            rows.append(f"| `{name}` | " + " | ".join(f"{n:.2f}" for n in numbers) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the checkpoint of `flashnorm demo`.")
    parser.add_argument("text", type=Path, help="the corpus, one UTF-8 text file")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)

    tokenizer = byte_tokenizer()
    texts = chapters(args.text.read_text(encoding="utf-8"))
    held = texts[25::50]  # every fiftieth chapter: a few of each novel, none of them seen in training
    seen = [text for i, text in enumerate(texts) if i % 50 != 25]
    train_ids = token_ids(seen, tokenizer.eos_token_id)
    held_ids = token_ids(held, tokenizer.eos_token_id).to(device)
    print(f"{len(texts)} chapters; {len(train_ids):,} bytes to train on, {len(held_ids):,} held out")

    model = build_model(tokenizer)
    model = model.to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    optimizer = build_optimizer(model)

    def scale(step: int) -> float:
        return min(step / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale(step + 1))
    began = time.monotonic()
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(train_ids) - CONTEXT, (BATCH,))
        batch = torch.stack([train_ids[s : s + CONTEXT + 1] for s in starts.tolist()]).to(device)
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
        if step % EVAL_EVERY == 0 or step == args.steps:
            print(f"step {step}: held out {nats_per_byte(model, held_ids):.4f} nats per byte", flush=True)
            print(norm_table(model), flush=True)
            save(model, tokenizer, excerpt(held[0]), args.out)


if __name__ == "__main__":
    main()

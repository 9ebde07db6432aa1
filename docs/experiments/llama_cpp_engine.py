"""Folded checkpoints in real llama.cpp. Not collected by pytest: it needs the engine and takes about ten minutes.

    pip install xllamacpp gguf sentencepiece requests
    FLASHNORM_LLAMA_CPP=<llama.cpp's sources> python docs/experiments/llama_cpp_engine.py docs/llama_cpp.json [PART ...]

Tiny random models of three families, their norms far from one, go through llama.cpp's own converter before and after
the fold, and run. Written down per model: what `verify --runtime gguf` finds for the right fold and for a wrong one;
how far all log-probabilities are from the source's GGUF and from transformers; what happens to layout dropped, to a
head untied against the runtime, to quantised weights, and to a LoRA adapter. A claim that does not hold is an error.
"""

import ctypes
import io
import json
import os
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import flashnorm_cli
from flashnorm_cli.checkpoint.header import read_header
from flashnorm_cli.cli import main as command
from flashnorm_cli.proof import engines
from flashnorm_cli.runtimes import llama_cpp, process

# torch and transformers are imported where they are needed: most of the processes here only run llama.cpp.
DEMO = Path(flashnorm_cli.__file__).with_name("demo_model")
VOCABULARY, CONTEXT = 512, 96
# Rows of 256 and 512 weights: Q4_K works on blocks of 256. llama.cpp scales Gemma-2's attention by the head's width.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MODELS = {
    "llama": {"tie_word_embeddings": False},
    "llama, tied head": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 64},
}
QUANTISED = ("Q8_0", "Q4_0", "Q4_K")
SEEDS = 2


def flashnorm(*arguments: object) -> tuple[int, str]:
    """Exit code and all output of a flashnorm command, in this process."""
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        try:
            command([str(a) for a in arguments])
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, text.getvalue()


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"does not hold: {what}")


# ---- models ----------------------------------------------------------------------------------------------------------


def tokenizer(folder: Path) -> Path:
    """A small SentencePiece model, which llama.cpp's converter reads for all of these families."""
    import sentencepiece

    text = Path(engines.__file__).with_name("prompts.txt")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def make(folder: Path, model: str, dtype: str, spm: Path, seed: int = 0) -> Path:
    import torch
    from families import build, randomize_gains, save
    from transformers import CONFIG_MAPPING

    family = model.split(",")[0]
    made = build(family, seed, CONFIG_MAPPING[family](**SIZES | MODELS[model]))
    randomize_gains(made, seed + 1)
    save(made, folder, getattr(torch, dtype))
    shutil.copy(spm, folder / "tokenizer.model")
    return folder


def prompts(count: int, spm: Path, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Pieces of text in another order than the tokenizer was trained on, 48 tokens each."""
    import sentencepiece

    ids = sentencepiece.SentencePieceProcessor(str(spm)).encode((DEMO / "heldout.txt").read_text())
    return [[i % vocabulary for i in ids[n * 48 : n * 48 + 48]] for n in range(count)]


def forget_a_reader(source: Path, folded: Path) -> str:
    """Put the source's weights back into one reader of a folded norm: a wrong fold."""
    name = "model.layers.1.self_attn.v_proj.weight"
    (theirs,), (mine,) = (sorted(f.glob("*.safetensors")) for f in (source, folded))
    before, after = read_header(theirs), read_header(mine)
    raw = bytearray(mine.read_bytes())
    start, entry = after.data_start + after.tensors[name].start, before.tensors[name]
    found = theirs.read_bytes()[before.data_start + entry.start :][: entry.nbytes]
    raw[start : start + entry.nbytes] = found
    mine.write_bytes(raw)
    return name


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


def convert(folder: Path, out: Path, dtype: str = "float32") -> Path:
    """A checkpoint as GGUF, by the stock converter."""
    (out.parent / "converting").mkdir(exist_ok=True)
    return llama_cpp.converted(folder, dtype, out.parent / "converting").rename(out)


def log_probabilities(gguf: Path, texts: list[list[int]], adapter: Path | None = None) -> np.ndarray:
    """Of all tokens after every second prefix: float64 of shape (prompts, prefixes, vocabulary)."""
    with TemporaryDirectory() as scratch:
        job, result = Path(scratch, "job.json"), Path(scratch, "result.npy")
        job.write_text(json.dumps({"model": str(gguf), "texts": texts, "adapter": adapter and str(adapter)}))
        process.call([sys.executable, __file__, "--run", str(job), str(result)], dict(os.environ))
        return np.load(result)


def run(job: dict, out: Path) -> None:
    """The process of one model."""
    import xllamacpp

    settings = llama_cpp.llama_cpp_settings(job["model"], CONTEXT)
    if job["adapter"]:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
    engine = xllamacpp.Server(settings)
    rows = []
    for text in job["texts"]:
        for length in range(2, len(text) + 1, 2):
            found = llama_cpp.llama_cpp_top(engine, text[:length], VOCABULARY)
            rows.append([found[i] for i in range(len(found))])
    np.save(out, np.array(rows).reshape(len(job["texts"]), -1, len(rows[0])))


def in_transformers(folder: Path, texts: list[list[int]]) -> np.ndarray:
    """As `log_probabilities`, by transformers in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(texts)).logits[:, 1::2].double().log_softmax(-1).numpy()


def distance(mine: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Of two sets of log-probabilities: the largest difference, and the mean KL divergence in nats."""
    kl = (np.exp(reference) * (reference - mine)).sum(-1)
    return {"largest": rounded(abs(mine - reference).max()), "kl": rounded(kl.mean())}


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


def layout_of(gguf: Path) -> dict[str, tuple]:
    import gguf as library

    return {t.name: (t.tensor_type.name, tuple(map(int, t.shape))) for t in library.GGUFReader(gguf).tensors}


# ---- the parts -------------------------------------------------------------------------------------------------------


def verified(folded: Path, token_ids: Path) -> dict:
    """What `flashnorm verify --runtime gguf` says, without the other levels' verdict."""
    _, text = flashnorm("verify", folded, "--level", "weights", "--runtime", "gguf", "--token-ids", token_ids, "--json",
                        "--no-record")  # fmt: skip
    level = json.loads(text)["levels"]["runtime:gguf"]
    figures = {k: v for k, v in level.get("figures", {}).items() if k not in ("engine", "version")}
    figures = {k: rounded(v) if isinstance(v, float) else v for k, v in figures.items()}
    return {"status": level["status"], **figures} | ({"reason": level["reason"]} if level.get("reason") else {})


def right_and_wrong(model: str, dtype: str, work: Path, spm: Path, texts: list[list[int]]) -> dict:
    source = make(work / "source", model, dtype, spm)
    token_ids = work / "prompts.json"
    token_ids.write_text(json.dumps(texts))
    code, text = flashnorm("fold", source, work / "folded", "--json")
    require(code == 0, f"fold of {model}: {text}")
    row = {"model": model, "dtype": dtype, "lm_head": json.loads(text)["lm_head"]}
    row["verify"] = verified(work / "folded", token_ids)
    require(row["verify"]["status"] == "passed", f"verify of {model} in {dtype}: {row}")
    before, after = convert(source, work / "source.gguf", dtype), convert(work / "folded", work / "folded.gguf", dtype)
    changed = set(layout_of(after).items()) ^ set(layout_of(before).items())
    row["gguf_differs_in"] = sorted(name for name, _ in changed)
    require(row["gguf_differs_in"] == (["output.weight"] if row["lm_head"] == "untied" else []), str(row))
    row["gguf_bytes"] = [before.stat().st_size, after.stat().st_size]
    exact = in_transformers(source, texts)
    row["source_to_transformers"] = distance(log_probabilities(before, texts), exact)
    row["folded_to_transformers"] = distance(log_probabilities(after, texts), exact)
    if dtype == "float32":
        row["wrong"] = {"not_folded": forget_a_reader(source, work / "folded"), **verified(work / "folded", token_ids)}
        require(row["wrong"]["status"] == "failed", f"a wrong fold of {model} passed in {dtype}")
    return row


def dropped(model: str, work: Path, spm: Path, texts: list[list[int]]) -> dict:
    """Layout dropped converts without a word and does not load."""
    source = make(work / "source", model, "bfloat16", spm)
    code, text = flashnorm("fold", source, work / "folded", "--layout", "dropped")
    require(code == 0, text)
    says = next(line for line in text.splitlines() if line.startswith("Layout dropped"))
    gguf = convert(work / "folded", work / "folded.gguf", "bfloat16")
    try:
        log_probabilities(gguf, texts[:1])
    except process.EngineError as error:
        return {"model": model, "fold_says": says, "converter": "converts", "engine_says": str(error)}
    raise SystemExit(f"does not hold: llama.cpp refuses layout dropped of {model}")


def dropped_head(model: str, work: Path, spm: Path, texts: list[list[int]]) -> dict:
    """By default the final norm is kept; by --final-norm untie the head is lost, and verify sees it."""
    source = make(work / "source", model, "float32", spm)
    token_ids = work / "prompts.json"
    token_ids.write_text(json.dumps(texts))
    row = {"model": model}
    for choice in ("auto", "untie"):
        code, text = flashnorm("fold", source, work / choice, "--final-norm", choice)
        require(code == 0, text)
        row[choice] = {
            "fold_says": next(line for line in text.splitlines() if "tied to the embedding" in line),
            "gguf_has_output": "output.weight" in layout_of(convert(work / choice, work / f"{choice}.gguf")),
            "verify": verified(work / choice, token_ids),
        }
    require(row["auto"]["verify"]["status"] == "passed", str(row))
    require(row["untie"]["verify"]["status"] == "failed", str(row))
    require(not row["untie"]["gguf_has_output"], str(row))
    # The files themselves are right: it is the engine that drops the head.
    difference = distance(in_transformers(work / "untie", texts), in_transformers(source, texts))
    row["untie"]["in_transformers"] = difference
    return row


def quantised(gguf: Path, out: Path, kind: str) -> Path:
    """Every matrix in one quantised type, by ggml's own routine; norms stay float32."""
    import gguf as library
    import xllamacpp

    ggml = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    target = library.GGMLQuantizationType[kind]
    per_block, bytes_per_block = library.GGML_QUANT_SIZES[target]
    reader = library.GGUFReader(gguf)
    architecture = reader.fields["general.architecture"].contents()
    writer = library.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            kinds = field.types
            sub = kinds[-1] if kinds[0] == library.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=sub)
    for tensor in reader.tensors:
        data = np.ascontiguousarray(tensor.data)
        if data.ndim == 2:
            rows, width = data.shape
            packed = np.empty((rows, width // per_block * bytes_per_block), np.uint8)
            ggml.ggml_quantize_chunk(
                ctypes.c_int(target.value),
                data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
                packed.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_int64(0),
                ctypes.c_int64(rows),
                ctypes.c_int64(width),
                None,
            )
            writer.add_tensor(tensor.name, packed, raw_dtype=target)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def quantisation(source: Path, work: Path, texts: list[list[int]], kinds: tuple[str, ...]) -> dict:
    """KL divergence from the float32 source that quantising the source and the folded checkpoint costs."""
    code, text = flashnorm("fold", source, work / "folded")
    require(code == 0, text)
    exact = convert(source, work / "source.gguf"), convert(work / "folded", work / "folded.gguf")
    reference = log_probabilities(exact[0], texts)
    row: dict = {}
    for kind in kinds:
        kl = [
            distance(log_probabilities(quantised(gguf, work / f"{kind}.{i}.gguf", kind), texts), reference)["kl"]
            for i, gguf in enumerate(exact)
        ]
        row[kind] = {"source": kl[0], "folded": kl[1], "ratio": rounded(kl[1] / kl[0])}
    return row


def adapters(work: Path, spm: Path, texts: list[list[int]]) -> dict:
    """A LoRA adapter of the source, by llama.cpp's own converter, on the source's and on the folded GGUF."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    source = make(work / "source", "llama", "float32", spm)
    code, text = flashnorm("fold", source, work / "folded")
    require(code == 0, text)
    generator = torch.Generator().manual_seed(5)
    weights, norms = {}, AutoModelForCausalLM.from_pretrained(source).state_dict()
    for layer in range(SIZES["num_hidden_layers"]):
        stem = f"model.layers.{layer}.self_attn.q_proj"
        weights[f"base_model.model.{stem}.lora_A.weight"] = torch.randn(4, 256, generator=generator) / 16
        weights[f"base_model.model.{stem}.lora_B.weight"] = torch.randn(256, 4, generator=generator) / 2
    scaled = {
        name: value * norms[f"model.layers.{name.split('.')[4]}.input_layernorm.weight"] if "lora_A" in name else value
        for name, value in weights.items()
    }
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for name, tensors in (("adapter", weights), ("adapter-folded", scaled)):
        (work / name).mkdir()
        (work / name / "adapter_config.json").write_text(json.dumps(settings))
        save_file(tensors, work / name / "adapter_model.safetensors")
        script = Path(os.environ[llama_cpp.LLAMA_CPP]) / "convert_lora_to_gguf.py"
        out = ["--outfile", str(work / f"{name}.gguf"), "--base", str(source), str(work / name)]
        process.call([sys.executable, str(script), *out], dict(os.environ))
    before, after = convert(source, work / "source.gguf"), convert(work / "folded", work / "folded.gguf")
    reference = log_probabilities(before, texts, work / "adapter.gguf")
    row = {
        "without_adapter": distance(log_probabilities(before, texts), reference),
        "folded_with_the_sources_adapter": distance(log_probabilities(after, texts, work / "adapter.gguf"), reference),
        "folded_with_the_folded_adapter": distance(
            log_probabilities(after, texts, work / "adapter-folded.gguf"), reference
        ),
    }
    require(row["folded_with_the_folded_adapter"]["largest"] < 1e-3, str(row))
    require(row["folded_with_the_sources_adapter"]["largest"] > 1e-1, str(row))
    return row


# ---- all of it -------------------------------------------------------------------------------------------------------


class Setting:
    """A folder to work in, with the tokenizer and the prompts of all models."""

    def __init__(self, work: Path) -> None:
        self.work, self.tokenizer = work, tokenizer(work)
        self.texts = prompts(2, self.tokenizer)

    def fresh(self, name: str) -> Path:
        print(name, file=sys.stderr, flush=True)
        folder = self.work / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir()
        return folder

    def identity(self, model: str) -> dict:
        dtypes = ("float32", "bfloat16") if model == "llama" else ("float32",)
        return {d: right_and_wrong(model, d, self.fresh(f"{model} {d}"), self.tokenizer, self.texts) for d in dtypes}

    def dropped(self, model: str) -> dict:
        return dropped(model, self.fresh(f"{model} dropped"), self.tokenizer, self.texts)

    def untied_head(self, model: str) -> dict:
        return dropped_head(model, self.fresh(f"{model} head"), self.tokenizer, self.texts)

    def quantised(self, model: str) -> list[dict]:
        rows = []
        for seed in range(SEEDS):
            folder = self.fresh(f"{model} quantised {seed}")
            source = make(folder / "source", model, "float32", self.tokenizer, 10 * seed)
            rows.append({"seed": seed, **quantisation(source, folder, self.texts, QUANTISED)})
        return rows

    def quantised_demo(self, model: str) -> dict:
        folder = self.fresh("demo model quantised")
        shutil.copytree(DEMO, folder / "source", ignore=shutil.ignore_patterns("tokenizer*"))
        shutil.copy(self.tokenizer, folder / "source" / "tokenizer.model")
        raw = (DEMO / "heldout.txt").read_bytes()
        texts = [list(raw[n * 48 : n * 48 + 48]) for n in range(4)]
        # Its rows of 192 weights are no multiple of Q4_K's 256.
        return quantisation(folder / "source", folder, texts, QUANTISED[:2])

    def adapter(self, model: str) -> dict:
        return adapters(self.fresh("adapter"), self.tokenizer, self.texts)


PARTS = (
    *(f"identity:{model}" for model in MODELS),
    "dropped:llama",
    "dropped:gemma2",
    "untied_head:gemma2",
    "quantised:llama",
    "quantised:qwen3",
    "quantised_demo:llama",
    "adapter:llama",
)


def versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "transformers", "xllamacpp", "gguf", "sentencepiece")}
    sources = Path(os.environ[llama_cpp.LLAMA_CPP]).resolve()
    package = next((p.name for p in sources.parents if p.name.startswith("llama_cpp_python-")), sources.name)
    return found | {"converter": package.replace("_", "-")}


def main(out: Path, parts: list[str]) -> None:
    """Run parts (all of them by default: `PARTS`) and write each into the file as it is done."""
    from transformers import logging
    from transformers.utils.logging import disable_progress_bar

    if missing := engines._not_installed("gguf"):
        raise SystemExit(missing)
    logging.set_verbosity_error()
    disable_progress_bar()
    with TemporaryDirectory() as work:
        setting = Setting(Path(work))
        for part in parts or PARTS:
            kind, _, model = part.partition(":")
            row = getattr(setting, kind)(model)
            found = json.loads(out.read_text()) if out.exists() else {}
            found |= {"date": date.today().isoformat(), "versions": versions()}
            found.setdefault(kind, {})[model] = row
            out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        run(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])

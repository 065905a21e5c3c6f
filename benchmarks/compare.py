"""Training speed and memory of this program, `Trainer`, TRL and LitGPT: the same model, conversations and updates.

    python -m benchmarks.compare --data conversations.jsonl --max-length 1024

Each engine trains in a process of its own, one after the other, in several rounds, so that a machine that slows down
slows all of them. Writes benchmarks/results/compare-<hardware>.json and, with --readme, the table of
docs/performance.md.
"""

import benchmarks.bare  # noqa: F401  first: it mocks what is not installed

# isort: split
import json
import math
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.roofline import SMOLLM2
from compute.layers import compiled_graphs
from compute.layout import random_examples
from compute.memory import keep_freed_memory
from compute.self_check import choose_layout
from config import PRESETS, QUICKSTART_MODEL, Config, Parser, UserError, run_command
from conversations.formats import read_conversations
from conversations.masking import IGNORE, Example, encode
from conversations.sources import parse_source
from conversations.tokenizer import load_tokenizer
from model import choose_precision, load_model, token_loss
from storage import hub
from tests.reference import collator
from train import make_optimizer, train_step

ROOT = Path(__file__).parent.parent
LEARNING_RATE = 1e-4


def train_ours(workload, layout, compile=False):
    """Train with this program's `train_step`."""
    precision, model = workload.precision, workload.model
    if precision.device.type == "cpu":
        keep_freed_memory()
    config = Config(layout=layout, compile=compile, micro_batch_tokens=workload.options["micro_batch_tokens"])
    longest = workload.options["max_length"]
    layout = choose_layout(model, token_loss, config, workload.pad_id, precision, longest=longest)
    optimizer, scaler = make_optimizer(model, 0.1), precision.grad_scaler()
    model.train()
    for window in workload.windows:
        workload.begin()
        micro_batches = list(layout.micro_batches(window))
        numbers = train_step(
            model, optimizer, micro_batches, LEARNING_RATE, precision=precision, scaler=scaler, max_grad_norm=1.0
        )
        workload.tokens = sum(batch.tokens for batch in micro_batches)  # padded rows may come without a mask to count
        workload.end(numbers["loss"])
    print(f"{layout.describe()}; {compiled_graphs()} graphs compiled", file=sys.stderr)


def train_with_trainer(workload, rows_at_once, rows=None, kind=Trainer, arguments=TrainingArguments, **more):
    """Train with `Trainer` or a class derived from it; `rows` is the number of rows of an update."""
    rows = rows or workload.options["batch_size"]
    accumulated = math.ceil(rows / rows_at_once)
    how = {"data_collator": collator(workload.pad_id)} if kind is Trainer else {"processing_class": workload.tokenizer}
    arguments_of_run = arguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=math.ceil(rows / accumulated),
        gradient_accumulation_steps=accumulated,
        max_steps=-1,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=workload.precision.device.type == "cpu",
        bf16=workload.precision.name == "bf16",
        fp16=workload.precision.name == "fp16",
        **more,
    )
    examples = [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in workload.examples]
    data, stopwatch = Dataset.from_list(examples), [Stopwatch(workload)]
    kind(workload.model, arguments_of_run, train_dataset=data, callbacks=stopwatch, **how).train()


class Stopwatch(TrainerCallback):
    """Times `Trainer`'s updates."""

    def __init__(self, workload):
        self.workload = workload

    def on_step_begin(self, *_, **__):
        self.workload.begin()

    def on_step_end(self, *_, **__):
        self.workload.end()

    def on_log(self, args, state, control, logs, **_):  # noqa: ARG002
        if "loss" in logs and self.workload.updates:
            self.workload.updates[-1]["loss"] = logs["loss"]


def train_with_trl(workload, rows_at_once, **more):
    """Train with TRL, without activation checkpointing; packed, an update has as many tokens, not rows."""
    from trl import SFTConfig, SFTTrainer

    more = {"gradient_checkpointing": False, "max_length": workload.options["max_length"], **more}
    tokens = count_tokens(workload.examples) / len(workload.windows)
    rows = max(1, round(tokens / more["max_length"])) if more.get("packing") else None
    train_with_trainer(workload, rows_at_once, rows, SFTTrainer, SFTConfig, **more)


def train_with_litgpt(workload, rows_at_once):
    """Train as LitGPT's recipe `finetune full` does, in autocast; its model does not tie head and embeddings."""
    from lightning import Fabric
    from litgpt import GPT
    from litgpt import Config as LitConfig
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    config, weights = LitConfig.from_name("SmolLM2-135M-Instruct"), {}
    copy_weights_hf_llama(config, {}, weights, workload.model.cpu().state_dict())
    precision = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}[workload.precision.name]
    fabric = Fabric(accelerator=workload.precision.device.type, devices=1, precision=precision)
    model = GPT(config)
    model.load_state_dict(weights)
    model.max_seq_length = workload.options["max_length"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    model, optimizer = fabric.setup(model, optimizer)
    workload.model.to("meta")  # only its shapes are still needed
    collate = collator(workload.pad_id)
    for window in workload.windows:
        workload.begin()
        losses = []
        for first in range(0, len(window), rows_at_once):
            rows = window[first : first + rows_at_once]
            batch = collate([{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows])
            ids, labels = batch["input_ids"].to(fabric.device), batch["labels"].to(fabric.device)
            loss = chunked_cross_entropy(model(ids)[:, :-1], labels[:, 1:])
            fabric.backward(loss * len(rows) / len(window))
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        workload.tokens = count_tokens(window)
        workload.end(torch.stack(losses).mean().item())


IN_ORDER = {"train_sampling_strategy": "sequential"}
ENGINES = {
    "ours, padded": lambda workload: train_ours(workload, "padded"),
    "ours, packed": lambda workload: train_ours(workload, "packed"),
    "ours, packed, compiled": lambda workload: train_ours(workload, "packed", compile=True),
    "Trainer, reference settings": lambda work: train_with_trainer(work, 4, gradient_checkpointing=True, **IN_ORDER),
    "Trainer, best": lambda work: train_with_trainer(work, work.rows_at_once, **work.sampling_arguments()),
    # A few rows, which TRL makes one of: the mask of torch's attention is quadratic in it, and each layer keeps a copy.
    "TRL, packed": lambda work: train_with_trl(work, max(1, work.rows_at_once // 8), packing=True),
    "TRL, padded": lambda work: train_with_trl(work, work.rows_at_once, **work.sampling_arguments()),
    "TRL, padded, Liger": lambda work: train_with_trl(
        work, work.rows_at_once, use_liger_kernel=True, **work.sampling_arguments()
    ),
    "LitGPT": lambda work: train_with_litgpt(work, work.rows_at_once),
}
# TRL is slower padded than packed, Liger needs a GPU, and LitGPT is not among the requirements.
DEFAULT_ENGINES = [name for name in ENGINES if "TRL, padded" not in name and name != "LitGPT"]


class Workload:
    """The model and the windows that an engine trains on, and the stopwatch of its updates."""

    def __init__(self, options):
        self.options = options
        self.precision = choose_precision(options["device"], options["dtype"])
        if options["synthetic"]:
            torch.manual_seed(0)
            self.tokenizer, self.pad_id = None, 0
            self.model = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(self.precision.device)
        else:
            self.load(options)
        self.rows_at_once = options["rows_at_once"] or (1 if self.precision.device.type == "cpu" else 16)
        self.windows = self.make_windows()
        self.examples = [example for window in self.windows for example in window]
        self.tokens, self.updates = 0, []
        self.model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def load(self, options):
        path, local = hub.find_model(options["model"])
        self.tokenizer = load_tokenizer(path, local)
        self.pad_id = self.tokenizer.pad_token_id
        self.model = load_model(path, self.tokenizer, self.precision.device, local)

    def make_windows(self):
        """The windows of all updates; the largest comes first, to warm up: caches fill, compilers compile."""
        length, size = self.options["max_length"], self.options["batch_size"]
        wanted = size * (1 + self.options["updates"])
        if self.options["synthetic"]:
            examples = make_synthetic_examples(wanted, length)
        else:
            chats = [chat for _, _, chat in read_conversations(map(parse_source, self.options["data"]))]
            examples = [Example(ids[:length], labels[:length]) for ids, labels in encode(chats, self.tokenizer)]
        examples = [example for example in examples if example.supervised_tokens]
        if len(examples) < wanted:
            raise UserError(f"--data: {len(examples)} conversations are too few; this takes {wanted}")
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(42)).tolist()
        windows = [[examples[i] for i in order[first : first + size]] for first in range(0, wanted, size)]
        largest = max(windows, key=count_tokens)
        return [largest] + [window for window in windows if window is not largest]

    def sampling_arguments(self):
        """`Trainer`'s arguments: conversations of one length together, where there is something to pad."""
        return {"train_sampling_strategy": "group_by_length"} if self.rows_at_once > 1 else IN_ORDER

    def count(self, _module, _args, batch):
        """Count the tokens of a forward pass, without padding; on the device, so that nothing waits for it."""
        mask = batch.get("attention_mask")
        self.tokens += batch["input_ids"].numel() if mask is None else mask.sum()

    def begin(self):
        self.wait()
        self.tokens, self.began = 0, time.perf_counter()

    def end(self, loss=None):
        self.wait()
        seconds = time.perf_counter() - self.began
        self.updates.append({"tokens": int(self.tokens), "seconds": seconds, "loss": loss})

    def wait(self):
        if self.precision.device.type == "cuda":
            torch.cuda.synchronize()

    def flops_per_token(self):
        """FLOPs per token of a forward and a backward pass over these conversations: 6 a weight, and the attention."""
        config = self.model.config.get_text_config()
        head = self.model.get_output_embeddings().weight
        embedded = {id(head), id(self.model.get_input_embeddings().weight)}
        layers = sum(p.numel() for p in self.model.parameters() if id(p) not in embedded)
        lengths = [len(example.input_ids) for example in self.examples]
        supervised = sum(example.supervised_tokens for example in self.examples) / sum(lengths)
        seen = sum(n * n / 2 for n in lengths) / sum(lengths)  # mean number of tokens that a token attends to
        attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim_of(config) * seen
        return 6 * (layers + supervised * head.numel() + attention)


def make_synthetic_examples(count, longest):
    """Random tokens instead of conversations: lengths spread like UltraChat's, 60 % supervised."""
    torch.manual_seed(0)
    lengths = torch.empty(count).log_normal_(6.9, 0.5).int().clamp(16, longest).tolist()
    examples = random_examples(lengths, SMOLLM2["vocab_size"])
    return [Example(ids, ids.where(torch.arange(len(ids)) >= 0.4 * len(ids), IGNORE)) for ids, _ in examples]


def count_tokens(examples):
    return sum(len(example.input_ids) for example in examples)


def peak_memory(precision):
    """Peak memory in GB: what was allocated on the GPU, or the process' resident memory on a CPU."""
    if precision.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def head_dim_of(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def measure_gemm(precision, size):
    """The FLOP/s of a large matrix product on this machine."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision.name]
    a = torch.randn(size, size, device=precision.device).to(dtype)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        _ = (a @ a)[0, 0].item()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def measure(engine, options):
    """Run one engine in this process and print the measurements as JSON."""
    workload = Workload(options)
    ENGINES[engine](workload)
    measured = [update for update in workload.updates[1:] if update["tokens"]]
    result = {
        "updates": measured,
        "peak_memory_gb": peak_memory(workload.precision),
        "flops_per_token": workload.flops_per_token(),
        "gemm_flops": measure_gemm(workload.precision, 4096 if workload.precision.device.type == "cpu" else 8192),
    }
    print(json.dumps(result))


def run_engines(engines, options, on_result):
    """Each engine in its own process, all of them in turn; returns their results by name.

    Args:
        on_result: called with the results so far after every engine.
    """
    results = {engine: [] for engine in engines}
    for number in range(options["rounds"]):
        for engine in engines:
            began = time.perf_counter()
            arguments = ["--measure", engine, "--options", json.dumps(options)]
            command = [sys.executable, "-m", "benchmarks.compare", *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{engine}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", file=sys.stderr)
                continue
            results[engine].append(json.loads(done.stdout.splitlines()[-1]))
            speeds = [f"{update['tokens'] / update['seconds']:,.0f}" for update in results[engine][-1]["updates"]]
            took = f"{time.perf_counter() - began:.0f} s"
            print(f"round {number + 1}: {engine}: {', '.join(speeds)} tokens/s ({took})", file=sys.stderr, flush=True)
            on_result({name: rounds for name, rounds in results.items() if rounds})
    return {engine: rounds for engine, rounds in results.items() if rounds}


def summarize(results):
    """Each engine's median speed, the range over updates, peak memory, utilisation and last loss."""
    gemm = statistics.median(result["gemm_flops"] for rounds in results.values() for result in rounds)
    rows = {}
    for engine, rounds in results.items():
        speeds = [update["tokens"] / update["seconds"] for result in rounds for update in result["updates"]]
        overall = [sum(u["tokens"] for u in r["updates"]) / sum(u["seconds"] for u in r["updates"]) for r in rounds]
        rows[engine] = {
            "tokens_per_second": statistics.median(overall),
            "slowest_update": min(speeds),
            "fastest_update": max(speeds),
            "peak_memory_gb": max(result["peak_memory_gb"] for result in rounds),
            "utilisation": statistics.median(overall) * rounds[0]["flops_per_token"] / gemm,
            "last_loss": rounds[0]["updates"][-1]["loss"],
        }
    return gemm, rows


def table(rows):
    """The summary as Markdown; ratios are to `Trainer` with the reference settings."""
    base = rows.get("Trainer, reference settings", next(iter(rows.values())))["tokens_per_second"]
    lines = [
        "| | real tokens/s | slowest to fastest update | ratio | peak memory | utilisation | loss of the last update |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine, row in rows.items():
        lines.append(
            f"| {engine} | {row['tokens_per_second']:,.0f} "
            f"| {row['slowest_update']:,.0f} – {row['fastest_update']:,.0f} "
            f"| {row['tokens_per_second'] / base:.2f} | {row['peak_memory_gb']:.1f} GB | {row['utilisation']:.0%} "
            f"| {row['last_loss']:.4f} |"
        )
    return "\n".join(lines)


def describe_hardware(precision):
    """The device's name, for a table and for a file name."""
    name = torch.cuda.get_device_name(precision.device) if precision.device.type == "cuda" else cpu_name()
    return name, re.sub(r"[^a-z0-9]+", "-", f"{name} {precision.name}".lower()).strip("-")


def cpu_name():
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} cores"


def main(argv):
    parser = Parser(description="Compare training speed and memory with Trainer and TRL.")
    parser.add_argument("--data", nargs="+", default=list(PRESETS["quickstart"]["dataset"]), metavar="FILE")
    parser.add_argument("--model", default=QUICKSTART_MODEL)
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="random weights of SmolLM2-135M's shape and random tokens: nothing is read",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4, help="conversations of an update (default 4)")
    parser.add_argument("--updates", type=int, default=3, help="timed, after one that is not (default 3)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows-at-once", type=int, default=0, help="micro-batch of the best Trainer (CPU 1, GPU 16)")
    parser.add_argument("--micro-batch-tokens", type=int, default=0, help="ours; default: as the device chooses")
    parser.add_argument("--engines", nargs="+", default=DEFAULT_ENGINES, choices=ENGINES, metavar="NAME")
    parser.add_argument("--tag", default="", help="name of the results, instead of the hardware's")
    parser.add_argument("--readme", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--measure", choices=ENGINES, metavar="NAME", help="of one engine only, in this process")
    parser.add_argument("--options", type=json.loads, help="as JSON")
    options = vars(parser.parse_args(argv))
    hub.quiet_libraries()
    if options["measure"]:
        return measure(options["measure"], options["options"])
    engines = options.pop("engines")
    name, file_name = describe_hardware(choose_precision(options["device"], options["dtype"]))
    path = ROOT / "benchmarks" / "results" / f"compare-{options.pop('tag') or file_name}.json"

    def on_result(results):
        gemm, rows = summarize(results)
        record = {
            "hardware": name,
            "platform": platform.platform(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "options": {
                **options,
                "model": Path(options["model"]).name,
                "data": [Path(file).name for file in options["data"]],
            },
            "gemm_flops": gemm,
            "engines": rows,
            "measured": results,
        }
        path.write_text(json.dumps(record, indent=2) + "\n")

    results = run_engines(engines, options, on_result)
    if not results:
        raise UserError("no engine ran")
    gemm, rows = summarize(results)
    if options["readme"]:
        document = ROOT / "docs" / "performance.md"
        before, mark, _, end, after = re.split(r"(<!-- /?compare -->\n)", document.read_text())
        document.write_text(f"{before}{mark}\n{table(rows)}\n\n{end}{after}")
    print(f"{name}; a large matrix product makes {gemm / 1e9:,.0f} GFLOP/s\n\n{table(rows)}\n\nwritten to {path}")
    return 0


if __name__ == "__main__":
    run_command(main)

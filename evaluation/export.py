"""What servers need to know of an exported model: its chat template, its stop tokens and its context length."""

import shlex

from conversations.chatml import END, START, find_opening, is_chatml
from conversations.tokenizer import NO_LIMIT

# Ollama's templates are in Go. Its documentation: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
CHATML = f'''TEMPLATE """{{{{ range .Messages }}}}{START}{{{{ .Role }}}}
{{{{ .Content }}}}{END}
{{{{ end }}}}{START}assistant
"""'''
OTHER = """# The model's chat template is not ChatML. Without a TEMPLATE, Ollama takes the most similar that it knows.
# Write it here, in Go, and compare what is served: python eval.py RUN --served URL"""
OPENING = "# A prompt begins with {}, which Ollama should add by itself: python eval.py RUN --served URL"


def make_modelfile(tokenizer, stops):
    """Ollama's Modelfile for the directory that it lies in; `stops` are texts."""
    lines = [OPENING.format(token) for token in find_opening(tokenizer, (START, END))] if is_chatml(tokenizer) else []
    lines += ["FROM .", CHATML if is_chatml(tokenizer) else OTHER, *(f'PARAMETER stop "{stop}"' for stop in stops)]
    if tokenizer.model_max_length < NO_LIMIT:
        lines.append(f"PARAMETER num_ctx {tokenizer.model_max_length}")
    return "\n".join([*lines, ""])


def describe_serving(path, tokenizer, stops, precision):
    """The commands that serve an exported model, and where its answers should end, as a text."""
    directory, gguf, length = shlex.quote(str(path)), shlex.quote(f"{path}.gguf"), tokenizer.model_max_length
    full, short = {"bf16": ("bfloat16", "bf16"), "fp16": ("float16", "f16"), "fp32": ("float32", "f32")}[precision]
    vllm, llama = (f" {flag} {length}" if length < NO_LIMIT else "" for flag in ("--max-model-len", "-c"))
    lines = [
        f"  stops at   {' or '.join(stops)}",
        f"  vLLM       vllm serve {directory} --dtype {full}{vllm}",
        f"  llama.cpp  python convert_hf_to_gguf.py {directory} --outtype {short} --outfile {gguf}",
        f"             llama-server -m {gguf} --jinja{llama}",
        f"  Ollama     ollama create {shlex.quote(path.name.lower())} -f {shlex.quote(str(path / 'Modelfile'))}",
        "  compare what is served: python eval.py RUN --served URL",
    ]
    return "\n".join(lines)

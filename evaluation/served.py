"""What an OpenAI-compatible server makes of a model, against the model itself: prompts, greedy answers, stopping.

A server tells more or less about what it does. What it does not tell is counted, and never taken for equal.
"""

import contextlib
import http.client
import json
import math
import textwrap
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch

from compute.layers import without_router_loss
from config import UserError, first_line
from conversations.corpus import reading_options
from conversations.formats import read_conversations
from conversations.masking import encode_prompt
from conversations.sources import parse_source
from conversations.templates import get_template, stop_ids
from evaluation.generation import GREEDY, generate

CONVERSATIONS, CANDIDATES = 8, 64  # that are compared, and of which they are chosen for their roles
LONGEST = 2048  # tokens of a prompt; the logits of all are held at once
LIST_SECONDS, ANSWER_SECONDS, MAX_BYTES = 20, 600, 2**26
NEAR = 1.0  # nats between two tokens that 16 bits or a quantisation may exchange; bf16 was seen to at 0.6
ROUNDING = 1e-3  # nats by which log-probabilities in fp32 may differ between implementations
ASPECTS = ("prompt ids", "prompt length", "answer", "stopping", "log-probabilities")
STATES = ("equal", "differs", "not compared")
REQUIRED = ASPECTS[1:4]  # which every server can tell
NO_STOP = "no stop token at the server"
NEARLY = "16 bits, or quantised weights"
FAR = "another model, coarsely quantised weights, or a repetition penalty at the server"
# What not every server takes: log-probabilities; also ids, and no penalty where its default is another.
LOGPROBS = {"logprobs": True, "top_logprobs": 1}
OPTIONS = ({**LOGPROBS, "return_token_ids": True, "repetition_penalty": 1, "repeat_penalty": 1}, LOGPROBS, {})


class RefusedError(UserError):
    """A server has answered a request with an error."""


class Reply(NamedTuple):
    """A server's answer to a conversation; None where it does not tell."""

    text: str
    finish: str | None  # "stop" or "length"
    prompt_tokens: int | None
    prompt_ids: list | None
    ids: list | None
    logprobs: list  # of (text of a token, its log-probability), as far as it tells


class Server:
    """An OpenAI-compatible server at a URL, whose fragment names one of several models."""

    def __init__(self, url):
        address, _, self.model = url.partition("#")
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--served {url}: write it as http://HOST:PORT")
        self.root, self.options, self.has_template = address.rstrip("/").removesuffix("/v1"), OPTIONS, True
        if self.model:
            return
        names = []
        # `transformers serve` refuses this without a cache of the Hub.
        with contextlib.suppress(RefusedError, LookupError, TypeError):
            names = [str(each["id"]) for each in self.request("/v1/models", seconds=LIST_SECONDS)["data"]]
        if len(names) > 1:
            shown = textwrap.shorten(", ".join(names), 200)
            raise UserError(f"--served {url}: the server has {len(names)} models ({shown}); add #NAME to the URL")
        self.model = "".join(names)  # a server that lists none takes requests that name none

    def request(self, path, content=None, seconds=None):
        """The JSON object with which the server answers; `UserError` in one line where it does not."""
        seconds, where, body = seconds or ANSWER_SECONDS, f"--served {self.root}{path}", b""
        data, deadline = None if content is None else json.dumps(content).encode(), time.monotonic() + seconds
        try:
            request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=seconds) as response:
                while part := response.read1():
                    body += part
                    if time.monotonic() > deadline or len(body) > MAX_BYTES:
                        raise TimeoutError
        except urllib.error.HTTPError as error:
            with contextlib.suppress(OSError, http.client.HTTPException):
                body = error.read(1000)
            text = textwrap.shorten(body.decode("utf-8", "replace"), 200, placeholder=" …")
            raise RefusedError(f"{where}: the server answers {error.code} {error.reason}: {text}") from error
        except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            why = f"no complete answer within {seconds} s" if late else f"no answer ({first_line(reason)})"
            raise UserError(f"{where}: {why}; is there a server?") from error
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{where}: its answer is not a JSON object but {body[:60]!r}")
        return value

    def answer(self, messages, max_tokens):
        """The `Reply` to some messages, greedy, of at most `max_tokens`."""
        content = {"messages": messages, "temperature": 0, "max_tokens": max_tokens, "frequency_penalty": 0}
        content |= {"model": self.model} if self.model else {}
        try:
            reply = self.request("/v1/chat/completions", content | self.options[0])
        except RefusedError:
            if len(self.options) == 1:
                raise
            self.options = self.options[1:]
            return self.answer(messages, max_tokens)
        try:
            choice, count = reply["choices"][0], (reply.get("usage") or {}).get("prompt_tokens")
            message, pieces = choice["message"], (choice.get("logprobs") or {}).get("content") or []
            if parsed := [key for key in ("reasoning_content", "reasoning", "tool_calls") if message.get(key)]:
                raise UserError(f"--served {self.root}: it parses {parsed[0]} out of answers; start it without")
            return Reply(
                text=str(message.get("content") or ""),
                finish=choice.get("finish_reason"),
                prompt_tokens=None if count is None else int(count),
                prompt_ids=parse_ids(reply.get("prompt_token_ids")) or self.tokenize(messages, count),
                ids=parse_ids(choice.get("token_ids")),
                logprobs=[(str(each["token"]), float(each["logprob"])) for each in pieces],
            )
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            shown = json.dumps(reply)[:100]
            raise UserError(f"--served {self.root}: its answer is not a chat completion: {shown}") from error

    def tokenize(self, messages, count):
        """The ids of a prompt as llama.cpp's server makes them; None where it does not tell, or counts otherwise."""
        try:
            prompt = self.has_template and self.request("/apply-template", {"messages": messages}, LIST_SECONDS)
            content = prompt and {"content": prompt["prompt"], "add_special": True, "parse_special": True}
            ids = content and parse_ids(self.request("/tokenize", content, LIST_SECONDS)["tokens"])
        except (UserError, LookupError, TypeError):
            ids = self.has_template = False
        return ids if ids and len(ids) == count else None


def parse_ids(value):
    """The ids that a server tells; None where there are none."""
    valid = isinstance(value, list) and all(isinstance(each, int) and 0 <= each < 2**31 for each in value)
    return value if valid and value else None


def choose_conversations(splits, config, tokenizer, max_tokens):
    """Held-out conversations, each up to its last answer: `(location, messages)`, and how many could not be sent.

    They differ in their roles where they can. Those with tools, reasoning or arguments of the template are left out.
    """
    name = next(name for name in ("eval", "test", "train", "all") if name in splits and splits[name].examples)
    dataset = config.dataset
    if name == "eval" and config.eval_dataset:
        dataset, config = config.eval_dataset, replace(config, max_examples=0)  # which is of --dataset
    corpus, numbers = splits[name].examples.origin
    rows = corpus.rows.select(["location", "source"]).take(corpus.bounds[numbers]).to_pylist()
    wanted, found, left_out, seen = {(row["location"], row["source"]) for row in rows}, [], 0, Counter()
    longest, sources = min(LONGEST, tokenizer.model_max_length - max_tokens), map(parse_source, dataset)
    for *place, messages in read_conversations(list(sources), **reading_options(config, tokenizer)):
        if tuple(place) not in wanted:
            continue
        wanted.remove(tuple(place))
        last = max((number for number, each in enumerate(messages) if each["role"] == "assistant"), default=0)
        plain = [{"role": each["role"], "content": each["content"]} for each in messages[:last]]
        more = set().union(*messages) - {"role", "content", "train"}
        if plain and not more and "<think>" not in str(plain) and len(encode_prompt(plain, tokenizer)) <= longest:
            roles = tuple(each["role"] for each in plain)
            found.append((seen[roles], len(found), place[0], plain))  # the first of some roles, then the second, …
            seen[roles] += 1
        else:
            left_out += 1
        if len(found) == CANDIDATES or not wanted:
            break
    if not found:
        raise UserError("--served: no conversation of the run can be sent to a server; use --prompts")
    return [(location, messages) for _, _, location, messages in sorted(found)[:CONVERSATIONS]], left_out


@torch.no_grad()
def compare_served(model, tokenizer, server, conversations, max_tokens):
    """Compare a model with a server, conversation by conversation; returns a report, as JSON.

    Its "verdict" is "equal" only if what every server can report was reported, and nothing differs.
    """
    counts, differences, stopped = {aspect: Counter() for aspect in ASPECTS}, [], 0
    for location, messages in conversations:
        reply = server.answer(messages, max_tokens)
        prompt = encode_prompt(messages, tokenizer)
        (ids,) = generate(model, tokenizer, [prompt], GREEDY, max_tokens)
        output = model(torch.cat([prompt, ids])[None].to(model.device), use_cache=False, **without_router_loss(model))
        logprobs = output.logits[0, len(prompt) - 1 : -1].float().log_softmax(-1).cpu()  # (answer, V)
        found = dict(compare_prompts(prompt.tolist(), reply, tokenizer))
        follows = any(found.values())
        found |= compare_answers(ids.tolist(), logprobs, reply, tokenizer, max_tokens)
        stopped += found["stopping"] == () and reply.finish == "stop"
        for aspect in ASPECTS:
            counts[aspect][STATES[0 if found[aspect] == () else 1 if found[aspect] else 2]] += 1
            if found[aspect]:
                what, cause = found[aspect]
                cause = "the prompt differs" if follows and not aspect.startswith("prompt") else cause
                differences.append({"conversation": location, "aspect": aspect, "what": what, "cause": cause})
    missing = [aspect for aspect in REQUIRED if counts[aspect]["equal"] < len(conversations)]
    return {
        "server": server.root + (f"#{server.model}" if server.model else ""),
        "conversations": len(conversations),
        "compared": {name: {state: count[state] for state in STATES if count[state]} for name, count in counts.items()},
        "stopped": stopped,
        "differences": differences,
        "verdict": "differs" if differences else "not proved" if missing or not stopped else "equal",
    }


# Comparisons yield `(aspect, found)`: found is () where it is equal, None where the server does not tell, or else
# what differs, and the likely cause.


def compare_prompts(prompt, reply, tokenizer):
    """Compare the ids of a prompt with those that a server tells, or their number."""
    theirs, bos, cause = reply.prompt_ids, tokenizer.bos_token_id, "another template"
    if theirs is None:
        yield "prompt ids", None
    else:
        shorter = min(len(prompt), len(theirs))
        begin = next((at for at in range(shorter) if prompt[at] != theirs[at]), shorter)
        end = next((at for at in range(shorter - begin) if prompt[-1 - at] != theirs[-1 - at]), shorter - begin)
        ours, other = prompt[begin : len(prompt) - end], theirs[begin : len(theirs) - end]
        if [bos] in (ours, other) and [] in (ours, other):
            cause = "no BOS at the server" if ours else "two BOS" if bos in prompt else "a BOS that was not trained"
        ours, other = (textwrap.shorten(tokenizer.decode(part), 120, placeholder=" …") for part in (ours, other))
        if "system" in other and "system" not in ours:
            cause = "another template, with a default system message"
        what = f"from its token {begin + 1} on, the prompt has {ours!r}, the server's {other!r}"
        yield "prompt ids", (what, cause) if prompt != theirs else ()
    more = None if reply.prompt_tokens is None else reply.prompt_tokens - len(prompt)
    if more and theirs is None:
        cause += ", such as one with a default system message" if more > 1 else ""
        cause += ", or two BOS" if more == 1 else ", or a context shorter than the prompt" if more < 0 else ""
    what = f"the prompt has {len(prompt)} tokens, the server's {reply.prompt_tokens}"
    yield "prompt length", (what, cause) if more else () if more == 0 else None


def compare_answers(ids, logprobs, reply, tokenizer, max_tokens):
    """Compare a greedy answer, its end, and its log-probabilities, (answer, V), with a server's."""
    finished, at = ids[-1] in stop_ids(tokenizer), find_difference(ids, reply, tokenizer)
    what, cause = (None, None) if at is None else explain(ids, at, logprobs[at], reply, tokenizer)
    at_end, control = finished and at == len(ids) - 1, get_template(tokenizer).encoder.control.items()
    written = [text for text, token in control if token.special and text in reply.text]
    yield "answer", () if at is None else None if written or at_end else (what, cause)
    beyond = not finished and len(clean(reply.text).rstrip()) > len(decode(tokenizer, ids))  # the limit
    known = at is None and not beyond and reply.finish in ("stop", "length")
    if written:
        yield "stopping", (f"the server's answer has {written[0]}", NO_STOP)
    elif at_end:
        yield "stopping", (what, NO_STOP if cause == FAR else f"{cause}, or {NO_STOP}")
    elif known and finished and reply.finish == "length" and len(ids) < max_tokens:
        yield "stopping", (f"the answer ends after {len(ids)} tokens, the server's does not", NO_STOP)
    elif known and not finished and reply.finish == "stop":
        yield "stopping", (f"after {len(ids)} tokens the answer goes on, the server's ends", "a stop text of its own")
    else:
        yield "stopping", () if known else None
    gaps = []
    for number, (piece, value) in zip(ids[:at], reply.logprobs, strict=False):
        if piece.strip() != tokenizer.decode([number]).strip() or not math.isfinite(value):
            break
        gaps.append(abs(value - logprobs[len(gaps), number].item()))
    largest = max(gaps, default=0)
    what = f"of {len(gaps)} tokens they differ by up to {largest:.4f}"
    cause = NEARLY if largest < NEAR else "quantised weights, or another model"
    yield "log-probabilities", (what, cause) if largest > ROUNDING else () if gaps else None


def clean(text):
    """A text without space before it, or the beginning of a character that is cut off, as servers differ in both."""
    return text.rstrip("\ufffd").lstrip()


def decode(tokenizer, ids):
    """The text of ids as servers give it."""
    return clean(tokenizer.decode(ids, skip_special_tokens=True))


def find_difference(ids, reply, tokenizer):
    """The number, from 0, of the first token of an answer that is not a server's; None: none up to the limit."""
    finished, text, theirs = ids[-1] in stop_ids(tokenizer), decode(tokenizer, ids), clean(reply.text)
    if reply.ids is not None:
        given = [*reply.ids, ids[-1]] if finished and reply.ids == ids[:-1] else reply.ids  # without the stop token
        given = given if finished else given[: len(ids)]
        if given != ids:
            same = next((at for at, pair in enumerate(zip(ids, given, strict=False)) if len({*pair}) > 1), len(given))
            return min(same, len(ids) - 1)
    if text.rstrip() == theirs.rstrip() or (not finished and theirs.startswith(text)):
        return None
    same = max(end for end in range(len(ids) + 1) if theirs.startswith(decode(tokenizer, ids[:end])))
    return min(same, len(ids) - 1)


def explain(ids, at, logprobs, reply, tokenizer):
    """What differs at token `at` of an answer, how likely the model finds both tokens, and the likely cause."""
    prefix, theirs, best = decode(tokenizer, ids[:at]), clean(reply.text), ids[at]
    second, *likely = [token for token in logprobs.topk(min(100, len(logprobs))).indices.tolist() if token != best]

    def is_theirs(token):
        if reply.ids is not None:
            return [token] == reply.ids[at : at + 1]
        text = decode(tokenizer, [*ids[:at], token])
        return token in stop_ids(tokenizer) if theirs == prefix else text != prefix and theirs.startswith(text)

    other = next(filter(is_theirs, [second, *likely]), None)
    ours, following = (f"{tokenizer.decode([token])!r} {logprobs[token]:.3f}" for token in (best, second))
    what = f"token {at + 1} is {ours}, then the likeliest is {following}: {logprobs[best] - logprobs[second]:.3f} less"
    if other is None:
        return f"{what}; the server has {theirs[len(prefix) :][:30]!r}", FAR
    what += f"; the server has {tokenizer.decode([other])!r} {logprobs[other]:.3f}"
    return what, NEARLY if logprobs[best] - logprobs[other] < NEAR else FAR


def format_served(report):
    """A report of `compare_served` as text."""
    lines = [f"{report['model']} against {report['server']}: {report['conversations']} conversations, greedy"]
    for aspect, count in report["compared"].items():
        more = f"; {report['stopped']} stopped" if aspect == "stopping" else ""
        lines.append(f"  {aspect:<18} {', '.join(f'{state} in {number}' for state, number in count.items())}{more}")
    if report["left_out"]:
        lines.append(f"  left out           {report['left_out']} that are long, or have tools, reasoning or options")
    for first in report["differences"][:1]:
        lines.append(f"  first difference   {first['conversation']}: {first['aspect']}: {first['what']}")
        lines.append(f"  likely cause       {first['cause']}")
    why = "no answer stopped; raise --max-new-tokens" if not report["stopped"] else "see what was not compared"
    return "\n".join([*lines, report["verdict"] + (f": {why}" if report["verdict"] == "not proved" else "")])

"""A server that speaks as ``vllm serve`` does and samples from a tiny model; it can be made to lie, stumble or die."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file

from aapa_lightning.rollout.base import RolloutRequest
from aapa_lightning.types import Record


class FakeVLLM:
    """``tamper[path]`` changes an answer; ``failures[path]`` are statuses to give before the first answer."""

    def __init__(self, model_dir, tokenizer, *, dev=True, mode="processed_logprobs", context=512):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model_dir)
        self.tokenizer, self.dev, self.mode, self.context = tokenizer, dev, mode, context
        self.version, self.paused, self.loaded = "default", False, []
        self.calls, self.tamper, self.failures = [], {}, {}
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self):
                path = urlsplit(self.path).path
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                with lock:
                    outer.calls.append((path, body))
                    status = outer.failures[path].pop(0) if outer.failures.get(path) else None
                    answer = {"error": "out of luck"} if status else None
                    if status is None:
                        status, answer = outer.answer(path, body)
                if status == 200 and path in outer.tamper:
                    answer = outer.tamper[path](answer)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = handle_one

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *args: None  # clients that hang up are part of the tests
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self):
        self.http.shutdown()
        self.http.server_close()

    def paths(self):
        return [path for path, _ in self.calls]

    def answer(self, path, body):
        if path == "/v1/models":
            return 200, {"data": [{"id": "served/model", "max_model_len": self.context}]}
        if path == "/v1/completions":
            return (503, {"error": "paused"}) if self.paused else self.complete(body)
        actions = {
            "/server_info": lambda: {"vllm_config": {"model_config": {"logprobs_mode": self.mode}}},
            "/weight_info": lambda: {"weight_version": self.version},
            "/pause": lambda: setattr(self, "paused", True) or {"status": "paused"},
            "/resume": lambda: setattr(self, "paused", False) or {"status": "resumed"},
            "/collective_rpc": lambda: self.reload(body),
            "/reset_prefix_cache": lambda: {"success": True},
            "/update_weight_version": lambda: setattr(self, "version", body["new_version"]) or {"success": True},
        }
        return (200, actions[path]()) if self.dev and path in actions else (404, {"detail": "Not Found"})

    def reload(self, body):
        assert body["method"] == "reload_weights"
        assert self.paused
        files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
        state = {name: value for file in files for name, value in load_file(file).items()}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        assert not unexpected
        self.loaded.append((body["kwargs"]["weights_path"], state, missing))
        return {"results": [None]}

    @torch.no_grad()
    def complete(self, body):
        if body["temperature"] == 0 and body["n"] > 1:
            return 400, {"error": "n must be 1 when using greedy sampling"}
        if any(body[name] != 1 for name in ("repetition_penalty", "top_p")) or body["top_k"] or not body["ignore_eos"]:
            return 400, {"error": "not of this kit"}
        return 200, {"choices": [self.sample(body, i) for i in range(body["n"])]}

    def sample(self, body, index):
        generator = torch.Generator().manual_seed(body["seed"] + index)
        ids, logprobs, reason = [], [], "length"
        while len(ids) < body["max_tokens"] and reason == "length":
            logits = self.model(torch.tensor([[*body["prompt"], *ids]])).logits[0, -1].float() / (body["temperature"] or 1.0)
            token = int(logits.argmax()) if body["temperature"] == 0 else int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            ids.append(token)
            logprobs.append(float(logits.log_softmax(-1)[token]))
            text = self.tokenizer.decode(ids)
            if token in body["stop_token_ids"] or any(stop in text for stop in body["stop"]):
                reason = "stop"
        return {
            "index": index,
            "text": self.tokenizer.decode(ids),
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": logprobs},
            "finish_reason": reason,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}] if body["return_weight_versions"] else None,
        }


def make_requests(tokenizer, samples=2):
    """Requests of five prompts of different lengths."""
    prompts = ["abc", "Describe the harbor in two sentences.", "The", "boats rest", "x"]
    return [
        RolloutRequest(tokenizer(prompt)["input_ids"], Record(prompt, source=f"p.jsonl:{slot + 1}"), slot, samples)
        for slot, prompt in enumerate(prompts)
    ]

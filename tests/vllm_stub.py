"""A stand-in for ``vllm serve``: the routes that a trainer needs, in this process.

It reads the adapters that it is told to load, and answers with transformers.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel

# The answers to a route that does not exist, and to what vLLM refuses.
NO_ROUTE = (404, {"detail": "Not Found"})


class Stub(ThreadingHTTPServer):
    """Records each POST as (route, body).

    Attributes:
        refusals: answers, (status, JSON), by route, in place of its own.
        loaded: the files of each loaded adapter, by name.
        edits: whether answers are generated with the adapter.
        raw_logprobs: whether logprobs are those of vLLM's default.
        root: the base that it says it serves.
    """

    def __init__(self, make_base=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.make_base = make_base
        self.requests, self.refusals, self.loaded = [], {}, {}
        self.edits, self.raw_logprobs, self.root = True, False, "/srv/base"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self, route):
        return [body for found, body in self.requests if found == route]

    def answer(self, route, body):
        if route in self.refusals:
            return self.refusals[route]
        if route == "models":
            return 200, {"data": [{"id": "b", "root": self.root, "parent": None}]}
        if route == "load_lora_adapter":
            name, folder = body["lora_name"], Path(body["lora_path"])
            assert name not in self.loaded
            self.loaded[name] = sorted(path.name for path in folder.iterdir())
            if self.make_base:
                model = self.make_base()
                self.model = (
                    PeftModel.from_pretrained(model, folder) if self.edits else model
                )
            return 200, "Success"
        if route == "unload_lora_adapter":
            del self.loaded[body["lora_name"]]
            return 200, "Success"
        if allowed := body.get("allowed_token_ids"):
            choices = [(allowed, [-2.5 if self.raw_logprobs else 0.0])]
        else:
            assert body["model"] in self.loaded
            choices = [self.generate(ids, body) for ids in body["prompt"]]
        return 200, {
            "choices": [
                {"index": n, "token_ids": ids, "logprobs": {"token_logprobs": values}}
                for n, (ids, values) in reversed(list(enumerate(choices)))
            ]
        }

    def generate(self, ids, body):
        """One sample of a prompt, and its tokens' logprobs at the temperature."""
        output = self.model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=body["max_tokens"],
            do_sample=True, temperature=body["temperature"], top_k=0, pad_token_id=0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        tokens = output.sequences[0, len(ids) :].tolist()
        rows = [score[0].log_softmax(-1) for score in output.scores]
        return tokens, [row[t].item() for row, t in zip(rows, tokens, strict=True)]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply()

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body=None):
        route = self.path.removeprefix("/v1/")
        if body is not None:
            self.server.requests.append((route, body))
        status, content = self.server.answer(route, body)
        data = json.dumps(content, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def running_stub(make_base=None):
    with Stub(make_base) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()

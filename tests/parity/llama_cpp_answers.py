"""Run by test_llama_cpp.py in the environment that has llama-cpp-python: one JSON request on stdin, one answer on stdout."""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if "quantize" in request:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.nthread, settings.ftype = 1, request["file_type"]
        source, target = (request[key].encode() for key in ("quantize", "target"))
        return {"failed": llama_cpp.llama_model_quantize(source, target, settings)}
    # fp32 keys and values: by default llama.cpp keeps them in fp16
    model = llama_cpp.Llama(
        request["model"],
        lora_path=request.get("lora"),
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    result: dict[str, Any] = {
        "answers": [
            list(islice(model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0), request["tokens"]))
            for ids in request.get("prompts", [])
        ],
        "ids": [model.tokenize(text.encode(), add_bos=False, special=False) for text in request.get("texts", [])],
    }
    if "messages" in request:
        bos, eos = (model._model.token_get_text(index) for index in (model.token_bos(), model.token_eos()))
        template = model.metadata["tokenizer.chat_template"]
        formatter = Jinja2ChatFormatter(template=template, bos_token=bos, eos_token=eos)
        result["chat"] = formatter(messages=request["messages"]).prompt
    return result


json.dump(answer(json.load(sys.stdin)), sys.stdout)

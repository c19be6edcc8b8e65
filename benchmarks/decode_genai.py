"""The peer of decode.py in a process and an environment of its own: OpenVINO GenAI on a model exported by optimum.

Reads a line of JSON for each text and answers with a line: the tokens it made, and the seconds they took.

    peers/bin/python benchmarks/decode_genai.py export HF_FOLDER TARGET
    peers/bin/python benchmarks/decode_genai.py serve TARGET f32|bf16 THREADS plain|lookup
"""

from __future__ import annotations

import json
import sys
import time


def export(source: str, target: str) -> None:
    """Export as the documentation of GenAI says: optimum's own route, with a cache, no compression of weights."""
    from optimum.exporters.openvino import main_export

    main_export(source, target, task="text-generation-with-past", convert_tokenizer=False, ov_config=None)


def serve(target: str, precision: str, threads: str, kind: str) -> None:
    """Answer requests until the input ends."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": int(threads)}
    tokenizer = genai.Tokenizer(target)
    if kind == "lookup":
        pipeline = genai.LLMPipeline(target, tokenizer, "CPU", prompt_lookup=True, **options)
    else:
        pipeline = genai.LLMPipeline(target, tokenizer, "CPU", **options)
    print(json.dumps({"ready": genai.__version__}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        config = genai.GenerationConfig(max_new_tokens=job["count"], min_new_tokens=job["count"], do_sample=False)
        config.ignore_eos = True
        config.apply_chat_template = False
        if kind == "lookup":
            config.num_assistant_tokens = job["drafts"]
            config.max_ngram_size = 3
        ids = np.array([job["ids"]], np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        begin = time.perf_counter()
        result = pipeline.generate(inputs, config)
        seconds = time.perf_counter() - begin
        print(json.dumps({"tokens": list(result.tokens[0]), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    {"export": export, "serve": serve}[sys.argv[1]](*sys.argv[2:])

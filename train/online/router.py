"""Which of several drafters serves a request: a label that came with it, or a classifier's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from modules.target.outline import named
from train.online.service import Request
from train.online.settings import RoutingSettings


class Router:
    """The name of the drafter of a request; the first one where the label names none.

    Args:
        settings: names, and where labels come from.

    Raises:
        ValueError: a classifier that cannot be loaded, or whose labels name no drafter.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self.names, self.label = settings.names, settings.label
        self.classifier: Any = None
        if settings.classifier is None:
            return
        # A model of Hugging Face's for sequences, such as a topic or a language classifier.
        with named(settings.classifier, "routing.classifier"):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.classifier)
            self.classifier = AutoModelForSequenceClassification.from_pretrained(
                settings.classifier, use_safetensors=True
            ).eval()
        labels = list(self.classifier.config.id2label.values())
        if not set(labels) & set(self.names):
            raise ValueError(
                f"routing.drafters {', '.join(self.names)}: the classifier's labels are "
                f"{', '.join(labels)}: name drafters after them"
            )

    def __call__(self, request: Request) -> str:
        """The drafter that serves a request."""
        label = request.labels.get(self.label)
        if self.classifier is not None:
            label = self._classified(request)
        return label if label in self.names else self.names[0]

    @torch.no_grad()
    def _classified(self, request: Request) -> str:
        """The most likely label of the last turn."""
        text = str(request.messages[-1]["content"])
        inputs = self.tokenizer(text, truncation=True, return_tensors="pt")
        return self.classifier.config.id2label[int(self.classifier(**inputs).logits[0].argmax())]

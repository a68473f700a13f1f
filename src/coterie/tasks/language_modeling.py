"""Predict the next token: a DCFormer, or any causal language model of transformers, on rows of tokens.

The loss is the mean cross-entropy in nats per token, in float32. Per byte and per character it is the same sum over the
length of the text that the tokens stand for, so that models with different tokenizers compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from coterie.tasks import Batch
from coterie.tasks._language_models import build_language_model, describe_size
from coterie.tasks._sampling import sample_text

IGNORED = -100  # a label where there is nothing to predict


class LanguageModeling:
    """Predict each token from those before it.

    A batch holds `tokens` and `labels` (batch, length) int64, `index` (batch,), and where documents are kept apart
    `positions` (batch, length); see `coterie.data.packing`.

    Args:
        classes: Of no use here; the engine gives every task its classes.
        augment: `label_smoothing`, in training.
        text: `coterie.data.text.TextFacts`.
        tokenizer: `coterie.data.tokenizers.TextTokenizer`.
        parameters: Make the feed-forward as wide as brings the model nearest to so many parameters.
        prompt: What samples at evaluation go on from.
        sample_tokens: Tokens of that sample; 0 for none.
        temperature: Of that sample.
    """

    summary = "loss"
    larger_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "tokens"
    target: ClassVar[str] = "text"
    masks: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "data.source": "documentation",
        "optim.lr": 1e-3,
        "schedule.warmup_epochs": 0.25,
        "train.epochs": 4,
        "train.batch_size": 16,
    }

    def __init__(
        self,
        classes: Sequence[str] = (),
        *,
        augment: Mapping[str, Any],
        text: Any,
        tokenizer: Any,
        parameters: int | None = None,
        prompt: str | None = None,
        sample_tokens: int = 100,
        temperature: float = 0.8,
    ) -> None:
        self.text, self.tokenizer = text, tokenizer
        self.label_smoothing = float(augment.get("label_smoothing", 0.0))
        self.parameters = parameters
        self.prompt, self.sample_tokens, self.temperature = prompt, sample_tokens, temperature

    def build_model(self, config: Any, source: Any) -> nn.Module:
        """The model `config.name` for the vocabulary and the row length of the text; see `build_language_model`."""
        return build_language_model(config.name, config.options, self.text, parameters=self.parameters)

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """Parameters with and without embeddings, and FLOPs per token, for the log."""
        return describe_size(model, self.text.sequence_length)

    def prepare_batch(self, batch: Batch) -> Batch:
        """Nothing: rows come as they are."""
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Mean over the labels of the batch. `output` holds the sum (batch,) in float32 of every row.

        Raises:
            ValueError: there is nothing to predict in the batch.
        """
        labels = batch["labels"]
        logits = self.predict(model, batch)
        losses = functional.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing if model.training else 0.0,
            reduction="none",
        ).view_as(labels)
        count = (labels != IGNORED).sum()
        if not count:
            raise ValueError(f"a batch of {len(labels)} rows holds nothing to predict: all of it is padding")
        return {"loss": losses.sum() / count, "output": losses.detach().double().sum(dim=1)}

    def predict(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch tokens vocabulary"]:
        """The logits, in float32."""
        places = {"position_ids": batch["positions"]} if "positions" in batch else {}
        return model(input_ids=batch["tokens"], use_cache=False, **places).logits.float()

    def metrics(self) -> Any:
        """Sums in float64: nats, tokens, bytes, characters."""
        import torch
        from torchmetrics import MetricCollection, SumMetric

        sums: dict[str, Any] = {
            name: SumMetric().set_dtype(torch.float64) for name in ("nats", "tokens", "bytes", "characters")
        }
        return MetricCollection(sums, compute_groups=False)

    def update(self, metrics: Any, output: Float[Tensor, " batch"], batch: Batch) -> None:
        """Add the sums of one batch."""
        metrics["nats"].update(output)
        metrics["tokens"].update((batch["labels"] != IGNORED).sum())
        for name in ("bytes", "characters"):
            metrics[name].update(batch[name])

    def report(self, metrics: Any) -> dict[str, float]:
        """Nats per token, perplexity, and bits per byte and per character of the text."""
        sums = {name: value.item() for name, value in metrics.compute().items()}
        loss = sums["nats"] / sums["tokens"]
        bits = sums["nats"] / math.log(2)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": bits / sums["bytes"],
            "bits_per_character": bits / sums["characters"],
        }

    def comment(self, metrics: Any) -> list[str]:
        """How much text it was."""
        sums = {name: round(value.item()) for name, value in metrics.compute().items()}
        return [f"{sums['tokens']:,} tokens, {sums['bytes']:,} bytes, {sums['characters']:,} characters"]

    def collect(self, output: Float[Tensor, " batch"], batch: Batch) -> dict[str, Tensor]:
        """Nats and tokens of each row, and its number."""
        return {"nats": output, "tokens": (batch["labels"] != IGNORED).sum(dim=1), "indices": batch["index"]}

    def sample(self, model: nn.Module, seed: int) -> str | None:
        """Text that the model goes on with; the same for the same weights and seed."""
        if not self.sample_tokens:
            return None
        return self.generate(model, self.prompt, self.sample_tokens, seed=seed, temperature=self.temperature)

    def generate(self, model: nn.Module, prompt: str | None, new_tokens: int, *, seed: int, **options: Any) -> str:
        """Prompt and what the model goes on with; options as `coterie.tasks._sampling.generate_tokens` takes them."""
        return sample_text(model, self.tokenizer, self.text, prompt, new_tokens, seed=seed, **options)

    def answers(self, output: Int64[Tensor, "batch tokens"], batch: Batch) -> list[Any]:
        """Language models answer by `coterie generate`."""
        raise TypeError("a language model goes on with text: coterie generate RUN --prompt ...")

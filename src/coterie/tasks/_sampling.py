"""Text that a language model goes on with: transformers' `generate`, seeded, beyond the model's positions too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def prompt_tokens(tokenizer: Any, text: Any, prompt: str | None) -> list[int]:
    """The tokens of a prompt. Where documents have beginnings the prompt begins one; without either, a line begins."""
    if prompt is None and not text.several_documents:
        prompt = "\n"
    ids = tokenizer.encode((prompt or "").encode(), "the prompt").tolist()
    return [text.end, *ids] if text.several_documents or not ids else ids


@torch.inference_mode()
def generate_tokens(
    model: nn.Module,
    tokens: list[int],
    new_tokens: int,
    *,
    end: int | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    streamer: Any = None,
) -> list[int]:
    """Tokens after `tokens`: `new_tokens`, or fewer where the document ends. Draws from the global generators.

    A model has so many positions. When they are full, the latest half of them is the prompt of what follows.

    Args:
        model: A causal language model of transformers, in eval mode.
        tokens: At least one; the latest are used where the model has fewer positions.
        new_tokens: How many to add.
        end: Id of the token that ends a document, or None to go on.
        temperature: 0 takes the most probable token every time.
        top_k, top_p: Keep so many tokens, and so much of the probability.
        streamer: Of transformers; is given the new tokens as they come.
    """
    config: Any = model.config
    places = config.max_position_embeddings
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0}
    device = next(model.parameters()).device
    made: list[int] = []
    while len(made) < new_tokens:
        context = (tokens + made)[-places:]
        if len(context) >= places:
            context = context[-max(places // 2, 1) :]
        count = min(new_tokens - len(made), places - len(context))
        ids = torch.tensor([context], device=device)
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, eos_token_id=end,
            pad_token_id=end or 0, streamer=streamer, **sampling,
        )  # fmt: skip
        new = out[0, len(context) :].tolist()
        made += new
        if not new or (end is not None and new[-1] == end):
            break
    return made


def sample_text(
    model: nn.Module, tokenizer: Any, text: Any, prompt: str | None, new_tokens: int, *, seed: int, **options: Any
) -> str:
    """Prompt and what follows, drawn with `seed`. The global generators are left as they were found."""
    was_training, device = model.training, next(model.parameters()).device
    first = prompt_tokens(tokenizer, text, prompt)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        end = text.end if text.several_documents else None
        made = generate_tokens(model.eval(), first, new_tokens, end=end, **options)
    model.train(was_training)
    return tokenizer.decode(first + made)

"""One optimizer step on a GPU as one CUDA graph, for models so small that launching kernels is what takes time.

A graph repeats fixed work on fixed addresses. So all samples lie on the GPU, padded to the longest, and a batch is an
index into them; and since a learning rate would be a constant of the graph, both optimizers step at their peak rate,
and what they changed is scaled afterwards. That is the same: the updates of AdamW and Muon, decay included, are
proportional to the rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3ForCausalLM

WARM_UP = 3
"""Steps before the capture, in which libraries set themselves up and optimizers make their state; they count."""

IGNORED = -100


class CapturedStep:
    """Forward in bfloat16, backward, clipping and optimizer steps on batches of one size.

    Args:
        encoded: all samples: token ids of prompt and answer, and how many of them are the prompt.
        batch_size: samples a step; short batches are filled with empty samples, which no loss is taken of.
        optimizers: at their peak rates; AdamW ``capturable``.
        grad_clip: gradients are scaled down to this norm.
        capture: False runs every step op by op, as on a CPU, where there are no graphs.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        encoded: list[tuple[list[int], int]],
        batch_size: int,
        optimizers: list[torch.optim.Optimizer],
        grad_clip: float,
        capture: bool,
    ) -> None:
        import torch

        device = model.device
        longest = max(len(ids) for ids, _ in encoded)
        padded = [ids + [0] * (longest - len(ids)) for ids, _ in encoded]
        # the last sample is the empty one
        self._ids = torch.tensor([*padded, [0] * longest], device=device)
        self._prompts = torch.tensor([*(prompt for _, prompt in encoded), longest], device=device)
        self._lengths = torch.tensor([*(len(ids) for ids, _ in encoded), 0], device=device)
        self._model, self._optimizers, self._grad_clip = model, optimizers, grad_clip
        self._weights = list(model.parameters())
        self._index = torch.full((batch_size,), len(encoded), device=device)
        self._rate = torch.ones((), device=device)
        self._loss = torch.zeros((), device=device)
        self._capture, self._steps = capture, 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, samples: list[int], rate_factor: float) -> torch.Tensor:
        """One step.

        Args:
            samples: indices into the encoded samples, at most ``batch_size``.
            rate_factor: what the peak learning rates are multiplied with.

        Returns:
            Mean cross-entropy over the answers' tokens before the step, [] float32 on the model's device.
        """
        import torch

        empty = len(self._ids) - 1
        self._index.copy_(torch.tensor(samples + [empty] * (len(self._index) - len(samples))))
        self._rate.fill_(rate_factor)
        if not self._capture:
            self._step()
        elif self._graph is not None:
            self._graph.replay()
        else:
            self._warm_up()
        return self._loss.clone()

    def _warm_up(self) -> None:
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._steps += 1
        if self._steps == WARM_UP:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self._graph = graph

    def _step(self) -> None:
        import torch

        self._model.zero_grad(set_to_none=True)
        loss = self._answer_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, self._grad_clip)
        before = [weight.detach().clone() for weight in self._weights]
        for optimizer in self._optimizers:
            optimizer.step()
        with torch.no_grad():
            for weight, old in zip(self._weights, before, strict=True):
                weight.copy_(torch.lerp(old, weight, self._rate))
        self._loss.copy_(loss.detach())

    def _answer_loss(self) -> torch.Tensor:
        """As ``pretrain.answer_loss``, but of fixed shape: the head runs on all positions."""
        import torch
        import torch.nn.functional as F

        ids = self._ids[self._index]
        places = torch.arange(ids.shape[1] - 1, device=ids.device)
        first, last = self._prompts[self._index][:, None] - 1, self._lengths[self._index][:, None] - 1
        labels = torch.where((places >= first) & (places < last), ids[:, 1:], IGNORED)
        device = ids.device.type
        # without the cache of casts, whose entries would outlive the capture
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            # padding is on the right: causal attention, which a mask of None stands for, never sees it
            mask = {"full_attention": None}
            hidden = self._model.model(input_ids=ids[:, :-1], attention_mask=mask, use_cache=False).last_hidden_state
            logits = self._model.lm_head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

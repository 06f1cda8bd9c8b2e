"""The spike detector alone, in a training loop of your own: run as a script, on any machine.

A linear model learns by gradient descent; step 150 gets a batch whose targets are wrong. What belongs to the detector
are the lines with its name: one call a step, and a dict that goes into your checkpoint.
"""

from __future__ import annotations

import json

import torch

import spikepatch


def main() -> None:
    torch.manual_seed(0)
    model, truth = torch.nn.Linear(16, 1), torch.randn(16, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    detector = spikepatch.SpikeDetector()
    for step in range(1, 301):
        x = torch.randn(64, 16)
        y = x @ truth + 0.5 * torch.randn(64, 1) + (20 if step == 150 else 0)
        loss = (model(x) - y).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        detector = detector.observe(step, loss.item(), norm.item())
        if not detector.flags:  # skip the update of a step that spikes
            optimizer.step()
        optimizer.zero_grad()
        if step == 200:  # a checkpoint: the detector goes on where it was
            detector = spikepatch.SpikeDetector.from_dict(json.loads(json.dumps(detector.to_dict())))
    for event in detector.events:
        print(event)  # noqa: T201


if __name__ == "__main__":
    main()

"""A feed-forward block of Transformer Engine's operations with PolyNorm, trained for some steps.

python feed_forward.py          # Transformer Engine 2.13 or later, and a GPU
"""

import torch
import transformer_engine.pytorch as te

from polycom_ext.integrations.transformer_engine import PolyNorm

HIDDEN, WIDTH = 256, 1024
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

block = te.ops.Sequential(
    te.ops.LayerNorm(HIDDEN, device=device),
    te.ops.Linear(HIDDEN, WIDTH, device=device),
    PolyNorm(order=3, device=device),
    te.ops.Linear(WIDTH, HIDDEN, device=device),
)
optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)
x = torch.randn(64, HIDDEN, device=device)
target = torch.roll(x, 1, dims=-1)

losses = []
for _ in range(20):
    loss = (block(x) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {block[2].module.coefficients()}")
